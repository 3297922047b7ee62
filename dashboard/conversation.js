// What was said: the system prompt, the messages block by block, and the answer.

import { count, el } from "./dom.js";

const LONG = 4000;
const IMAGES = new Set(["image/png", "image/jpeg", "image/gif", "image/webp"]);

export function conversation(record) {
  if (record.content_held === false) {
    return el("p.note", {}, "What was said is no longer held. Older and very large requests keep only their numbers.");
  }
  const turns = record.messages.map((message) => turn(message.role, blocks(message.content)));
  const system = record.system ? [turn("system", text(record.system))] : [];
  return el("ol.turns", {}, system, turns, answer(record));
}

function answer({ response, outcome }) {
  if (!response) return turn("answer", el("p.note", {}, `There was no answer: ${outcome}.`));
  const said = [
    response.reasoning && folded("Reasoning", text(response.reasoning)),
    response.content && text(response.content),
    ...response.tool_calls.map((call) => toolCall(call.name, call.arguments)),
    outcome !== "ok" && el("p.note", {}, `The answer broke off here: ${outcome}.`),
  ].filter(Boolean);
  return turn("answer", said.length ? said : el("p.note", {}, "The answer is empty."));
}

const turn = (role, children) => el(`li.turn.is-${["user", "assistant", "system", "tool", "answer"].includes(role) ? role : "other"}`, {},
  el("h4", {}, role), children);

const folded = (title, children) => el("details", {}, el("summary", {}, title), children);

function text(value) {
  const shown = String(value);
  if (shown.length <= LONG) return el("p.said", {}, shown);
  const paragraph = el("p.said", {}, `${shown.slice(0, LONG)}…`);
  const button = el("button.quiet", { type: "button" }, `Show all ${count(shown.length)} characters`);
  button.addEventListener("click", () => {
    paragraph.textContent = shown;
    button.remove();
  });
  return [paragraph, button];
}

function blocks(content) {
  if (typeof content === "string") return text(content);
  return (Array.isArray(content) ? content : [content]).map((block) => (KINDS[block?.type] ?? unknown)(block));
}

const KINDS = {
  text: (block) => text(block.text ?? ""),
  thinking: (block) => folded("Thinking", text(block.thinking ?? "")),
  redacted_thinking: () => el("p.note", {}, "Thinking that the provider does not show"),
  tool_use: (block) => toolCall(block.name, block.input),
  tool_result: (block) => el("div.tool", {}, el("p.note", {}, `${block.is_error ? "Error" : "Result"} of ${block.tool_use_id ?? "a tool"}`), blocks(block.content ?? "")),
  image,
};

function image(block) {
  if (!IMAGES.has(block.media_type) || typeof block.data !== "string") return el("p.note", {}, `An image at ${block.url ?? "an unknown place"}, which this page does not load`);
  if (!/^[A-Za-z0-9+/=\s]+$/.test(block.data)) return el("p.note", {}, `An image (${block.media_type}) that was too large to be kept`);
  return el("img", { src: `data:${block.media_type};base64,${block.data}`, alt: `Image in the message (${block.media_type})` });
}

function toolCall(name, given) {
  return el("div.tool", {}, el("p.note", {}, "Calls ", el("code", {}, String(name))), el("pre", { tabindex: 0 }, pretty(given)));
}

function pretty(given) {
  if (typeof given !== "string") return JSON.stringify(given, null, 2) ?? "";
  try {
    return JSON.stringify(JSON.parse(given), null, 2);
  } catch {
    return given;
  }
}

const unknown = (block) => el("pre", { tabindex: 0 }, JSON.stringify(block, null, 2) ?? "");
