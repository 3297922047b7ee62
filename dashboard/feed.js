// The live feed: what is known of each request, the filters, and a card for each that moves from start to complete.

import { brief, byId, clock, count, duration, el, keepReachable, money, replace, roveFocus, setText } from "./dom.js";
import { api, follow } from "./net.js";

const STAGES = ["start", "classified", "routed", "complete"];
const STEP = 100; // cards shown at first, and with every "Show more"
const PACE = 120; // ms between two paintings: faster is only restless
const AWAY = 60_000; // a page nobody looks at gives its place among the watchers back after so long

export class Feed {
  constructor(onSelect) {
    this.items = new Map();
    this.onSelect = onSelect;
    this.limit = 500;
    this.shown = STEP;
    this.selected = null;
    this.life = "";
    this.order = 0;
    this.matching = new Set();
    this.paused = false;
    this.waiting = 0;
    this.form = byId("filters");
    this.lists = { running: byId("running"), finished: byId("finished") };
    this.listen();
  }

  listen() {
    this.form.addEventListener("input", (event) => (event.target.name === "text" ? this.search() : this.refilter()));
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("reset", () => setTimeout(() => this.search()));
    byId("more").addEventListener("click", () => {
      this.shown += STEP;
      this.paint();
    });
    byId("pause").addEventListener("click", () => this.pause(!this.paused));
    for (const list of Object.values(this.lists)) {
      list.addEventListener("click", (event) => {
        const card = event.target.closest(".card");
        if (card) this.onSelect(Number(card.dataset.id));
      });
    }
    roveFocus(byId("feed-list"), ".card");
    setInterval(() => this.tick(), 500);
  }

  // Reads what is held, then follows what happens; stops following while the page is out of sight.
  async start(onState) {
    let stop = null;
    let timer = 0;
    const begin = async () => {
      stop = new AbortController();
      const lastEventId = await this.load().catch(() => null);
      this.schedule();
      await follow({
        lastEventId, signal: stop.signal, onEvent: (event) => this.take(event),
        onState: (state) => {
          if (state === "live" && this.state && this.state !== "live") this.load().catch(() => onState("lost"));
          this.state = state;
          onState(state);
        },
      });
    };
    document.addEventListener("visibilitychange", () => {
      clearTimeout(timer);
      if (document.hidden) timer = setTimeout(() => { stop.abort(); stop = null; }, AWAY);
      else if (!stop) begin();
    });
    await begin();
  }

  // What the router holds. Requests we know and it does not are gone; none goes back to an earlier stage.
  async load() {
    const before = [...this.items.keys()];
    const told = await api("dashboard/requests");
    const life = told.last_event_id.split("-")[0];
    if (this.life && life !== this.life) this.items.clear();
    this.life = life;
    this.limit = told.limit;
    const held = new Set(told.requests.map((request) => request.id));
    for (const id of before) if (!held.has(id)) this.items.delete(id);
    for (const request of told.requests.reverse()) this.put(request.id, request);
    this.schedule();
    return told.last_event_id;
  }

  take(event) {
    if (event.type === "skipped") return this.fellBehind(event.count);
    if (event.type === "complete") {
      this.put(event.id, { ...summary(event), stage: "complete" });
      if (this.text && mentions(event, this.text)) this.matching.add(event.id);
    } else {
      const { type, model, ...told } = event;
      const named = type === "start" ? { requested_model: model } : type === "routed" ? { sent_model: model } : {};
      this.put(event.id, { ...told, ...named, stage: type });
    }
    this.waiting += event.type === "complete" ? 1 : 0;
    return this.schedule();
  }

  put(id, told) {
    const item = this.items.get(id) ?? { id, stage: "", tags: [] };
    if (item.stage === "complete") return;
    const later = STAGES.indexOf(told.stage) > STAGES.indexOf(item.stage);
    Object.assign(item, told, { ts_ms: told.stage === "complete" ? told.ts_ms : item.ts_ms ?? told.ts_ms });
    item.stage = later ? told.stage : item.stage || told.stage;
    item.changed = true;
    item.order = this.order += 1;
    this.items.set(id, item);
  }

  fellBehind(skipped) {
    const notice = byId("skipped");
    notice.hidden = false;
    this.skipped = (this.skipped ?? 0) + skipped;
    setText(notice, `${count(this.skipped)} events came faster than this page could take them; the list was read again.`);
    clearTimeout(this.rereading);
    this.rereading = setTimeout(() => this.load().catch(() => {}), 500);
  }

  pause(paused) {
    this.paused = paused;
    this.waiting = 0;
    byId("pause").setAttribute("aria-pressed", String(paused));
    setText(byId("pause"), paused ? "Resume" : "Pause");
    this.schedule();
  }

  // filters
  get text() {
    return this.form.elements.text.value.trim().toLowerCase();
  }

  search() {
    clearTimeout(this.searching);
    this.searching = setTimeout(async () => {
      const text = this.text;
      const told = text ? await api(`dashboard/requests?text=${encodeURIComponent(text)}`).catch(() => null) : null;
      if (text === this.text) {
        this.matching = new Set(told?.requests.map((request) => request.id));
        this.refilter();
      }
    }, 200);
  }

  refilter() {
    this.shown = STEP;
    this.paint();
  }

  filter() {
    const { provider, model, outcome, tag } = this.form.elements;
    const wanted = [
      [provider.value, (item) => item.provider === provider.value],
      [model.value, (item) => item.requested_model === model.value || item.sent_model === model.value],
      [outcome.value, (item) => (item.stage === "complete" ? item.outcome : "running") === outcome.value],
      [tag.value, (item) => item.tags?.includes(tag.value)],
      [this.text, (item) => this.matching.has(item.id)],
    ].filter(([value]) => value).map(([, test]) => test);
    this.form.querySelector("[type=reset]").hidden = !wanted.length;
    return wanted.length ? (item) => wanted.every((test) => test(item)) : null;
  }

  offer() {
    const seen = { provider: new Set(), model: new Set(), tag: new Set() };
    for (const item of this.items.values()) {
      seen.provider.add(item.provider);
      seen.model.add(item.requested_model).add(item.sent_model);
      for (const tag of item.tags ?? []) seen.tag.add(tag);
    }
    for (const [name, values] of Object.entries(seen)) {
      const select = this.form.elements[name];
      const names = [...values].filter(Boolean).sort();
      if (select.value && !names.includes(select.value)) names.push(select.value);
      const key = names.join("\n");
      if (select.dataset.key === key) continue;
      const chosen = select.value;
      replace(select, select.options[0], names.map((value) => el("option", { value }, value.slice(0, 60))));
      select.value = chosen;
      select.dataset.key = key;
    }
  }

  // painting
  schedule() {
    if (this.painting) return;
    this.painting = setTimeout(() => {
      this.painting = 0;
      if (this.paused) setText(byId("pause"), this.waiting ? `Resume (${brief(this.waiting)} new)` : "Resume");
      else requestAnimationFrame(() => this.paint());
    }, PACE);
  }

  paint() {
    this.forget();
    this.offer();
    const test = this.filter();
    const all = [...this.items.values()].sort((a, b) => b.order - a.order);
    const visible = test ? all.filter(test) : all;
    const running = visible.filter((item) => item.stage !== "complete").sort((a, b) => b.id - a.id);
    const finished = visible.filter((item) => item.stage === "complete");
    const focused = document.activeElement?.closest?.(".card");
    this.fillList(this.lists.running, running.slice(0, STEP));
    this.fillList(this.lists.finished, finished.slice(0, this.shown));
    if (focused?.isConnected && focused !== document.activeElement) focused.focus({ preventScroll: true });
    keepReachable(byId("feed-list"), ".card");
    byId("running-title").hidden = !running.length;
    byId("finished-title").hidden = !finished.length;
    setText(byId("running-count"), count(running.length));
    setText(byId("feed-count"), all.length ? `${test ? `${count(visible.length)} of ` : ""}${count(all.length)} requests` : "");
    byId("more").hidden = finished.length <= this.shown;
    this.explainEmptiness(all.length, visible.length);
  }

  forget() {
    const finished = [...this.items.values()].filter((item) => item.stage === "complete");
    if (finished.length <= this.limit) return;
    finished.sort((a, b) => a.order - b.order);
    for (const item of finished.slice(0, finished.length - this.limit)) this.items.delete(item.id);
  }

  fillList(list, items) {
    const wanted = new Set(items);
    for (const row of [...list.children]) if (!wanted.has(row.item)) row.remove();
    items.forEach((item, place) => {
      if (!item.row) {
        item.row = el("li", {}, el("button.card", { type: "button", tabindex: -1, "data-id": item.id }));
        item.row.item = item;
      }
      if (item.changed) drawCard(item.row.firstChild, item);
      item.changed = false;
      item.row.firstChild.setAttribute("aria-current", String(item.id === this.selected));
      if (list.children[place] !== item.row) list.insertBefore(item.row, list.children[place] ?? null);
    });
  }

  select(id) {
    this.selected = id;
    this.paint();
  }

  focusCard(id) {
    this.items.get(id)?.row?.firstChild.focus();
  }

  tick() {
    for (const row of this.lists.running.children) {
      const time = row.querySelector(".time");
      if (time && row.item.stage !== "complete") setText(time, elapsed(row.item));
    }
  }

  explainEmptiness(all, visible) {
    const empty = byId("feed-empty");
    empty.hidden = visible > 0;
    if (visible || empty.dataset.all === String(all > 0)) return;
    empty.dataset.all = String(all > 0);
    replace(empty, all ? [el("h3", {}, "Nothing matches"), el("p", {}, "No request that is held passes these filters.")] : welcome());
  }
}

function welcome() {
  const url = new URL("../v1", import.meta.url).href;
  const example = `curl ${url}/chat/completions -H 'Content-Type: application/json' \\\n  -d '{"model": "echo", "messages": [{"role": "user", "content": "hello"}]}'`;
  return [
    el("h3", {}, "No requests yet"),
    el("p", {}, "Point any OpenAI or Anthropic client at this router, or send a first request from a terminal:"),
    el("pre", { tabindex: 0 }, example),
    el("p.note", {}, "It appears here while it runs. Where a key is needed, add it as -H 'Authorization: Bearer …'."),
  ];
}

const elapsed = (item) => `${Math.max(0, (Date.now() - item.ts_ms) / 1000).toFixed(1)} s`;

function drawCard(button, item) {
  const done = item.stage === "complete";
  const state = done ? item.outcome : "running";
  button.setAttribute("class", `card is-${state}`);
  const model = item.sent_model ?? item.requested_model ?? "";
  const tokens = done && item.usage_source !== "none" && Number.isFinite(item.input_tokens) ? `${brief(item.input_tokens)} → ${brief(item.output_tokens)} tokens` : null;
  const told = done ? [
    tokens, item.ttft_ms !== null && item.stream ? `first token ${duration(item.ttft_ms)}` : null,
    item.cost ? money(item.cost) : null, item.attempts > 1 ? `${item.attempts} attempts` : null,
  ] : [{ start: "deciding", classified: "routing", routed: "waiting for the answer" }[item.stage]];
  replace(button,
    el("span.row", {},
      el("span.outcome", {}, done ? item.outcome : "running"),
      el("span.model", {}, model || "no model"),
      el("span.time", {}, done ? duration(item.duration_ms) : elapsed(item))),
    el("span.row", {},
      el("span.preview", {}, item.prompt || item.error_type || (done ? "no text" : "\u2007")),
      el("span.clock", {}, clock(item.ts_ms))),
    el("span.row.fine", {},
      el("span.track", { "aria-hidden": "true" }, STAGES.map((stage, i) => el(`i${i <= STAGES.indexOf(item.stage) ? ".past" : ""}`))),
      item.provider ? el("span.where", {}, item.provider) : null,
      told.filter(Boolean).map((text) => el("span", {}, text))));
}

const PLAIN = [
  "ts_ms", "generation_id", "outcome", "status", "error_type", "provider", "requested_model", "sent_model", "stream", "duration_ms",
  "ttft_ms", "tags", "usage_source",
];

// What a card needs of a record, so that the page does not keep what it can ask for.
function summary(record) {
  const told = Object.fromEntries(PLAIN.map((name) => [name, record[name]]));
  const usage = record.response?.usage ?? {};
  const asked = record.messages.findLast((message) => message.role === "user")?.content ?? [];
  const prompt = asked.find?.((block) => typeof block?.text === "string")?.text.slice(0, 160) ?? "";
  return {
    ...told, prompt, input_tokens: usage.input_tokens, output_tokens: usage.output_tokens, cost: record.cost?.total,
    attempts: record.attempts.length,
  };
}

function mentions(value, text) {
  if (typeof value === "string") return value.toLowerCase().includes(text);
  return value !== null && typeof value === "object" && Object.values(value).some((inner) => mentions(inner, text));
}
