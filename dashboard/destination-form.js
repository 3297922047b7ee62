// The form of one destination: its fields with help, what it gets, a connection test, and Save, which only works after the
// test passed with exactly what stands in the form.

import { typeOf } from "./destination-types.js";
import { count, duration, el, replace, setText } from "./dom.js";
import { FilterRules } from "./filter-rules.js";
import { api } from "./net.js";

let numbered = 0;

export class DestinationForm {
  // `stored` is the destination to edit, null for a new one; `onDone` is called with a message, or null when cancelled.
  constructor(type, stored, keyNames, onDone) {
    Object.assign(this, { type: typeOf(type), stored, onDone, passed: null, fields: new Map() });
    const given = stored ?? { config: {}, enabled: true, privacy_mode: false, sampling_rate: 1, api_keys: null, filter_rules: null };
    this.name = this.input("name", { label: "Name", placeholder: type, help: "What this page and the counters call it. Empty: its type." }, given.name);
    const own = this.type.fields.map((field) => this.own(field, given.config[field.key]));
    this.enabled = checkbox(given.enabled);
    this.privacy = checkbox(given.privacy_mode);
    this.sampling = this.input("sampling_rate", {
      label: "Sampling, in % of sessions", help: "From 0.01 to 100. A session is always sent as a whole or not at all.",
    }, String(Number((given.sampling_rate * 100).toPrecision(6))), { type: "number", min: 0.01, max: 100, step: "any", required: true });
    this.keys = this.input("api_keys", {
      label: "Only requests made with these keys", placeholder: "all keys",
      help: `Names of [[api_keys]], separated by commas${keyNames.length ? `; seen so far: ${keyNames.join(", ")}` : ""}. Empty: every request.`,
    }, (given.api_keys ?? []).join(", "));
    this.rules = new FilterRules(given.filter_rules, () => this.changed());
    this.test = el("button", { type: "button", onclick: () => this.tryOut() }, "Test connection");
    this.save = el("button.primary", { type: "submit", disabled: true }, "Save");
    this.hint = el("p.note", { id: "save-hint" });
    this.save.setAttribute("aria-describedby", "save-hint");
    this.result = el("div", { role: "status" });
    this.title = el("h2", { tabindex: -1 }, stored ? `Edit ${stored.name}` : `New destination: ${this.type.title}`);
    this.node = this.lay(own);
    this.node.addEventListener("input", () => this.changed());
    this.node.addEventListener("change", () => this.changed());
    this.node.addEventListener("submit", (event) => {
      event.preventDefault();
      this.store();
    });
    this.changed();
  }

  lay(own) {
    return el("form.panel.form", { autocomplete: "off", novalidate: true },
      this.title, el("p.note", {}, this.type.what),
      this.name, own,
      el("label.check", {}, this.enabled, el("span", {}, "Enabled", el("span.note", {}, " – it gets requests as soon as Broadcast is on"))),
      el("label.check", {}, this.privacy, el("span", {}, "Privacy mode",
        el("span.note", {}, " – no prompt, answer or tool argument ever goes there; tokens, cost, timing and metadata still do"))),
      this.sampling, this.keys,
      el("fieldset.field", {}, el("legend", {}, "Filter"), this.rules.node),
      this.result,
      el("div.actions", {}, this.test, this.save, el("button.quiet", { type: "button", onclick: () => this.onDone(null) }, "Cancel"), this.hint));
  }

  // fields
  own(field, value) {
    if (field.kind === "headers") return this.headers(field, value ?? {});
    return this.input(`config.${field.key}`, field, value ?? field.options?.[0] ?? "", field.required ? { required: true } : {});
  }

  // A labelled input with its help and room for what is wrong with it; found again by the API's name for it.
  input(param, { label, help, placeholder, secret, options, kind, digits }, value = "", more = {}) {
    const id = `field-${(numbered += 1)}`;
    const shown = secret && !String(value).includes("…") ? "password" : "text";
    const control = options
      ? el("select", { id }, options.map((option) => el("option", {}, option)))
      : el("input", { id, type: shown, placeholder, maxlength: 8000, spellcheck: "false", autocomplete: secret ? "new-password" : "off",
          inputmode: kind === "url" ? "url" : digits ? "numeric" : null, ...more });
    control.value = value;
    if (secret) control.addEventListener("input", () => (control.type = control.value.includes("…") ? "text" : "password"));
    const error = el("span.field-error", { id: `${id}-error`, role: "alert" });
    control.setAttribute("aria-describedby", `${id}-help ${id}-error`);
    this.fields.set(param, { control, error });
    return el("div.field", {}, el("div", {}, el("label", { for: id }, label), more.required ? el("span.note", {}, " (required)") : null),
      control, help ? el("span.note", { id: `${id}-help` }, help) : null, error);
  }

  headers({ label, help }, given) {
    const list = el("div.rules");
    const add = (name = "", value = "") => {
      const row = el("div.pair", {}, el("input", { "aria-label": "Header name", placeholder: "Authorization", spellcheck: "false", value: name }),
        el("input", { "aria-label": "Header value", placeholder: "Bearer …", spellcheck: "false", autocomplete: "off", value }),
        el("button.quiet", { type: "button", "aria-label": "Remove this header", onclick: () => { row.remove(); this.changed(); } }, "✕"));
      list.append(row);
      return row;
    };
    for (const [name, value] of Object.entries(given)) add(name, value);
    // Guides give headers as a JSON object: pasted into any of the fields, it becomes a row for each.
    list.addEventListener("paste", (event) => {
      const pasted = headersIn(event.clipboardData.getData("text"));
      if (!pasted) return;
      event.preventDefault();
      const row = event.target.closest(".pair");
      if ([...row.querySelectorAll("input")].every((input) => !input.value)) row.remove();
      for (const [name, value] of pasted) add(name, value).querySelector("input").focus();
      this.changed();
    });
    const error = el("span.field-error", { role: "alert" });
    this.fields.set("config.headers", { control: list, error });
    this.readHeaders = () => Object.fromEntries([...list.children].map((row) => [...row.querySelectorAll("input")].map((input) => input.value.trim()))
      .filter(([name]) => name));
    return el("fieldset.field", {}, el("legend", {}, label), list,
      el("div", {}, el("button", { type: "button", onclick: () => add().querySelector("input").focus() }, "Add a header")),
      el("span.note", {}, help), error);
  }

  value(param) {
    return this.fields.get(param).control.value.trim();
  }

  draft() {
    const config = {};
    for (const { key, kind } of this.type.fields) {
      const value = kind === "headers" ? this.readHeaders() : this.value(`config.${key}`);
      if (kind === "headers" ? Object.keys(value).length : value) config[key] = value;
    }
    const keys = this.value("api_keys").split(",").map((name) => name.trim()).filter(Boolean);
    const name = this.value("name");
    return {
      ...(name || this.stored ? { name } : {}), type: this.type.type, enabled: this.enabled.checked, config,
      privacy_mode: this.privacy.checked, sampling_rate: Number((Number(this.value("sampling_rate")) / 100).toPrecision(6)),
      api_keys: keys.length ? keys : null, filter_rules: this.rules.read(),
    };
  }

  changed() {
    if (!this.save) return;
    const same = this.passed === JSON.stringify(this.draft());
    this.save.disabled = !same;
    setText(this.hint, same ? "" : this.passed ? "Changed since the test: test again before you save." : "Save works once the connection test has passed.");
    for (const { control, error } of this.fields.values()) {
      control.removeAttribute("aria-invalid");
      setText(error, "");
    }
  }

  // the test, and what follows from it
  async tryOut() {
    const draft = this.draft();
    const about = this.stored ? { id: this.stored.id } : {};
    this.test.disabled = true;
    setText(this.test, "Testing…");
    this.passed = null;
    this.changed();
    try {
      const told = await api("observability/destinations/test", { method: "POST", body: { ...draft, ...about } });
      this.passed = told.ok ? JSON.stringify(draft) : null;
      this.changed();
      this.tell(told);
    } catch (error) {
      this.complain(error);
    }
    this.test.disabled = false;
    setText(this.test, "Test connection");
  }

  async store() {
    if (this.save.disabled) return;
    this.save.disabled = true;
    try {
      const [path, method] = this.stored ? [`/${this.stored.id}`, "PUT"] : ["", "POST"];
      const told = await api(`observability/destinations${path}`, { method, body: this.draft() });
      this.onDone(`${told.name} is saved.`);
    } catch (error) {
      this.passed = null;
      this.changed();
      this.complain(error);
    }
  }

  tell(told) {
    replace(this.result, testResult(told));
  }

  complain(error) {
    if (error.body && "advice" in error.body) return this.tell(error.body);
    replace(this.result, el("p.notice.bad", {}, error.message));
    const field = this.fields.get(error.param?.split(".").slice(0, 2).join("."));
    if (!field) return undefined;
    setText(field.error, error.message);
    field.control.setAttribute("aria-invalid", "true");
    return field.control.focus?.();
  }
}

// The [name, value] pairs of a JSON object of texts, null for any other text.
function headersIn(text) {
  try {
    const given = JSON.parse(text);
    const pairs = given && typeof given === "object" && !Array.isArray(given) ? Object.entries(given) : [];
    return pairs.length && pairs.every(([, value]) => typeof value === "string") ? pairs : null;
  } catch {
    return null;
  }
}

function checkbox(checked) {
  const box = el("input", { type: "checkbox" });
  box.checked = checked;
  return box;
}

// {ok, status, latency_ms, message, advice} as a notice.
export function testResult({ ok, status, latency_ms: latency, message, advice }) {
  const numbers = [status ? `status ${count(status)}` : null, latency ? duration(latency) : null].filter(Boolean).join(", ");
  return el(`div.notice.${ok ? "good" : "bad"}`, {},
    el("p", {}, el("b", {}, ok ? "The connection works" : "The connection test failed"), numbers ? ` (${numbers})` : "", message ? `: ${message}` : ""),
    advice ? el("p", {}, advice) : null);
}
