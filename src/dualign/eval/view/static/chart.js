// One chart, drawn as SVG: lines, points with intervals, marks; a shared cross-hair, and zoom by dragging.
import { known, make } from "./parts.js";

const NS = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 3", "2 2.5", "9 3 2 3", "4 2", "1 3"];
const LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 20;
const MOST_DOTS = 200;

export function svg(tag, attributes = {}) {
  const node = document.createElementNS(NS, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

// How the i-th series looks: colour and dash, so that neither alone is needed.
export const look = (i) => ({ class: `s${i % 6}`, "stroke-dasharray": DASHES[(i + Math.floor(i / 6)) % 6] });

const styleOf = (s) => ({ ...look(s.i), ...(s.sub !== undefined ? { "stroke-dasharray": DASHES[s.sub % 6] } : {}) });

export function swatch(i, sub) {
  const box = svg("svg", { viewBox: "0 0 22 8", class: "swatch", "aria-hidden": "true" });
  box.append(svg("line", { x1: 1, x2: 21, y1: 4, y2: 4, ...styleOf({ i, sub }) }));
  return box;
}

// A line without axes, for a table.
export function dash(values) {
  const box = svg("svg", { viewBox: "0 0 72 20", class: "dash", "aria-hidden": "true" });
  const there = values.filter(known);
  if (there.length > 1) {
    const low = Math.min(...there), span = Math.max(...there) - low || 1;
    const points = values.map((v, i) => `${(2 + (68 * i) / (values.length - 1)).toFixed(1)},${(17 - (14 * (v - low)) / span).toFixed(1)}`);
    const [x, y] = points.at(-1).split(",");
    box.append(svg("polyline", { points: points.join(" ") }), svg("circle", { cx: x, cy: y, r: 2 }));
  }
  return box;
}

export function ticks(low, high, about) {
  const raw = (high - low) / Math.max(1, about), ten = 10 ** Math.floor(Math.log10(raw || 1));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * ten).find((s) => s >= raw) || ten * 10;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9 && found.length < 20; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

export function told(v) {
  if (!known(v)) return "–";
  const size = Math.abs(v);
  const text = size && (size < 1e-3 || size >= 1e6) ? v.toExponential(size < 1e-3 ? 1 : 2) : size >= 1000 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(3)));
  return text.replace(/\.?0+e/, "e").replace(/-/g, "−");
}

// A mean over `n` neighbours on each side, the line itself staying faint behind it.
export function smoothed(points, n) {
  return points.map(([x], i) => {
    const part = points.slice(Math.max(0, i - n), i + n + 1);
    return [x, part.reduce((sum, p) => sum + p[1], 0) / part.length];
  });
}

// `series`: [{name, i (its look), points: [[x, y, half]], dots, faint, sub}]; `marks`: [{x, i, text}].
export class Chart {
  constructor(group, title, about) {
    this.group = group;
    this.box = make("figure", "chart");
    this.box.tabIndex = 0;
    const head = make("figcaption", "", title);
    if (about) this.box.title = about;
    this.now = make("span", "now");
    head.append(this.now);
    head.addEventListener("click", () => group.widen(this));
    this.view = svg("svg", { role: "img" });
    this.legend = make("div", "legend");
    this.box.append(head, this.view, this.legend);
    this.title = title;
    this.number = group.charts.length;
    group.add(this);
    this.view.addEventListener("pointermove", (e) => this.move(e));
    this.view.addEventListener("pointerleave", () => group.point(null));
    this.view.addEventListener("pointerdown", (e) => { if (e.button === 0 && e.pointerType !== "touch") this.from = this.at(e); });
    this.view.addEventListener("pointerup", (e) => this.release(e));
    this.view.addEventListener("dblclick", () => group.zoom(null));
    this.box.addEventListener("keydown", (e) => this.key(e));
  }

  set(series, { marks = [], zero = false, unit = "", legend = false } = {}) {
    Object.assign(this, { series, marks, zero, unit });
    this.legend.replaceChildren(...(legend ? series.filter((s) => !s.faint).map((s) => { const item = make("span"); item.append(swatch(s.i, s.sub), make("span", "", s.name)); return item; }) : []));
    this.box.hidden = !series.some((s) => s.points.length);
    this.draw();
  }

  draw() {
    const width = Math.max(220, this.box.clientWidth - 24 || 340), height = this.box.classList.contains("wide") ? 420 : 172;
    const [x0, x1] = this.group.range(), inside = (p) => p[0] >= x0 && p[0] <= x1;
    const seen = this.series.flatMap((s) => s.points.filter(inside));
    const ys = seen.filter((p) => known(p[1])).flatMap((p) => (known(p[2]) ? [p[1] - p[2], p[1] + p[2]] : [p[1]]));
    let low = ys.length ? ys.reduce((a, b) => Math.min(a, b)) : 0, high = ys.length ? ys.reduce((a, b) => Math.max(a, b)) : 1;
    if (this.zero) low = Math.min(0, low);
    if (high - low < 1e-9 * Math.max(Math.abs(high), 1e-12)) [low, high] = high ? [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1] : [0, 1];
    const pad = (high - low) * 0.06;
    [low, high] = [this.zero && low === 0 ? 0 : low - pad, high + pad];
    const X = (x) => LEFT + ((x - x0) / (x1 - x0 || 1)) * (width - LEFT - RIGHT), Y = (y) => height - BOTTOM - ((y - low) / (high - low)) * (height - TOP - BOTTOM);
    Object.assign(this, { X, Y, width, height, x0, x1 });
    this.view.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.view.setAttribute("height", height);
    const axes = svg("g", { class: "axes" });
    for (const y of ticks(low, high, height / 42)) {
      axes.append(svg("line", { x1: LEFT, x2: width - RIGHT, y1: Y(y), y2: Y(y) }), label(told(y), LEFT - 6, Y(y) + 3.5, "end"));
    }
    for (const x of ticks(x0, x1, width / 80)) if (X(x) < width - 4 && (this.group.axis !== "batch" || Number.isInteger(x))) axes.append(label(told(x), X(x), height - 5, "middle"));
    const clip = svg("clipPath", { id: `clip${this.number}` });
    clip.append(svg("rect", { x: LEFT - 4, y: 0, width: width - LEFT - RIGHT + 8, height }));
    const lines = svg("g", { class: "lines", "clip-path": `url(#clip${this.number})` });
    for (const mark of this.marks) if (mark.x >= x0 && mark.x <= x1) lines.append(svg("line", { x1: X(mark.x), x2: X(mark.x), y1: TOP, y2: height - BOTTOM, ...look(mark.i), "stroke-dasharray": "2 3" }));
    for (const s of this.series) lines.append(...this.line(s));
    this.cross = svg("g", { class: "cross" });
    this.brush = svg("rect", { class: "brush", y: TOP, height: height - TOP - BOTTOM, width: 0 });
    this.view.replaceChildren(clip, axes, lines, this.brush, this.cross);
    const all = this.series.filter((s) => !s.faint && s.points.length), drawn = all.filter((s) => !s.dots);
    const last = (drawn.length ? drawn : all).map((s) => s.points.at(-1));
    this.view.setAttribute("aria-label", `${this.title}: ${this.series.filter((s) => !s.faint).map((s) => s.points.length ? `${s.name} ${told(s.points.at(-1)[1])}` : "").filter(Boolean).join(", ")}`);
    this.now.textContent = last.length === 1 ? told(last[0][1]) + this.unit : "";
  }

  line(s) {
    const { X, Y, x0, x1 } = this;
    const there = s.points.filter((p) => known(p[1]));  // with a neighbour on each side, so that lines reach the edge
    const points = there.filter((p, i) => (there[i + 1] || p)[0] >= x0 && (there[i - 1] || p)[0] <= x1);
    const style = styleOf(s);
    const path = points.map((p, i) => `${i ? "L" : "M"}${X(p[0]).toFixed(1)} ${Y(p[1]).toFixed(1)}`).join("");
    const found = [svg("path", { d: path, ...style, class: style.class + (s.faint ? " faint" : "") + (s.dots ? " held" : "") })];
    if (points.length === 1 && !s.dots) found.push(svg("circle", { cx: X(points[0][0]), cy: Y(points[0][1]), r: 2.5, class: style.class + " dot" }));
    for (const [x, y, half] of s.dots ? points.slice(-MOST_DOTS) : []) {
      if (known(half)) {
        const d = `M${X(x)} ${Y(y - half)}V${Y(y + half)}M${X(x) - 3} ${Y(y - half)}h6M${X(x) - 3} ${Y(y + half)}h6`;
        found.push(svg("path", { d, class: style.class + " bar" }));
      }
      found.push(svg("circle", { cx: X(x), cy: Y(y), r: 3.2, class: style.class + " dot" }));
    }
    return found;
  }

  at(event) {
    const box = this.view.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.width;
    return this.x0 + (Math.min(Math.max(x, LEFT), this.width - RIGHT) - LEFT) / (this.width - LEFT - RIGHT) * (this.x1 - this.x0);
  }

  move(event) {
    const x = this.at(event);
    if (this.from !== undefined) {
      const [a, b] = [this.X(this.from), this.X(x)].sort((p, q) => p - q);
      this.brush.setAttribute("x", a);
      this.brush.setAttribute("width", b - a);
    }
    this.group.point(x, this, event);
  }

  release(event) {
    if (this.from === undefined) return;
    const [a, b] = [this.from, this.at(event)].sort((p, q) => p - q);
    this.from = undefined;
    if (this.X(b) - this.X(a) > 6) this.group.zoom([a, b]);
    else this.brush.setAttribute("width", 0);
  }

  key(event) {
    const xs = this.series.filter((s) => !s.faint).flatMap((s) => s.points.map((p) => p[0])).sort((a, b) => a - b);
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by && xs.length) {
      const now = this.group.x ?? xs.at(-1), next = by > 0 ? xs.find((x) => x > now + 1e-9) : xs.findLast((x) => x < now - 1e-9);
      this.group.point(next ?? now, this);
    } else if (event.key === "Enter" && event.target === this.box) this.group.widen(this);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // What every line says next to x.
  values(x) {
    return this.series.filter((s) => !s.faint && s.points.length).map((s) => {
      const p = s.points.reduce((best, q) => (Math.abs(q[0] - x) < Math.abs(best[0] - x) ? q : best));
      return { s, p };
    }).filter(({ p }) => Math.abs(p[0] - x) <= (this.x1 - this.x0) * 0.04 + 0.5 * (this.group.axis === "batch"));
  }

  point(x) {
    this.cross?.replaceChildren();
    if (x === null || x < this.x0 || x > this.x1 || this.box.hidden) return;
    this.cross.append(svg("line", { x1: this.X(x), x2: this.X(x), y1: TOP, y2: this.height - BOTTOM }));
    for (const { s, p } of this.values(x)) if (known(p[1]) && p[0] >= this.x0 && p[0] <= this.x1) this.cross.append(svg("circle", { cx: this.X(p[0]), cy: this.Y(p[1]), r: 3, class: `s${s.i % 6} dot` }));
  }
}

function label(text, x, y, anchor) {
  const node = svg("text", { x, y, "text-anchor": anchor });
  node.textContent = text;
  return node;
}

// Charts over one axis: they point at the same place and zoom together.
export class Group {
  constructor(node, onZoom) {
    this.charts = [];
    this.full = [0, 1];
    this.zoomed = null;
    this.x = null;
    this.onZoom = onZoom;
    this.tip = make("div", "tip");
    this.tip.hidden = true;
    node.append(this.tip);
    this.resize = new ResizeObserver(() => this.charts.forEach((c) => c.series && !c.box.hidden && c.draw()));
    this.resize.observe(node);
  }

  add(chart) { this.charts.push(chart); }
  range() { return this.zoomed || this.full; }
  draw() { for (const chart of this.charts) if (chart.series) chart.draw(); }
  close() { this.resize.disconnect(); }

  zoom(range) {
    this.zoomed = range && this.axis === "batch" ? [Math.floor(range[0]), Math.ceil(range[1])] : range;
    this.tip.hidden = true;
    this.onZoom(this.zoomed);
  }

  widen(chart) {
    chart.box.classList.toggle("wide");
    chart.draw();
  }

  point(x, chart) {
    this.x = x;
    for (const each of this.charts) if (each.series) each.point(x);
    this.tip.hidden = x === null;
    if (x === null || !chart) return;
    const values = chart.values(x), rows = values.map(({ s, p }) => {
      const row = make("div");
      row.append(swatch(s.i, s.sub), make("span", "", s.name), make("b", "", told(p[1]) + (known(p[2]) ? ` ± ${told(p[2])}` : "") + chart.unit));
      return row;
    });
    const nearest = values.length ? values.reduce((a, b) => (Math.abs(b.p[0] - x) < Math.abs(a.p[0] - x) ? b : a)).p[0] : x;
    this.tip.replaceChildren(make("p", "", `${this.axis || "batch"} ${told(nearest)}`), ...rows);
    const box = chart.view.getBoundingClientRect(), at = box.left + (chart.X(x) / chart.width) * box.width;
    const wide = this.tip.offsetWidth, left = at + 14 + wide > innerWidth ? at - wide - 14 : at + 14;
    this.tip.style.left = `${Math.max(4, left)}px`;
    const above = box.top - this.tip.offsetHeight + 4;
    this.tip.style.top = `${above > 4 ? above : Math.min(box.bottom - 10, innerHeight - this.tip.offsetHeight - 8)}px`;
  }
}
