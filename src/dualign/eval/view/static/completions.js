// Every completion of a run: prompts in a list, the chosen one in full beside it.
import { make, known, put, signed } from "./parts.js";
import { List } from "./list.js";
import { Prompt } from "./prompt.js";
import { select } from "./curves.js";
import { svg } from "./chart.js";
import { title } from "./app.js";

const SORTS = { order: "as sampled", best: "highest reward", worst: "lowest reward", spread: "widest spread", weight: "largest weight", tokens: "longest" };
const HELD_SORTS = { order: "as sampled", gain: "largest gain", loss: "largest loss", best: "highest reward", worst: "lowest reward" };
const CHIPS = [["is:clipped", "clipped"], ["is:cut", "cut off"], ["is:absent", "no label"], ["is:note", "judge's words"]];
const ROW = 68, WAIT = 250;

export class Completions {
  constructor(app, main) {
    this.app = app;
    const params = app.params();
    this.name = params.get("run") || [...app.runs].sort((a, b) => b.state.written - a.state.written)[0]?.name;
    if (!this.name) { main.append(make("p", "empty", "No run here yet.")); return; }
    this.frame(main, params);
    this.start();
  }

  frame(main, params) {
    this.bar = make("div", "bar");
    this.input = make("input");
    Object.assign(this.input, { type: "search", placeholder: "search: words, reward>2, is:clipped, id:p12", value: params.get("q") || "", spellcheck: false });
    this.input.setAttribute("aria-label", "Search completions");
    this.input.addEventListener("input", () => { clearTimeout(this.timer); this.timer = setTimeout(() => this.search(), WAIT); });
    this.chips = make("span", "chips");
    this.columns = make("span", "chips columns");
    this.count = make("span", "count");
    this.count.setAttribute("role", "status");
    this.list = new List(ROW, (offset, limit) => this.fetch(offset, limit), (item) => this.row(item), (item, at) => this.choose(item, at));
    this.list.box.setAttribute("aria-label", "Prompts");
    this.detail = make("div", "detail");
    this.prompt = new Prompt(this.app, this.detail, () => this.back());
    const left = make("div", "left"), split = make("div", "split");
    left.append(this.count, this.list.box);
    split.append(left, this.detail);
    main.append(this.bar, split);
    this.main = main;
  }

  async start() {
    try {
      this.about = await this.app.ask("run", { run: this.name }, "run");
    } catch (error) {
      this.count.textContent = error.message;
      return;
    }
    const columns = this.app.params().getAll("col");
    this.held = columns.length > 0 || (!this.about.batches.length && this.about.evaluations.length > 0);
    if (this.held && !columns.length) this.defaultColumns();
    this.controls();
    title("completions of " + this.name);
    await this.list.reload();
    const at = Number(this.app.params().get("at"));
    if (this.app.params().get("at") !== null && Number.isInteger(at)) this.list.select(at);
    else if (this.list.total && innerWidth > 800) this.list.select(0);
    this.begun = true;
  }

  defaultColumns() {
    const all = this.about.evaluations;
    this.app.set({ col: [...new Set([all[0], all.at(-1)])].map((s) => `${this.name}@${s}`) });
  }

  controls() {
    const params = this.app.params(), runs = Object.fromEntries(this.app.runs.map((r) => [r.name, r.name]));
    const run = select(runs, this.name, "run", (name) => this.app.go("/completions", { run: name }));
    const what = { batches: "training batches", held: "held-out answers" };
    const scope = select(what, this.held ? "held" : "batches", "show", (v) => this.scope(v));
    const sort = select(this.held ? HELD_SORTS : SORTS, params.get("sort") || "order", "sort", (v) => { this.app.set({ sort: v === "order" ? null : v, at: null }); this.again(); });
    this.drawChips();
    this.drawColumns();
    this.bar.replaceChildren(run, scope, this.columns, this.input, this.chips, sort);
  }

  scope(value) {
    this.app.set({ sort: null, at: null, col: null });
    if (value === "held") {
      if (!this.about.evaluations.length) { this.controls(); this.count.textContent = "this run has no evaluation yet"; return; }
      this.defaultColumns();
    }
    this.held = value === "held";
    this.controls();
    this.again();
  }

  drawChips() {
    this.chips.replaceChildren(...CHIPS.filter(([word]) => !this.held || word !== "is:clipped").map(([word, text]) => {
      const chip = make("button", "chip", text), on = this.input.value.split(/\s+/).includes(word);
      chip.setAttribute("aria-pressed", on);
      chip.title = word;
      chip.addEventListener("click", () => {
        const words = this.input.value.split(/\s+/).filter(Boolean);
        this.input.value = (on ? words.filter((w) => w !== word) : [...words, word]).join(" ");
        this.search();
      });
      return chip;
    }));
  }

  // the evaluations that stand side by side, of this run and of others
  drawColumns() {
    const chosen = this.app.params().getAll("col");
    this.columns.hidden = !this.held;
    if (!this.held) return;
    const change = (list) => { this.app.set({ col: list, at: null }); this.drawColumns(); this.again(); };
    this.columns.replaceChildren(...chosen.map((name) => {
      const chip = make("button", "chip", named(name, this.name) + (chosen.length > 1 ? " ×" : ""));
      chip.setAttribute("aria-pressed", "true");
      chip.disabled = chosen.length === 1;
      chip.addEventListener("click", () => change(chosen.filter((c) => c !== name)));
      return chip;
    }));
    const own = this.about.evaluations.map((s) => `${this.name}@${s}`).filter((c) => !chosen.includes(c));
    const others = this.app.runs.filter((r) => r.name !== this.name && known(r.evaluated)).slice(0, 200).map((r) => `${r.name}@${r.evaluated}`).filter((c) => !chosen.includes(c));
    if (chosen.length < 8 && own.length + others.length) {
      const more = select(Object.fromEntries([["", "beside …"], ...own.map((c) => [c, named(c, this.name)]), ...others.map((c) => [c, named(c, this.name)])]), "", "", (v) => v && change([...chosen, v]));
      this.columns.append(more);
    }
  }

  search() {
    this.app.set({ q: this.input.value.trim(), at: null });
    this.drawChips();
    this.again();
  }

  again() {
    this.list.chosen = -1;
    this.list.reload().then(() => { if (this.list.total && innerWidth > 800) this.list.select(0); else if (!this.list.total) this.prompt.clear(); });
  }

  asked() {
    const params = this.app.params(), columns = params.getAll("col");
    return this.held ? { col: columns } : { run: this.name };
  }

  async fetch(offset, limit) {
    const params = this.app.params();
    this.count.textContent = this.list.total ? this.count.textContent : "reading …";
    try {
      const told = await this.app.ask("list", { ...this.asked(), q: params.get("q") || "", sort: params.get("sort") || "order", offset, limit });
      const many = told.completions === null ? "" : ` · ${told.completions.toLocaleString("en")} completions`;
      this.count.replaceChildren(make("span", "", `${told.total.toLocaleString("en")} prompt${told.total === 1 ? "" : "s"}${many}`), ...told.troubles.slice(0, 3).map((t) => make("span", "trouble", t)));
      if (!told.total) this.prompt.clear(params.get("q") ? "Nothing is found." : this.held ? "No held-out answers." : "No batch is stored yet.");
      return told;
    } catch (error) {
      if (error.name !== "AbortError") this.count.replaceChildren(make("span", "trouble", error.message));
      throw error;
    }
  }

  row(item) {
    const row = make("div"), top = make("div", "line"), words = textWords(this.app.params().get("q") || "");
    const sides = this.held ? item.rewards || [] : [item.rewards || []];
    top.append(make("span", "soft", this.held ? item.id : `batch ${item.step}`), this.held ? make("span") : make("span", "soft id", item.id), dots(sides));
    const mean = (side) => { const there = side.filter(known); return there.length ? there.reduce((a, b) => a + b) / there.length : null; };
    const value = this.held && sides.length > 1 ? `${signed(mean(sides[0]))} → ${signed(mean(sides.at(-1)))}` : signed(mean(sides[0] || []));
    top.append(make("b", "", value));
    const text = make("div", "words");
    put(text, item.prompt ?? "cannot be read", words);
    row.append(top, text);
    return row;
  }

  async choose(item, at) {
    const first = innerWidth <= 800 && !document.body.classList.contains("reading"); // a phone's own "back" leads to the list
    this.app.set({ at });
    if (first && this.begun) { this.app.set({ at: null }); history.pushState(null, "", location.href); this.app.set({ at }); }
    document.body.classList.add("reading");
    const place = this.held ? { col: this.app.params().getAll("col"), row: item.row } : { run: this.name, step: item.step, row: item.row, count: Math.max(1, (item.rewards || []).length) };
    const words = textWords(this.app.params().get("q") || "");
    this.prompt.show(place, this.held, words, this.name);
  }

  back() {
    document.body.classList.remove("reading");
    this.app.set({ at: null });
    this.list.box.focus();
  }

  // new batches of a running run: counted, and shown where the list ends
  update() {
    const run = this.app.run(this.name), now = run && `${run.done} ${run.state.written}`;
    if (now && this.stamp && now !== this.stamp && this.list && !this.held) this.list.reload(true);
    this.stamp = now || this.stamp;
  }

  close() {
    document.body.classList.remove("reading");
    clearTimeout(this.timer);
    this.list?.close();
  }

  key(event) {
    const by = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
    if (by && this.list) this.list.select(this.list.chosen + by);
    else if (event.key === "Home") this.list.select(0);
    else if (event.key === "End") this.list.select(this.list.total - 1);
    else if (event.key === "d") this.prompt.toggle();
    else if (event.key === "Escape") this.back();
    else return false;
    return true;
  }
}

// The words of a query that stand in texts, to be marked.
export const textWords = (q) => (q.match(/(?:[^\s"]+:)?"[^"]*"?|[^\s"]+/g) || []).filter((w) => !/^(is|id):/.test(w) && !/^[^<>=:]+(<=|>=|<|>|=)-?[\d.]/.test(w))
  .map((w) => w.replace(/^(prompt|completion|note):/, "").replaceAll('"', "").toLowerCase()).filter(Boolean);

export function named(column, run) {
  const at = column.lastIndexOf("@"), step = column.slice(at + 1), of = column.slice(0, at);
  return (of === run ? "" : of + ": ") + (step === "0" ? "π₀" : "after " + step);
}

// The rewards of K completions on one scale; of several evaluations, a row for each.
function dots(sides) {
  const all = sides.flat().filter(known), box = svg("svg", { viewBox: "0 0 64 16", class: "dots", "aria-hidden": "true" });
  if (!all.length) return box;
  const low = Math.min(...all), span = Math.max(...all) - low || 1;
  sides.slice(0, 3).forEach((side, i, shown) => {
    for (const r of side.filter(known)) box.append(svg("circle", { cx: 4 + (56 * (r - low)) / span, cy: shown.length === 1 ? 8 : 3 + (10 * i) / (shown.length - 1), r: 2.4, class: `s${i % 6} dot` }));
  });
  return box;
}
