// Curves of one or several runs, live.
import { known, make, number, plain, signed } from "./parts.js";
import { Chart, Group, smoothed, swatch } from "./chart.js";
import { dollars, settingText } from "./runs.js";
import { title } from "./app.js";

// What is drawn together, in this order. Keys that are not named here come last, each with a chart of its own.
const SECTIONS = [
  ["Outcome", [
    ["reward", "Reward", "of the batch's completions; dots: held out, with 95 % intervals"], ["reward_unpenalised", "Reward without penalties"],
    ["rewards", "Each reward, held out", "the mean of each reward, also of those that are not trained on, with 95 % intervals"],
    ["witness", "Witness", "a second judge, never trained on; dotted line: it says that reward and witness part"], ["accuracy", "Accuracy"], ["margin", "Margin"], ["reward_std", "Spread of rewards"],
  ]],
  ["Distance to π₀", [["kl", "KL to π₀, nats", "mean of log π_t/π_0; dots: held out"], ["entropy", "Entropy, nats a token"], ["sampler_gap", "Sampler gap, nats"]]],
  ["Weights", [["ess", "Effective sample size"], ["clip_rate", "Share of clipped weights"], ["tied", "Share in tied groups"], ["weight_mean", "Mean weight"], ["sigma_advantage", "σ of advantages"], ["dropped_weight", "Weight left out"], ["importance", "Importance"], ["skipped", "Updates left out"], ["without_signal", "Without a signal"]]],
  ["Completions", [["length", "Length, tokens"], ["truncated", "Share cut off"], ["distinct", "Share that differ"], ["absent", "Absent labels"], ["witness_absent", "Absent labels of the witness"]]],
  ["Update", [["loss", "Loss"], ["grad_norm", "Gradient norm"], ["lr", "Learning rate"], ["positive_mass", "Positive mass"], ["negative_mass", "Negative mass"]]],
  ["Each reward", []],
  ["Time and money", [["seconds", "Seconds by phase"], ["label_seconds", "Seconds of each reward"], ["labels", "Labels"], ["dollars", "Dollars", "paid for labels when the batch was done"]]],
  ["More", []],
];
const TAKEN = new Set([...SECTIONS.flatMap(([, charts]) => charts.map(([key]) => key)), "kl_ci", "witness_ci", "witness_n"]);
const ZERO = new Set(["seconds", "label_seconds", "absent", "truncated", "clip_rate", "tied", "kl", "grad_norm", "lr", "labels", "dollars"]);
const AXES = { batch: "batches", labels: "labels", hours: "hours" };
const MOST = 12; // runs at once
const MEAN = "/mean"; // NAME/mean: one of several rewards

export class Curves {
  constructor(app, main) {
    this.app = app;
    this.data = new Map();
    this.main = main;
    const params = app.params();
    this.names = params.getAll("run").slice(0, MOST);
    if (!this.names.length) {
      const first = [...app.runs].sort((a, b) => b.state.written - a.state.written)[0];
      if (!first) { main.append(make("p", "empty", "No run here yet.")); return; }
      this.names = [first.name];
      app.set({ run: this.names });
    }
    this.frame();
    this.load();
  }

  frame() {
    const params = this.app.params(), bar = make("div", "bar");
    this.legend = make("div", "runlist");
    this.axis = select(AXES, params.get("x") || "batch", "x axis", (v) => { this.app.set({ x: v, from: null, to: null }); this.group.zoomed = null; this.load(); });
    this.smooth = make("input");
    Object.assign(this.smooth, { type: "range", min: 0, max: 10, step: 1, value: params.get("smooth") || 0 });
    this.smooth.addEventListener("input", () => { this.app.set({ smooth: this.smooth.value === "0" ? null : this.smooth.value }); this.draw(); });
    const smooth = make("label", "", "smooth");
    smooth.append(this.smooth);
    this.find = make("input");
    Object.assign(this.find, { type: "search", placeholder: "find a chart", value: params.get("chart") || "" });
    this.find.setAttribute("aria-label", "Only charts with");
    this.find.addEventListener("input", () => { this.app.set({ chart: this.find.value }); this.draw(); });
    this.out = make("button", "", "zoom out");
    this.out.addEventListener("click", () => this.group.zoom(null));
    bar.append(this.axis, smooth, this.find, this.out);
    this.about = make("div", "about");
    this.charts = make("div", "charts");
    this.main.append(this.legend, bar, this.about, this.charts);
    this.group = new Group(this.main, (range) => {
      this.app.set({ from: range && Number(range[0].toPrecision(6)), to: range && Number(range[1].toPrecision(6)) });
      this.load();
    });
    const [from, to] = [params.get("from"), params.get("to")].map((v) => (v === null ? NaN : Number(v)));
    if (known(from) && known(to) && to > from) this.group.zoomed = [from, to];
    this.made = new Map();
    this.sections = new Map(SECTIONS.map(([name]) => {
      const section = make("section"), grid = make("div", "grid");
      section.append(make("h2", "", name), grid);
      this.charts.append(section);
      return [name, { section, grid }];
    }));
    title(this.names.join(", "));
  }

  async load() {
    const zoomed = this.axis.lastChild.value === "batch" ? this.group.zoomed : null;
    const range = zoomed ? { from: Math.floor(zoomed[0]) - 1, to: Math.ceil(zoomed[1]) + 1 } : {};
    await Promise.all(this.names.map(async (name) => {
      try {
        const [curves, about] = await Promise.all([
          this.app.ask("curves", { run: name, ...range }, "curves " + name),
          this.app.ask("run", { run: name }, "run " + name),
        ]);
        this.data.set(name, { curves, about });
      } catch (error) {
        if (error.name !== "AbortError") this.data.set(name, { error: error.message });
      }
    }));
    this.stamp = this.names.map((n) => this.version(n)).join();
    if (this.charts.isConnected) this.draw();
  }

  version(name) {
    const run = this.app.run(name);
    return run ? `${run.done} ${run.state.is} ${run.state.written}` : "";
  }

  update() {
    if (this.group && this.names.map((n) => this.version(n)).join() !== this.stamp) this.load();
  }

  close() { this.group?.close(); }

  // points of one key of one run, along the axis that is chosen
  along(entry, xs, ys) {
    const by = this.axis.lastChild.value;
    if (by === "batch") return xs.map((x, i) => [x, ys[i]]);
    const to = new Map(entry.curves.steps.map((s, i) => [s, entry.curves.before[by][i]]));
    return xs.map((x, i) => [to.get(x), ys[i]]).filter(([x]) => known(x));
  }

  held(entry, key) {
    const rows = entry.about.heldout.filter((h) => known(h[key]));
    return this.spread(entry, rows.map((h) => [h.batches, h[key], h[key + "_ci"]]));
  }

  // evaluations after so many batches stand where the next batch begins
  spread(entry, points) {
    const by = this.axis.lastChild.value;
    if (by === "batch") return points;
    const { steps, before, total } = entry.curves;
    if (!steps) return [];
    return points.map(([x, ...rest]) => {
      const i = steps.findIndex((s) => s >= x);
      return [i < 0 ? total[by] : before[by][i], ...rest];
    });
  }

  seriesOf(key) {
    const several = this.names.length > 1, series = [], marks = [], n = Number(this.smooth.value);
    const line = (name, points, more) => {
      if (n && points.length > 4) series.push({ name, points, faint: true, ...more });
      series.push({ name, points: n && points.length > 4 ? smoothed(points, n) : points, ...more });
    };
    this.names.forEach((name, r) => {
      const entry = this.data.get(name);
      if (!entry?.curves) return;
      const { curves } = entry.curves, label = several ? name : key;
      if (key === "witness") {
        let used = 0;
        for (const witness of entry.about.witnesses) for (const kind of ["batch", "heldout"]) {
          const looks = witness.looks.filter((k) => k.kind === kind && known(k.witness));
          const points = this.spread(entry, looks.map((k) => [k.step, k.witness, k.ci]));
          if (points.length) series.push({ name: `${several ? name + ", " : ""}${witness.by}, ${kind === "batch" ? "batches" : "held out"}`, points, dots: true, i: several ? r : used, sub: kind === "batch" ? 1 : 0 });
          for (const k of looks.filter((k) => k.spoke).slice(0, 1)) marks.push({ x: this.spread(entry, [[k.step, 0]])[0]?.[0], i: several ? r : used });
          if (kind === "heldout") used += 1;
        }
        return;
      }
      if (key === "rewards") {
        for (const [sub, reward] of heldRewards(entry).entries()) {
          const what = reward.slice(0, -MEAN.length);
          series.push({ name: several ? `${name}, ${what}` : what, points: this.held(entry, reward), dots: true, i: several ? r : sub, ...(several ? { sub } : {}) });
        }
        return;
      }
      const inner = Object.keys(curves).filter((k) => k.startsWith(key + "/"));
      if (["seconds", "label_seconds"].includes(key) && inner.length) {
        if (!several) inner.filter((k) => Math.max(...curves[k][1]) >= 0.005).forEach((k, i) => line(k.slice(key.length + 1), this.along(entry, ...curves[k]), { i }));
        else {
          const total = new Map();
          for (const k of inner) curves[k][0].forEach((x, i) => total.set(x, (total.get(x) || 0) + curves[k][1][i]));
          line(name, this.along(entry, [...total.keys()], [...total.values()]), { i: r });
        }
        return;
      }
      if (curves[key]) line(label, this.along(entry, ...curves[key]), { i: r });
      const held = this.held(entry, key);
      if (held.length) series.push({ name: several ? `${name}, held out` : "held out", points: held, dots: true, i: several ? r : 1 });
    });
    return { series, marks, legend: !several && series.filter((s) => !s.faint).length > 1 };
  }

  draw() {
    this.drawRuns();
    const entries = [...this.data.values()].filter((e) => e.curves), keys = new Set(entries.flatMap((e) => [...Object.keys(e.curves.curves), ...heldRewards(e)]));
    const by = this.axis.lastChild.value, most = entries.map((e) => by === "batch" ? Math.max(e.curves.done - 1, ...e.about.heldout.map((h) => h.batches), 1) : (e.curves.total?.[by] ?? 1));
    if (!this.group.zoomed || by !== "batch" || !this.group.full) this.group.full = [0, Math.max(1e-6, ...most.filter(known))];
    this.group.axis = { batch: "batch", labels: "labels", hours: "hours" }[by];
    this.out.hidden = !this.group.zoomed;
    const rest = [...keys].filter((k) => !TAKEN.has(k) && !/^(label_)?seconds\//.test(k)).sort((a, b) => a.replace("/mean", "/0").localeCompare(b.replace("/mean", "/0"), "en"));
    const words = this.find.value.toLowerCase();
    for (const [name, charts] of SECTIONS) {
      const more = name === "Each reward" ? rest.filter((k) => k.includes("/")) : name === "More" ? rest.filter((k) => !k.includes("/")) : [];
      let shown = 0;
      for (const [key, text, about] of [...charts, ...more.map((k) => [k, k])]) {
        const found = words && !(key + " " + text).toLowerCase().includes(words) ? { series: [] } : this.seriesOf(key);
        let chart = this.made.get(key);
        if (!chart && !found.series.length) continue;
        if (!chart) {
          chart = new Chart(this.group, text, about);
          this.made.set(key, chart);
          this.sections.get(name).grid.append(chart.box);
        }
        chart.set(found.series, { ...found, zero: ZERO.has(key) || /absent/.test(key) });
        shown += !chart.box.hidden;
      }
      this.sections.get(name).section.hidden = !shown;
    }
    this.group.draw();
  }

  drawRuns() {
    this.legend.replaceChildren(...this.names.map((name, i) => {
      const run = this.app.run(name), entry = this.data.get(name), item = make("div", "runitem");
      item.append(swatch(i), make("b", "", name));
      if (run) item.append(make("span", "state " + run.state.is, run.state.is), make("span", "soft", run.total ? `${run.done}/${run.total} batches` : `${run.done} batches`));
      if (run?.money.length) item.append(make("span", "soft", "$" + dollars(run).toFixed(2)));
      for (const trouble of [entry?.error, ...(entry?.about?.troubles || []), ...damaged(entry)].filter(Boolean)) item.append(make("span", "trouble", trouble));
      const read = make("a", "", "completions");
      read.href = "/completions?" + new URLSearchParams({ run: name });
      read.dataset.link = "";
      item.append(read);
      if (this.names.length > 1) {
        const away = make("button", "quiet", "×");
        away.setAttribute("aria-label", "Take away " + name);
        away.addEventListener("click", () => { this.names = this.names.filter((n) => n !== name); this.data.delete(name); this.app.set({ run: this.names }); this.draw(); });
        item.append(away);
      }
      return item;
    }));
    const open = this.about.querySelector("details")?.open;
    this.about.replaceChildren(...(this.names.length > 1 ? [this.differences()] : this.facts()));
    if (open) this.about.querySelector("details").open = true;
  }

  // of one run: what it gained, what it cost, its settings
  facts() {
    const entry = this.data.get(this.names[0]);
    if (!entry?.about) return [];
    const { summary, money, config, about } = entry.about, list = make("dl", "facts");
    const add = (name, value) => list.append(make("dt", "", name), make("dd", "", value));
    if (known(summary.gain)) add("held-out gain", `${signed(summary.gain)}${known(summary.gain_ci) ? " ± " + number(summary.gain_ci) : ""}${known(summary.gain_sd) ? ` (${signed(summary.gain_sd)} sd of π₀)` : ""}`);
    if (about.begun) add("begun", String(about.begun).slice(0, 16).replace("T", " "));
    for (const m of money) add(m.model, `$${m.dollars.toFixed(4)}, ${m.calls.toLocaleString("en")} calls, ${(m.prompt_tokens + m.completion_tokens).toLocaleString("en")} tokens`);
    const details = make("details");
    details.append(make("summary", "", "settings"), make("pre", "", config));
    return [list, details];
  }

  // of several: the settings that differ, side by side
  differences() {
    const entries = this.names.map((n) => this.data.get(n)?.about?.settings || {});
    const keys = [...new Set(entries.flatMap((e) => Object.keys(e)))].filter((k) => k !== "run.dir" && new Set(entries.map((e) => JSON.stringify(e[k]))).size > 1);
    const table = make("table", "settings"), head = make("tr");
    head.append(make("th", "", "differs"), ...this.names.map((name, i) => { const cell = make("th"); cell.append(swatch(i), make("span", "", name)); return cell; }));
    table.append(head, ...keys.map((key) => {
      const row = make("tr");
      row.append(make("th", "", key), ...entries.map((e) => make("td", "", settingText(e[key]))));
      return row;
    }));
    const box = make("div", "scroll");
    box.append(keys.length ? table : make("p", "soft", "No setting differs between these runs."));
    return box;
  }

  key(event) {
    if (event.key === "0" && this.group?.zoomed) this.group.zoom(null);
    else if (event.key === "Escape") this.app.go("/", { run: this.names });
    else return false;
    return true;
  }
}

const heldRewards = (entry) => [...new Set(entry.about.heldout.flatMap((h) => Object.keys(h)))].filter((k) => k.endsWith(MEAN));
const damaged = (entry) => (entry?.curves?.damaged?.length ? [`metrics.jsonl: line ${entry.curves.damaged.join(", ")} cannot be read and is left out`] : []);

export function select(options, value, label, change) {
  const box = make("label", "", label), list = make("select");
  for (const [key, text] of Object.entries(options)) list.append(new Option(plain(text), key, false, key === value));
  list.addEventListener("change", () => change(list.value));
  box.append(list);
  return box;
}
