// One request: how it ended, its waterfall, what was tried, what was said.

import { conversation } from "./conversation.js";
import { byId, clock, copyButton, count, duration, el, moment, money, outerLink, replace } from "./dom.js";
import { api } from "./net.js";
import { waterfall } from "./waterfall.js";

let wanted = null;

export async function showDetail(node, id, onClose) {
  wanted = id;
  const told = await api(`dashboard/requests/${id}`).catch((error) => ({ error }));
  if (wanted !== id || node.hidden) return;
  if (told.error) replace(node, gone(told.error, onClose));
  else if (told.record) replace(node, detail(told, onClose));
  else {
    replace(node, running(told.state, onClose));
    setTimeout(() => wanted === id && !node.hidden && showDetail(node, id, onClose), 1000);
    return;
  }
  node.scrollTop = 0;
  byId("detail-title").focus({ preventScroll: true });
  if (matchMedia("(max-width: 60rem)").matches) scrollTo(0, 0);
}

function head(title, onClose, ...more) {
  return el("div.side-head", {},
    el("button.quiet.back", { type: "button", onclick: onClose }, "Back"),
    el("h2", { id: "detail-title", tabindex: -1 }, title), more);
}

function gone(error, onClose) {
  const text = error.status === 404 ? "It is no longer held: the page keeps the last 500 requests." : error.message;
  return [head("This request cannot be shown", onClose), el("p.empty", {}, text)];
}

function running(state, onClose) {
  return [
    head(state.sent_model ?? state.requested_model ?? "A request", onClose, el("span.outcome.is-running", {}, "running")),
    el("p.empty", {}, `Still in flight since ${clock(state.ts_ms)}${state.provider ? `, at ${state.provider}` : ""}. Its waterfall appears when it ends.`),
  ];
}

function detail({ record, spans, trace_url: traceUrl }, onClose) {
  return [
    head(record.sent_model ?? record.requested_model ?? "Request", onClose, el(`span.outcome.is-${record.outcome}`, {}, record.outcome)),
    el("div.actions", {},
      el("code", {}, record.generation_id), copyButton(record.generation_id, "Copy id"),
      record.trace_id && copyButton(record.trace_id, "Copy trace id"),
      traceUrl && outerLink(traceUrl, "Open trace", { title: record.trace_id })),
    record.error && el("p.notice.bad", {}, el("b", {}, record.error_type ?? "error"), " ", record.error),
    facts(record),
    section("Waterfall", waterfall(spans, record)),
    section("Attempts", record.attempts.length ? attempts(record) : el("p.note", {}, "No provider was asked.")),
    section("Conversation", conversation(record)),
    folded("Headers of the answer", pairs(headers(record))),
    folded("Request parameters", json(record.request)),
    record.tools.length > 0 && folded(`Tools (${record.tools.length})`, record.tools.map(tool)),
    Object.keys(record.trace).length > 0 && folded("Trace metadata", json(record.trace)),
    folded("The whole record", json(record)),
  ];
}

const section = (title, ...children) => el("section", {}, el("h3", {}, title), children);

function folded(title, ...children) {
  return el("details.folded", {}, el("summary", {}, title), children);
}

function json(value) {
  const text = JSON.stringify(value, null, 2);
  return [el("pre", { tabindex: 0 }, text), copyButton(text)];
}

const tool = ({ name, description, parameters }) =>
  el("details", {}, el("summary", {}, el("code", {}, name)), description && el("p", {}, description), el("pre", { tabindex: 0 }, JSON.stringify(parameters, null, 2)));

function pairs(told) {
  return el("dl.attributes", {}, told.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, String(value)))));
}

function facts(record) {
  const usage = record.usage_source === "none" ? {} : record.response?.usage ?? {};
  const part = (n, name) => (n ? `${count(n)} ${name}` : null);
  const tokens = usage.input_tokens === undefined ? null : [
    `${count(usage.input_tokens)} in`, part(usage.cached_input_tokens, "cached"), part(usage.cache_write_input_tokens, "written to the cache"),
    `${count(usage.output_tokens)} out`, part(usage.reasoning_tokens, "reasoning"), record.usage_source === "estimated" ? "estimated" : null,
  ].filter(Boolean).join(", ");
  const told = [
    ["Duration", duration(record.duration_ms)],
    ["First token", record.ttft_ms === null ? null : duration(record.ttft_ms)],
    ["Router's own share", duration(record.overhead_ms)],
    ["Status", `${record.status}${record.stream ? ", streamed" : ""}`],
    ["Tokens", tokens],
    ["Cost", cost(record.cost)],
    ["Provider", record.provider && `${record.provider}${record.provider_format ? ` (${record.provider_format})` : ""}`],
    ["Model", record.sent_model === record.requested_model ? record.sent_model : `${record.requested_model} → ${record.sent_model ?? "none"}`],
    ["Rule", record.rule],
    ["Reason", record.reason],
    ["Finish", record.response?.finish_reason ?? record.response?.stop_reason],
    ["Accepted", moment(record.ts_ms)],
    ["Asked as", `${record.method} ${record.route} (${record.client_format})`],
    ["Client", [record.client_address, record.api_key_name && `key ${record.api_key_name}`].filter(Boolean).join(", ")],
    ["User", record.user],
    ["Session", record.session_id],
    ["Tags", [...record.tags, ...(record.response?.tags ?? [])].join(", ")],
    ["Plugins", [...record.plugins, ...record.skipped_plugins.map((id) => `${id} (skipped)`)].join(", ")],
    ["Dropped fields", record.dropped.join(", ")],
  ];
  return el("dl.facts", {}, told.filter(([, value]) => value).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

function cost(told) {
  if (!told) return null;
  if (!told.total) return money(0);
  const price = (unit) => (unit === null ? "" : ` at ${money(unit * 1e6)}/M`);
  return [money(told.total), el("p.note", {}, `${money(told.input)} in${price(told.input_unit_price)}, ${money(told.output)} out${price(told.output_unit_price)}`)];
}

function attempts(record) {
  const columns = ["#", "Provider", "Model", "Status", "Begins at", "Duration", "First token", "Upstream's id"];
  const rows = record.attempts.map((attempt) => [
    el("tr", {},
      el("th", { scope: "row" }, String(attempt.attempt)), [attempt.provider, attempt.model, attempt.status === null ? "none" : String(attempt.status),
        duration(attempt.start_ms), duration(attempt.duration_ms), duration(attempt.first_token_ms), attempt.request_id ?? "–"].map((text) => el("td", {}, text))),
    attempt.error && el("tr.why", {}, el("td", { colspan: columns.length }, el("b", {}, attempt.error_type ?? "error"), " ", attempt.error)),
  ]);
  return el("div.scroll", { tabindex: 0, role: "region", "aria-label": "Attempts" },
    el("table", {}, el("thead", {}, el("tr", {}, columns.map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, rows.flat().filter(Boolean))));
}

// What the client was told in headers, and what it had told in its own.
function headers(record) {
  const usage = record.response?.usage;
  const whole = !record.stream && usage;
  return [
    ["X-Router-Provider", record.provider], ["X-Router-Model", record.sent_model], ["X-Router-Rule", record.rule],
    ["X-Router-Request-Tags", record.tags.join(",")], ["X-Router-Response-Tags", record.stream ? "" : record.response?.tags.join(",")],
    ["X-Generation-Id", record.generation_id], ["X-Router-Trace-Id", record.trace_id],
    ["X-Router-Input-Tokens", whole && usage.input_tokens], ["X-Router-Output-Tokens", whole && usage.output_tokens],
    ["traceparent (from the client)", record.traceparent], ["tracestate (from the client)", record.tracestate],
  ].filter(([, value]) => value !== false);
}
