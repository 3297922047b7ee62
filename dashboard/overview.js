// The numbers: tiles, charts, and a line for every provider and model.

import { Chart } from "./charts.js";
import { brief, byId, count, duration, el, money, percent, perSecond, replace } from "./dom.js";
import { api } from "./net.js";

const PACE = 5000;
const STATES = {
  closed: ["healthy", "Requests go there."],
  "half-open": ["probing", "It failed too often; one request tries whether it is back."],
  open: ["resting", "It failed too often and gets no requests until the cooldown is over."],
};
const SPANS = { "5m": "5 min", "1h": "hour", "24h": "24 h" };

const percentiles = (key) => ["p50", "p95", "p99"].map((p) => ({
  name: p, style: p, value: (told) => told.summary[key][p], course: (told) => told[key][p],
}));
const perSecondOf = (name, key, style) => ({
  name, style, course: (told) => told[`${key}_per_s`],
  value: (told) => (told.summary.requests ? (told.summary[key] / told.summary.requests) * told.summary.requests_per_s : 0),
});

const CHARTS = [
  { title: "Requests per second", kind: "area", format: brief, lines: [perSecondOf("all", "requests", "main"), perSecondOf("failed", "failed", "bad")] },
  { title: "Latency", kind: "lines", format: duration, lines: percentiles("latency_ms") },
  { title: "Time to first token", kind: "lines", format: duration, lines: percentiles("ttft_ms") },
  { title: "Tokens per second", kind: "lines", format: brief, lines: [perSecondOf("in", "input_tokens", "main"), perSecondOf("out", "output_tokens", "second")] },
  { title: "Cost", kind: "bars", format: money, lines: [{ name: "in all", style: "main", value: (told) => told.summary.cost, course: (told) => told.cost }] },
];

export class Overview {
  constructor() {
    this.charts = CHARTS.map((chart) => new Chart(chart));
    byId("charts").append(...this.charts.map((chart) => chart.node));
    this.group = byId("group");
    this.group.addEventListener("change", () => this.refresh());
    byId("window").addEventListener("change", () => this.refresh());
    document.addEventListener("visibilitychange", () => !document.hidden && this.refresh());
    setInterval(() => document.hidden || this.refresh(), PACE);
  }

  async refresh() {
    const window = byId("window").querySelector(":checked").value;
    const [kind, ...name] = this.group.value.split(":");
    const group = kind ? `&${kind}=${encodeURIComponent(name.join(":"))}` : "";
    this.asked = `${window}${group}`;
    const asked = this.asked;
    try {
      const [told, stats] = await Promise.all([api(`dashboard/series?window=${window}${group}`), api("stats")]);
      if (asked !== this.asked) return;
      this.offer(told);
      replace(byId("tiles"), tiles(told, stats));
      for (const chart of this.charts) chart.show(told);
      this.drawProviders(told.providers, stats.providers);
      this.drawModels(told.models);
    } catch (error) {
      console.warn("the numbers could not be read:", error.message);
    }
  }

  offer(told) {
    const names = { provider: told.providers, model: told.models };
    const key = JSON.stringify(Object.values(names).map((groups) => groups.map((group) => group.name)));
    if (this.offered === key) return;
    this.offered = key;
    const chosen = this.group.value;
    const option = (kind, name) => el("option", { value: `${kind}:${name}` }, name);
    replace(this.group, el("option", { value: "" }, "Everything"),
      Object.entries(names).filter(([, groups]) => groups.length).map(([kind, groups]) =>
        el("optgroup", { label: kind === "provider" ? "Providers" : "Models" }, groups.map(({ name }) => option(kind, name)))));
    if (chosen && ![...this.group.options].some((o) => o.value === chosen)) {
      const [kind, ...name] = chosen.split(":");
      this.group.append(option(kind, name.join(":")));
    }
    this.group.value = chosen;
  }

  choose(kind, name) {
    const value = `${kind}:${name}`;
    if (![...this.group.options].some((o) => o.value === value)) this.group.append(el("option", { value }, name));
    this.group.value = this.group.value === value ? "" : value;
    this.refresh();
  }

  drawProviders(groups, providers) {
    const measured = new Map(groups.map((group) => [group.name, group]));
    const names = [...new Set([...Object.keys(providers), ...measured.keys()])];
    const rows = names.map((name) => {
      const state = providers[name];
      const [word, why] = STATES[state?.breaker] ?? ["", ""];
      return this.row("provider", name, measured.get(name), [
        el("td", {}, state ? el(`span.state.is-${word}`, { title: why }, word) : "–"),
      ], state && `${count(state.models.length)} model${state.models.length === 1 ? "" : "s"}`);
    });
    table(byId("providers"), ["Provider", "State", ...COLUMNS], rows, "No providers are configured.");
  }

  drawModels(groups) {
    const rows = groups.map((group) => this.row("model", group.name, group, []));
    table(byId("models"), ["Model", ...COLUMNS], rows, "No requests in this time span.");
  }

  row(kind, name, group, cells, note) {
    const chosen = this.group.value === `${kind}:${name}`;
    const button = el("button.quiet.name", { type: "button", "aria-pressed": String(chosen), onclick: () => this.choose(kind, name) }, name);
    return el("tr", {}, el("th", { scope: "row" }, button, note ? el("span.note", {}, note) : null), cells,
      [count(group?.requests ?? 0), percent(group?.error_rate), duration(group?.latency_ms.p50), duration(group?.latency_ms.p95),
        duration(group?.ttft_ms.p50), brief(group?.input_tokens ?? 0), brief(group?.output_tokens ?? 0), money(group?.cost ?? 0)]
        .map((text) => el("td", {}, text)));
  }
}

const COLUMNS = ["Requests", "Failed", "Latency p50", "p95", "First token p50", "Tokens in", "out", "Cost"];

function table(node, columns, rows, nothing) {
  const focused = node.contains(document.activeElement) ? document.activeElement.textContent : null;
  replace(node,
    el("thead", {}, el("tr", {}, columns.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, rows.length ? rows : el("tr", {}, el("td", { colspan: columns.length }, nothing))));
  if (focused !== null) [...node.querySelectorAll("button")].find((button) => button.textContent === focused)?.focus();
}

function tiles({ summary, window }, stats) {
  const span = `last ${SPANS[window]}`;
  return [
    ["In flight", count(stats.in_flight), "right now"],
    ["Requests", perSecond(summary.requests_per_s), `${count(summary.requests)} in the ${span}`],
    ["Failed", percent(summary.error_rate ?? 0), `${count(summary.failed)} in the ${span}`],
    ["Latency", duration(summary.latency_ms.p50), `p95 ${duration(summary.latency_ms.p95)}`],
    ["First token", duration(summary.ttft_ms.p50), `p95 ${duration(summary.ttft_ms.p95)}`],
    ["Cost", money(summary.cost), `${brief(summary.input_tokens + summary.output_tokens)} tokens`],
  ].map(([name, value, note]) => el("div.tile", {}, el("dt", {}, name), el("dd", {}, el("b", {}, value), el("span.note", {}, note))));
}

