// Settings > Observability: the Enable Broadcast switch, a card for each destination, and the way to add one.

import { DestinationForm, testResult } from "./destination-form.js";
import { TYPES, typeOf } from "./destination-types.js";
import { ago, confirmed, copyButton, count, el, percent, replace, setText } from "./dom.js";
import { api } from "./net.js";

const PACE = 3000;
const LEFT_OUT = { sampling: "left out by sampling", filter: "left out by the filter", api_key: "made with other keys" };

export function startObservability(node) {
  const page = new Page(node);
  page.refresh();
  setInterval(() => document.hidden || page.refresh(), PACE);
  document.addEventListener("visibilitychange", () => document.hidden || page.refresh());
}

class Page {
  constructor(node) {
    this.cards = new Map();
    this.title = el("h1", { tabindex: -1 }, "Observability");
    this.switch = el("input", { type: "checkbox", role: "switch", disabled: true, onchange: () => this.turn() });
    this.message = el("div", { role: "status" });
    this.list = el("div.destinations");
    this.stage = el("div", { hidden: true });
    this.addButton = el("button.primary", { type: "button", onclick: () => this.choose() }, "Add a destination");
    this.overview = el("div.destinations", {},
      el("div.title-row", {}, el("h2", {}, "Destinations"), el("div.actions", {}, this.addButton)), this.list);
    replace(node,
      el("div.panel", {},
        el("div.title-row", {}, this.title, el("label.switch", {}, "Enable Broadcast", this.switch)),
        el("p", {}, "Broadcast sends a trace of every finished request to the destinations below, in the format of OpenRouter's Broadcast. ",
          "Requests never wait for it: what a destination does not take is kept and tried again.")),
      this.message, this.stage, this.overview);
  }

  async refresh() {
    try {
      const [state, { destinations }, stats] = await Promise.all([api("observability"), api("observability/destinations"), api("stats")]);
      this.stats = stats;
      this.switch.checked = state.enabled;
      this.switch.disabled = false;
      this.draw(destinations, state.enabled);
      if (this.failed) this.tell(null);
      this.failed = false;
    } catch (error) {
      this.failed = true;
      this.tell(`The settings cannot be read: ${error.message}`, "bad");
    }
  }

  async turn() {
    const enabled = this.switch.checked;
    try {
      await api("observability", { method: "PUT", body: { enabled } });
      this.tell(enabled ? "Broadcast is on." : "Broadcast is off: nothing is sent.", "good");
    } catch (error) {
      this.tell(error.message, "bad");
    }
    this.refresh();
  }

  tell(text, kind = "") {
    replace(this.message, text ? el(`p.notice${kind ? `.${kind}` : ""}`, {}, text) : null);
  }

  // A card is made anew only when its destination changed; its numbers are kept up to date in place.
  draw(destinations, on) {
    const known = new Set(destinations.map((destination) => destination.id));
    for (const [id, card] of this.cards) {
      if (known.has(id)) continue;
      card.node.remove();
      this.cards.delete(id);
    }
    const counters = Object.values(this.stats.broadcast.destinations);
    for (const destination of destinations) {
      const key = JSON.stringify(destination);
      let card = this.cards.get(destination.id);
      if (card?.key !== key) {
        const made = new Card(destination, key, this);
        if (card) card.node.replaceWith(made.node);
        else this.list.append(made.node);
        this.cards.set(destination.id, made);
        card = made;
      }
      card.count(counters.find((one) => one.id === destination.id), on);
    }
    if (!destinations.length && !this.list.firstChild) {
      this.list.append(el("div.empty", {}, el("h3", {}, "No destinations yet"),
        el("p", {}, "Add the first one: a collector on this machine or a hosted service. The connection is tested before anything is saved.")));
    } else if (destinations.length) this.list.querySelector(".empty")?.remove();
  }

  // the stage: choosing a type, then the form
  set(node) {
    replace(this.stage, node);
    this.stage.hidden = !node;
    this.overview.hidden = Boolean(node);
    this.tell(null);
    node?.querySelector("h2").focus();
    scrollTo(0, 0);
  }

  choose() {
    const types = TYPES.map(({ type, title, what, only }) => el("li", {}, only
      ? el("div.only", {}, el("b", {}, title), el("span.note", {}, what), el("span.note", {}, only))
      : el("button", { type: "button", onclick: () => this.edit(type, null) }, el("b", {}, title), el("span.note", {}, what))));
    this.set(el("div.panel", {}, el("h2", { tabindex: -1 }, "Where shall the traces go?"), el("ul.types", {}, types),
      el("div.actions", {}, el("button.quiet", { type: "button", onclick: () => this.leave(null) }, "Cancel"))));
  }

  edit(type, stored) {
    const form = new DestinationForm(type, stored, Object.keys(this.stats?.api_keys ?? {}), (message) => this.leave(message));
    this.set(form.node);
  }

  leave(message) {
    this.set(null);
    this.title.focus();
    if (message) this.tell(this.switch.checked ? message : `${message} Broadcast is off: switch it on to send.`, this.switch.checked ? "good" : "");
    this.refresh();
  }
}

class Card {
  constructor(destination, key, page) {
    Object.assign(this, { destination, key, page });
    const { name, type, source, enabled } = destination;
    this.state = el("span.state");
    this.numbers = el("dl.counters");
    this.trouble = el("p.notice.bad", { hidden: true });
    this.below = el("div", { role: "status" });
    const readOnly = source === "file";
    this.enabled = el("input", { type: "checkbox", role: "switch", disabled: readOnly, onchange: () => this.turn() });
    this.enabled.checked = enabled;
    this.node = el("article.destination", { "aria-label": name },
      el("div.title-row", {},
        el("div.about", {}, el("h3", {}, name), el("span.note", {}, typeOf(type).title), this.state,
          readOnly ? el("span.note", {}, "from config.toml, read-only") : null),
        el("label.switch", {}, el("span.sr", {}, `${name} is enabled`), this.enabled)),
      el("p.note", {}, this.describe()),
      this.numbers, this.trouble,
      el("div.actions", {},
        readOnly ? null : el("button", { type: "button", onclick: () => page.edit(type, destination) }, "Edit"),
        this.button("Test connection", () => this.test()),
        this.button("Show payload", () => this.payload()),
        readOnly ? null : el("button.danger", { type: "button", onclick: () => this.remove() }, "Delete")),
      this.below);
  }

  button(text, action) {
    const button = el("button", { type: "button" }, text);
    button.addEventListener("click", async () => {
      button.disabled = true;
      await action().catch((error) => this.show(el("p.notice.bad", {}, error.message)));
      button.disabled = false;
    });
    return button;
  }

  describe() {
    const { config, privacy_mode: privacy, sampling_rate: rate, api_keys: keys, filter_rules: filter } = this.destination;
    const where = config.endpoint ?? config.base_url ?? config.url ?? config.path ?? "";
    return [
      where, privacy ? "privacy mode: no prompts or answers" : null, rate < 1 ? `${percent(rate)} of sessions` : null,
      keys ? `keys: ${keys.join(", ")}` : null, filter?.groups?.length && filter.enabled !== false ? "filtered" : null,
    ].filter(Boolean).join(" · ");
  }

  count(told, on) {
    const { accepted = 0, delivered = 0, queued = 0, dropped = {}, skipped = {}, last_error: error, last_error_at: at, last_success: success } = told ?? {};
    const failing = error && (!success || (at && Date.parse(at) > Date.parse(success)));
    const [word, text] = !this.destination.enabled ? ["off", "switched off"] : !on ? ["off", "Broadcast is off"]
      : failing ? ["failing", "failing"] : delivered ? ["delivering", "delivering"] : ["ready", "waiting for requests"];
    this.state.className = `state is-${word}`;
    setText(this.state, text);
    const reasons = (counts) => Object.entries(counts).map(([why, n]) => `${count(n)} ${LEFT_OUT[why] ?? why.replaceAll("_", " ")}`).join(", ");
    const total = (counts) => Object.values(counts).reduce((sum, n) => sum + n, 0);
    const rows = [
      ["Accepted", count(accepted), reasons(skipped)], ["Delivered", count(delivered), ""],
      ["Queued", count(queued), ""], ["Dropped", count(total(dropped)), reasons(dropped)], ["Last success", success ? ago(success) : "never", ""],
    ];
    const counted = JSON.stringify(rows);
    if (this.counted !== counted) {
      replace(this.numbers, rows.map(([name, value, note]) => el("div", {}, el("dt", {}, name), el("dd", {}, value, note ? el("p.note", {}, note) : null))));
    }
    this.counted = counted;
    this.trouble.hidden = !failing;
    setText(this.trouble, failing ? `Last error${at ? `, ${ago(at)}` : ""}: ${error}` : "");
  }

  show(node) {
    replace(this.below, node);
  }

  async turn() {
    try {
      await api(`observability/destinations/${this.destination.id}`, { method: "PUT", body: { enabled: this.enabled.checked } });
      this.page.refresh();
    } catch (error) {
      this.enabled.checked = !this.enabled.checked;
      this.show(error.body && "advice" in error.body ? testResult(error.body) : el("p.notice.bad", {}, error.message));
    }
  }

  async test() {
    this.show(testResult(await api("observability/destinations/test", { method: "POST", body: { id: this.destination.id } })));
  }

  async payload() {
    const told = await api(`observability/destinations/${this.destination.id}/payload`);
    const close = el("button.quiet", { type: "button", onclick: () => this.show(null) }, "Close");
    if (!told.payload) {
      this.show(el("div.empty", {}, el("h3", {}, "Nothing to show yet"),
        el("p", {}, "No request of this process was meant for this destination. Send one, then look again."), close));
      return;
    }
    const { method, url, headers } = told.request;
    const head = [`${method} ${url}`, ...Object.entries(headers).map(([name, value]) => `${name}: ${value}`)].join("\n");
    const body = JSON.stringify(told.payload, null, 2);
    this.show(el("div.rules", {},
      el("div.title-row", {}, el("h4", {}, `What it gets for ${told.generation_id}`), el("div.actions", {}, copyButton(body), close)),
      el("pre", { tabindex: 0 }, head), el("pre", { tabindex: 0 }, body)));
  }

  async remove() {
    const { id, name } = this.destination;
    if (!(await confirmed(`Delete ${name}?`, "Its settings, and what is queued for it, are gone at once.", "Delete"))) return;
    try {
      await api(`observability/destinations/${id}`, { method: "DELETE" });
      this.page.leave(`${name} is deleted.`);
    } catch (error) {
      this.show(el("p.notice.bad", {}, error.message));
    }
  }
}
