// The waterfall: every span of one request as a bar on the request's own clock, its attributes at a click.

import { count, duration, el, keepReachable, roveFocus } from "./dom.js";

const STYLES = [
  ["model.", "model"], ["provider.http", "http"], ["provider.", "send"], ["dispatch_stream.body", "body"], ["dispatch", "dispatch"],
];

export function waterfall(spans, record) {
  const total = Math.max(...spans.map((span) => span.offset_ms + span.duration_ms), 0.001);
  const rows = inOrder(spans).map(([span, depth]) => spanRow(span, depth, total));
  const list = el("ol.spans", { "aria-label": `${spans.length} spans of ${duration(total)}` }, rows);
  const first = record.ttft_ms;
  if (first !== null && first < total) list.append(marker(first, total));
  roveFocus(list, ".span");
  keepReachable(list, ".span");
  return el("div.waterfall", {}, axis(total), list);
}

// Parents before their children, children by their time.
function inOrder(spans) {
  const ids = new Set(spans.map((span) => span.span_id));
  const below = new Map();
  for (const span of spans) {
    const parent = ids.has(span.parent_span_id) ? span.parent_span_id : null;
    below.set(parent, [...(below.get(parent) ?? []), span]);
  }
  const walk = (parent, depth) => (below.get(parent) ?? [])
    .sort((a, b) => a.offset_ms - b.offset_ms)
    .flatMap((span) => [[span, depth], ...(depth < 50 ? walk(span.span_id, depth + 1) : [])]);
  return walk(null, 0);
}

function axis(total) {
  const marks = [0, 0.25, 0.5, 0.75, 1].map((share) => {
    const mark = el("span", {}, duration(share * total));
    mark.style.left = `${share * 100}%`;
    return mark;
  });
  return el("div.axis", { "aria-hidden": "true" }, el("div.marks", {}, marks));
}

function marker(first, total) {
  const line = el("span.first-token", {});
  line.style.left = `${(first / total) * 100}%`;
  const label = el("span", {}, `first token ${duration(first)}`);
  if (first / total > 0.6) label.className = "left";
  line.append(label);
  return el("li.markers", { "aria-label": `First token after ${duration(first)}` }, line);
}

function spanRow(span, depth, total) {
  const bar = el(`span.bar.${styleOf(span)}`);
  bar.style.left = `${(span.offset_ms / total) * 100}%`;
  bar.style.width = `${(span.duration_ms / total) * 100}%`;
  const name = el("span.span-name", {}, span.name);
  name.style.setProperty("--depth", depth);
  const failed = span.status === "error";
  const button = el("button.span", { type: "button", tabindex: -1, "aria-expanded": "false" },
    name, el("span.lane", { "aria-hidden": "true" }, bar),
    el("span.length", {}, failed ? el("span.failed", {}, "failed ") : null, duration(span.duration_ms),
      el("span.sr", {}, `, begins at ${duration(span.offset_ms)}`)));
  const item = el("li", {}, button);
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open));
    if (open) item.querySelector(".attributes").remove();
    else item.append(attributes(span));
  });
  return item;
}

function styleOf(span) {
  if (span.status === "error") return "error";
  return STYLES.find(([start]) => span.name.startsWith(start))?.[1] ?? "request";
}

function attributes(span) {
  const told = [
    ["begins at", duration(span.offset_ms)], ["length", duration(span.duration_ms)], ["kind", span.kind],
    span.status ? ["status", [span.status, span.status_message].filter(Boolean).join(": ")] : null,
    ...Object.entries(span.attributes),
    ...(span.events ?? []).flatMap((event) => Object.entries(event.attributes).map(([key, value]) => [`${event.name}: ${key}`, value])),
    ["span id", span.span_id],
  ].filter(Boolean);
  return el("dl.attributes", {}, told.map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, shown(value)))));
}

export function shown(value) {
  if (typeof value === "string") return value;
  if (typeof value === "number") return Number.isInteger(value) ? count(value) : String(value);
  return Array.isArray(value) && value.every((item) => typeof item === "string") ? value.join(", ") : JSON.stringify(value);
}
