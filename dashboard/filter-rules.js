// The editor of filter rules: groups are alternatives, a group holds conditions joined by and or or.

import { el } from "./dom.js";

const TEXTS = {
  model: "Model", provider: "Provider", session_id: "Session", user_id: "User", api_key_name: "API key", finish_reason: "Finish reason",
  input: "Input text", output: "Output text",
};
const NUMBERS = { total_cost: "Cost, USD", total_tokens: "Tokens in all", prompt_tokens: "Tokens in", completion_tokens: "Tokens out" };
const OF_ANY = { equals: "is", not_equals: "is not", exists: "is there", not_exists: "is missing" };
const OF_TEXTS = {
  contains: "contains", not_contains: "does not contain", starts_with: "begins with", ends_with: "ends with", regex: "matches regex",
};
const OF_NUMBERS = { gt: ">", gte: "≥", lt: "<", lte: "≤" };
const VALUELESS = new Set(["exists", "not_exists"]);

const choice = (label, options, value) => {
  const select = el("select", { "aria-label": label }, Object.entries(options).map(([key, text]) => el("option", { value: key }, text)));
  if (value in options) select.value = value;
  return select;
};

export class FilterRules {
  constructor(rules, onChange) {
    this.onChange = onChange;
    this.switch = el("input", { type: "checkbox" });
    this.switch.checked = Boolean(rules?.groups?.length) && rules.enabled !== false;
    this.groups = el("div.rules");
    this.add = el("button", { type: "button", onclick: () => this.addGroup({ rules: [{}] }, true) }, "Add an alternative");
    this.body = el("div.rules", {}, this.groups, el("div", {}, this.add));
    this.node = el("div.rules", {},
      el("label.check", {}, this.switch, el("span", {}, "Only requests that pass these conditions")), this.body);
    for (const group of rules?.groups ?? []) this.addGroup(group);
    this.switch.addEventListener("change", () => {
      if (this.switch.checked && !this.groups.children.length) this.addGroup({ rules: [{}] }, true);
      this.changed();
    });
    this.body.hidden = !this.switch.checked;
  }

  changed() {
    this.body.hidden = !this.switch.checked;
    this.onChange();
  }

  addGroup(group, focus = false) {
    const logic = choice("How the conditions are joined", { and: "All of these", or: "Any of these" }, group.logic);
    const list = el("div.rules");
    const node = el("fieldset.alternative", {},
      el("legend.sr", {}, "Alternative"),
      el("div.title-row", {}, el("label", {}, logic), el("div.actions", {},
        el("button.quiet", { type: "button", onclick: () => this.addRule(list, {}, true) }, "Add a condition"),
        el("button.quiet", { type: "button", onclick: () => { node.remove(); this.changed(); } }, "Remove"))),
      list);
    node.read = () => ({ logic: logic.value, rules: [...list.children].map((row) => row.read()) });
    for (const rule of group.rules ?? []) this.addRule(list, rule);
    this.groups.append(node);
    if (focus) node.querySelector(".rule select").focus();
    this.changed();
  }

  addRule(list, rule, focus = false) {
    const field = choice("Field", { ...TEXTS, ...NUMBERS }, rule.field);
    const value = el("input", { "aria-label": "Value", maxlength: 1000, value: rule.value ?? "" });
    let operator = null;
    const row = el("div.rule", {}, field, value,
      el("button.quiet", { type: "button", "aria-label": "Remove this condition", onclick: () => { row.remove(); this.changed(); } }, "✕"));
    const offer = (chosen) => {
      const fitting = choice("Comparison", { ...OF_ANY, ...(field.value in NUMBERS ? OF_NUMBERS : OF_TEXTS) }, chosen);
      operator?.remove();
      operator = fitting;
      field.after(operator);
      settle();
    };
    const settle = () => {
      value.hidden = VALUELESS.has(operator.value);
      value.inputMode = operator.value in OF_NUMBERS ? "decimal" : "text";
    };
    field.addEventListener("change", () => offer(operator.value));
    row.addEventListener("change", settle);
    row.read = () => ({
      field: field.value, operator: operator.value,
      ...(VALUELESS.has(operator.value) ? {} : { value: operator.value in OF_NUMBERS && value.value.trim() !== "" ? Number(value.value) : value.value }),
    });
    offer(rule.operator);
    list.append(row);
    if (focus) field.focus();
    this.onChange();
  }

  // As the API takes it; null where nothing is filtered.
  read() {
    const groups = [...this.groups.children].map((group) => group.read()).filter((group) => group.rules.length);
    return groups.length ? { enabled: this.switch.checked, groups } : null;
  }
}
