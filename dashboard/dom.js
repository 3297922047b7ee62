// Making elements, and writing numbers with their units. Every value becomes a text node or an attribute; nothing that was
// received is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

// el("p.note", {hidden: true}, "text", child): a tag with classes, attributes (or on… listeners), and what is in it.
export function el(spec, attributes = {}, ...children) {
  const [tag, ...classes] = spec.split(".");
  return fill(document.createElement(tag), classes, attributes, children);
}

export function svg(spec, attributes = {}, ...children) {
  const [tag, ...classes] = spec.split(".");
  return fill(document.createElementNS(SVG, tag), classes, attributes, children);
}

function fill(node, classes, attributes, children) {
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "value") node.value = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const byId = (id) => document.getElementById(id);

export function replace(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
}

// Sets a text only where it changed, so that a screen reader and the browser have nothing to do otherwise.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// A link to another place, if it is a web address; else only its text.
export function outerLink(url, text, attributes = {}) {
  if (!/^https?:\/\//.test(url)) return el("span", {}, text);
  return el("a.button", { ...attributes, href: url, target: "_blank", rel: "noopener noreferrer" }, text);
}

export function copyButton(text, label = "Copy") {
  const button = el("button.quiet", { type: "button" }, label);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed by the browser";
    }
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}

// Opens a dialog with a question; resolves to true if it is answered by its action.
export function confirmed(question, explanation, action) {
  const dialog = el("dialog", { "aria-labelledby": "question" },
    el("form", { method: "dialog" },
      el("h2", { id: "question" }, question),
      el("p", {}, explanation),
      el("div.actions", {},
        el("button", { value: "", autofocus: true }, "Cancel"),
        el("button.danger", { value: "yes" }, action))));
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
  });
}

// Arrow keys move the focus among the items of a list; one of them is in the tab order at a time.
export function roveFocus(list, selector) {
  const steps = { ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  list.addEventListener("keydown", (event) => {
    if (!(event.key in steps) || !event.target.matches(selector)) return;
    const items = [...list.querySelectorAll(selector)];
    const to = Math.min(items.length - 1, Math.max(0, items.indexOf(event.target) + steps[event.key]));
    event.preventDefault();
    items[to].focus();
  });
  list.addEventListener("focusin", (event) => {
    if (!event.target.matches(selector)) return;
    for (const item of list.querySelectorAll(`${selector}[tabindex="0"]`)) item.tabIndex = -1;
    event.target.tabIndex = 0;
  });
}

// Exactly one item must be reachable with the Tab key, also after the list changed.
export function keepReachable(list, selector) {
  if (list.querySelector(`${selector}[tabindex="0"]`)) return;
  const first = list.querySelector(selector);
  if (first) first.tabIndex = 0;
}

const grouped = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const three = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const known = (value) => typeof value === "number" && Number.isFinite(value);
const NONE = "–";

export const count = (value) => (known(value) ? grouped.format(value) : NONE);
export const brief = (value) => (known(value) ? compact.format(value) : NONE);
export const percent = (share) => (known(share) ? `${three.format(share * 100)} %` : NONE);
export const perSecond = (value, unit = "/s") => (known(value) ? `${compact.format(value)} ${unit}`.replace(" /", "/") : NONE);

export function duration(ms) {
  if (!known(ms)) return NONE;
  if (ms < 1000) return `${ms < 10 ? Math.round(ms * 10) / 10 : Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
  return `${Math.floor(ms / 60_000)} min ${Math.round((ms % 60_000) / 1000)} s`;
}

export function money(dollars) {
  if (!known(dollars)) return NONE;
  if (dollars === 0) return "$0";
  return dollars >= 1 ? `$${dollars.toFixed(2)}` : `$${dollars.toLocaleString("en", { maximumSignificantDigits: 3, maximumFractionDigits: 20 })}`;
}

export const clock = (ms) => (known(ms) ? new Date(ms).toLocaleTimeString("en-GB") : NONE);
export const moment = (ms) => (known(ms) ? new Date(ms).toLocaleString("en-GB") : NONE);

export function ago(time) {
  const ms = typeof time === "string" ? Date.parse(time) : time;
  if (!known(ms)) return "never";
  const seconds = Math.max(0, Math.round((Date.now() - ms) / 1000));
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 86_400 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86_400)} d ago`;
}
