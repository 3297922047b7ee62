// Charts over time, drawn as SVG: lines, areas or bars, a legend whose numbers follow the pointer, and the same as a table.

import { clock, el, replace, setText, svg } from "./dom.js";

const HEIGHT = 132;
const EDGE = { left: 52, right: 6, top: 8, bottom: 20 };

// `lines` are {name, style, value(told), course(told)}: a style is a class of the style sheet.
export class Chart {
  constructor({ title, format, kind, lines }) {
    Object.assign(this, { title, format, kind, lines });
    this.values = lines.map(() => el("b", {}));
    this.when = el("span.note");
    this.plot = svg("svg", { role: "img", height: HEIGHT, width: "100%" });
    this.table = el("table");
    this.details = el("details", { ontoggle: () => this.drawTable() }, el("summary", {}, "Table"),
      el("div.scroll", { tabindex: 0, role: "region", "aria-label": `${title}, as a table` }, this.table));
    this.node = el("figure.chart", {},
      el("figcaption", {}, el("h3", {}, title), this.when),
      el("ul.legend", {}, lines.map((line, i) => el("li", {}, el(`span.swatch.${line.style}`), line.name, " ", this.values[i]))),
      this.plot, this.details);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.summarise());
    new ResizeObserver(() => this.told && this.draw()).observe(this.plot);
  }

  show(told) {
    this.told = told;
    this.courses = this.lines.map((line) => line.course(told));
    this.draw();
    this.drawTable();
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width) return;
    this.width = width;
    const known = this.courses.flat().filter((value) => value !== null);
    const ticks = niceTicks(Math.max(0, ...known));
    this.top = ticks.at(-1);
    const some = known.some((value) => value > 0);
    this.cursor = svg("line.cursor", { y1: EDGE.top, y2: HEIGHT - EDGE.bottom, visibility: "hidden" });
    replace(this.plot, this.grid(some ? ticks : [0]), some ? this.shapes() : this.nothing(), this.cursor);
    this.plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.summarise();
  }

  x(i) {
    const count = this.told.buckets_ms.length;
    const room = this.width - EDGE.left - EDGE.right;
    return EDGE.left + (this.kind === "bars" ? (room * (i + 0.5)) / count : (room * i) / (count - 1));
  }

  y(value) {
    return HEIGHT - EDGE.bottom - (value / this.top) * (HEIGHT - EDGE.top - EDGE.bottom);
  }

  grid(ticks) {
    const times = this.told.buckets_ms;
    const labels = this.width > 300 ? [0, Math.floor(times.length / 2), times.length - 1] : [0, times.length - 1];
    const anchors = labels.length === 3 ? ["start", "middle", "end"] : ["start", "end"];
    return svg("g", { "aria-hidden": "true" },
      ticks.map((tick) => [
        svg("line.grid", { x1: EDGE.left, x2: this.width - EDGE.right, y1: this.y(tick || 0), y2: this.y(tick || 0) }),
        svg("text", { x: EDGE.left - 6, y: this.y(tick || 0) + 4, "text-anchor": "end" }, this.format(tick)),
      ]).flat(),
      labels.map((i, n) => svg("text", { x: this.x(i), y: HEIGHT - 4, "text-anchor": anchors[n] }, timeOf(times[i], this.told.window))));
  }

  nothing() {
    return svg("text.nothing", { x: (this.width + EDGE.left) / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "Nothing in this time span");
  }

  shapes() {
    return this.lines.map((line, i) => {
      const points = this.courses[i].map((value, n) => [this.x(n), value === null ? null : this.y(value)]);
      return svg(`g.${line.style}`, {}, this.kind === "bars" ? this.bars(points) : this.runs(points));
    });
  }

  bars(points) {
    const width = Math.max(1, ((this.width - EDGE.left - EDGE.right) / points.length) * 0.7);
    const base = HEIGHT - EDGE.bottom;
    return points.filter(([, y]) => y !== null && y < base).map(([x, y]) =>
      svg("rect.bar", { x: x - width / 2, y: Math.min(y, base - 1), width, height: Math.max(1, base - y), rx: 1 }));
  }

  // Unbroken runs of points; one that stands alone is a dot.
  runs(points) {
    const runs = [];
    points.forEach(([x, y], i) => {
      if (y === null) return;
      if (i === 0 || points[i - 1][1] === null) runs.push([]);
      runs.at(-1).push(`${x.toFixed(1)},${y.toFixed(1)}`);
    });
    const base = HEIGHT - EDGE.bottom;
    return runs.map((run) => {
      if (run.length === 1) return svg("circle.dot", { cx: run[0].split(",")[0], cy: run[0].split(",")[1], r: 2.5 });
      const line = svg("path.line", { d: `M${run.join("L")}` });
      if (this.kind !== "area") return line;
      const [from, to] = [run[0].split(",")[0], run.at(-1).split(",")[0]];
      return [svg("path.fill", { d: `M${from},${base}L${run.join("L")}L${to},${base}Z` }), line];
    }).flat();
  }

  // The legend's numbers: of the whole span, or of the bucket under the pointer.
  summarise() {
    this.cursor?.setAttribute("visibility", "hidden");
    setText(this.when, "");
    this.lines.forEach((line, i) => setText(this.values[i], this.format(line.value(this.told))));
    const summary = this.lines.map((line, i) => `${line.name} ${this.values[i].textContent}`).join(", ");
    this.plot.setAttribute("aria-label", `${this.title}: ${summary}`);
  }

  point(event) {
    if (!this.told) return;
    const count = this.told.buckets_ms.length;
    const at = (event.clientX - this.plot.getBoundingClientRect().left - EDGE.left) / (this.width - EDGE.left - EDGE.right);
    const i = Math.max(0, Math.min(count - 1, this.kind === "bars" ? Math.floor(at * count) : Math.round(at * (count - 1))));
    this.cursor.setAttribute("x1", this.x(i));
    this.cursor.setAttribute("x2", this.x(i));
    this.cursor.setAttribute("visibility", "visible");
    setText(this.when, timeOf(this.told.buckets_ms[i], this.told.window, true));
    this.courses.forEach((course, n) => setText(this.values[n], this.format(course[i])));
  }

  drawTable() {
    if (!this.details.open || !this.told) return;
    const rows = this.told.buckets_ms.map((time, i) => [time, i]).reverse()
      .filter(([, i]) => this.courses.some((course) => course[i]))
      .map(([time, i]) => el("tr", {}, el("th", { scope: "row" }, timeOf(time, this.told.window, true)),
        this.courses.map((course) => el("td", {}, this.format(course[i])))));
    replace(this.table,
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "From"), this.lines.map((line) => el("th", { scope: "col" }, line.name)))),
      el("tbody", {}, rows.length ? rows : el("tr", {}, el("td", { colspan: this.lines.length + 1 }, "Nothing in this time span"))));
  }
}

function timeOf(ms, window, exact = false) {
  return window === "5m" || (exact && window === "1h") ? clock(ms) : clock(ms).slice(0, 5);
}

// Three or four round numbers from 0 to just over the greatest value.
function niceTicks(greatest) {
  if (!(greatest > 0)) return [0, 1];
  const rough = greatest / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  return [0, 1, 2, 3].map((n) => n * step).filter((tick, n) => n < 2 || tick < greatest + step);
}
