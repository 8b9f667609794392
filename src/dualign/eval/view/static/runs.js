// All runs in a table: filtered, sorted, compared by the settings in which they differ.
import { known, make, number, plain, put, signed } from "./parts.js";
import { dash, swatch } from "./chart.js";

const age = (seconds) => {
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const [size, unit] = units.find(([u]) => seconds >= u) || [1, "s"];
  return `${Math.max(0, Math.floor(seconds / size))} ${unit}`;
};
export const dollars = (run) => run.money.reduce((sum, m) => sum + m.dollars, 0);
const evaluations = (run) => (run.held.length ? run.held : run.more?.held || []);
const gain = (run) => { const e = evaluations(run); return run.gain ? run.gain.gain : e.length > 1 ? e[1].reward - e[0].reward : null; };
const held = (run) => evaluations(run).at(-1)?.reward ?? null;
const share = (run) => (run.total ? Math.min(1, run.done / run.total) : null);

const COLUMNS = {
  name: ["run", (r) => r.name], state: ["state", (r) => ["running", "stopped", "finished"].indexOf(r.state.is)],
  progress: ["batches", share], reward: ["reward", (r) => r.last.reward], held: ["held out", held], gain: ["gain", gain],
  kl: ["KL, nats", (r) => r.last.kl], labels: ["labels", (r) => r.last.labels], dollars: ["dollars", dollars], written: ["written", (r) => -r.state.written],
};
const STATES = ["running", "stopped", "finished"];
const MOST_SETTINGS = 10;
const TELLS = ["algo.name", "model.name", "algo.beta", "algo.alpha", "train.lr", "run.seed", "rollout.k"]; // shown first

export function settingText(value) {
  if (value === null || value === undefined) return "–";
  return typeof value === "number" && value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6) ? value.toExponential() : String(value);
}

export class Runs {
  constructor(app, main) {
    this.app = app;
    this.cursor = -1;
    const bar = make("div", "bar");
    this.input = make("input");
    Object.assign(this.input, { type: "search", placeholder: "filter: words, algo.name=grpo, train.lr<1e-5", value: app.params().get("q") || "", spellcheck: false });
    this.input.setAttribute("aria-label", "Filter runs");
    this.input.addEventListener("input", () => { app.set({ q: this.input.value }); this.update(); });
    this.states = make("span", "chips");
    this.open = make("button", "primary");
    this.open.addEventListener("click", () => app.go("/curves", { run: this.chosen() }));
    bar.append(this.input, this.states, this.open);
    this.table = make("table", "runs");
    this.box = make("div", "scroll");
    this.box.append(this.table);
    this.note = make("p", "empty");
    main.append(bar, this.box, this.note);
    this.update();
  }

  chosen() { return this.app.params().getAll("run"); }

  shown() {
    const params = this.app.params(), words = this.input.value.trim().split(/\s+/).filter(Boolean), only = params.getAll("state");
    const [, desc, key] = /^(-?)(.*)$/.exec(params.get("sort") || "");
    const value = COLUMNS[key] ? COLUMNS[key][1] : (r) => r.settings[key];
    const runs = this.app.runs.filter((r) => (!only.length || only.includes(r.state.is)) && words.every((w) => matches(r, w)));
    if (!key) return runs;
    const order = (a, b) => (a === b ? 0 : !present(a) ? 1 : !present(b) ? -1 : (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true })) * (desc ? -1 : 1));
    return runs.map((r) => [value(r), r]).sort((x, y) => order(x[0], y[0])).map(([, r]) => r);
  }

  update() {
    for (const run of this.app.runs) run.more = this.app.more[run.name];
    const runs = this.shown(), chosen = this.chosen();
    const some = [...this.app.differing].sort((a, b) => rank(a) - rank(b));
    this.settings = some.filter((k) => new Set(runs.map((r) => JSON.stringify(r.settings[k]))).size > 1).slice(0, MOST_SETTINGS);
    if (runs.length < 2) this.settings = some.slice(0, MOST_SETTINGS);
    const money = this.app.runs.some((r) => r.money.length);
    this.columns = ["name", "state", "progress", "reward", ...this.settings.map((k) => "=" + k), "held", "gain", "kl", "labels", ...(money ? ["dollars"] : []), "written"];
    this.bar(chosen);
    const focused = this.table.contains(document.activeElement) ? document.activeElement.ariaLabel || document.activeElement.textContent : "";
    this.table.replaceChildren(this.head(), this.body(runs, chosen));
    if (focused) [...this.table.querySelectorAll("input, a, button")].find((n) => (n.ariaLabel || n.textContent) === focused)?.focus({ preventScroll: true });
    this.note.hidden = runs.length > 0;
    this.note.textContent = this.app.runs.length ? "No run fits this filter." : "No run here yet. A run appears as soon as `dualign train` has begun it.";
    this.draw();
  }

  bar(chosen) {
    const only = this.app.params().getAll("state");
    this.states.replaceChildren(...STATES.map((state) => {
      const chip = make("button", "chip " + state, `${state} ${this.app.runs.filter((r) => r.state.is === state).length}`);
      chip.setAttribute("aria-pressed", only.includes(state));
      chip.addEventListener("click", () => {
        this.app.set({ state: only.includes(state) ? only.filter((s) => s !== state) : [...only, state] });
        this.update();
      });
      return chip;
    }));
    this.open.textContent = chosen.length ? `Curves of ${chosen.length}` : "Curves";
    this.open.disabled = !chosen.length;
  }

  head() {
    const row = make("tr"), sort = this.app.params().get("sort") || "";
    row.append(make("th", "pick"));
    for (const column of this.columns) {
      const key = column.replace(/^=/, ""), cell = make("th", column.startsWith("=") ? "setting" : column);
      const button = make("button", "", column.startsWith("=") ? shorter(key) : COLUMNS[key][0]);
      button.title = key;
      const now = sort === key ? "ascending" : sort === "-" + key ? "descending" : "";
      if (now) cell.setAttribute("aria-sort", now);
      const first = ["name", "state", "written"].includes(key) || column.startsWith("=") ? "" : "-";
      const other = first ? "" : "-";
      button.addEventListener("click", () => { this.app.set({ sort: sort === first + key ? other + key : sort === other + key ? null : first + key }); this.update(); });
      cell.append(button);
      row.append(cell);
    }
    const head = make("thead");
    head.append(row);
    return head;
  }

  body(runs, chosen) {
    const body = make("tbody");
    body.append(...runs.map((run, i) => this.row(run, i, chosen.indexOf(run.name))));
    return body;
  }

  row(run, i, picked) {
    const row = make("tr", (picked >= 0 ? "picked " : "") + (i === this.cursor ? "cursor" : ""));
    const box = make("input");
    Object.assign(box, { type: "checkbox", checked: picked >= 0 });
    box.setAttribute("aria-label", "Select " + plain(run.name));
    box.addEventListener("change", () => this.pick(run.name));
    const first = make("td", "pick");
    if (picked >= 0) first.append(swatch(picked));
    first.append(box);
    row.append(first, ...this.columns.map((column) => this.cell(column, run)));
    return row;
  }

  cell(column, run) {
    const cell = make("td", column.startsWith("=") ? "setting" : column);
    if (column === "name") {
      const link = make("a", "", run.name);
      link.href = "/curves?" + new URLSearchParams({ run: run.name });
      link.dataset.link = "";
      cell.append(link);
      const troubles = [...run.troubles, ...(run.more?.troubles || [])];
      if (troubles.length) {
        const mark = make("span", "trouble", "!");
        mark.title = plain(troubles.join("\n"));
        cell.append(mark);
      }
    } else if (column === "state") cell.append(make("span", "state " + run.state.is, run.state.is));
    else if (column === "progress") {
      const bar = make("progress");
      bar.max = 1;
      bar.value = share(run) ?? 0;
      cell.append(make("span", "", run.total ? `${run.done}/${run.total}` : String(run.done)), bar);
    } else if (column === "reward") {
      cell.append(make("span", "spark"), make("span", "", signed(run.last.reward ?? run.last.loss)));
      cell.firstChild.dataset.run = run.name;
    } else if (column === "gain") {
      const g = run.gain;
      put(cell, signed(gain(run)) + (g && known(g.gain_ci) ? ` ± ${number(g.gain_ci)}` : ""));
      if (!g && known(gain(run))) cell.title = "so far: last evaluation less the first";
    } else if (column === "held") put(cell, signed(held(run)));
    else if (column === "kl") put(cell, number(run.last.kl));
    else if (column === "labels") put(cell, known(run.last.labels) ? run.last.labels.toLocaleString("en") : "–");
    else if (column === "dollars") put(cell, run.money.length ? "$" + dollars(run).toFixed(2) : "–");
    else if (column === "written") put(cell, run.state.written ? age(Date.now() / 1000 - run.state.written) + " ago" : "–");
    else put(cell, settingText(run.settings[column.slice(1)]));
    return cell;
  }

  pick(name) {
    const chosen = this.chosen();
    this.app.set({ run: chosen.includes(name) ? chosen.filter((n) => n !== name) : [...chosen, name] });
    this.update();
  }

  // small lines, and the evaluations of runs that are not finished: asked for after the table stands, and again when it has changed
  async draw() {
    for (const node of this.table.querySelectorAll(".spark")) node.replaceChildren(dash(this.app.more[node.dataset.run]?.spark || []));
    if (this.app.moreOf === this.app.version) return;
    this.app.moreOf = this.app.version;
    const more = await this.app.ask("more").catch(() => null);
    if (!more) return;
    this.app.more = more;
    if (this.table.isConnected) this.update();
  }

  key(event) {
    const rows = [...this.table.querySelectorAll("tbody tr")];
    const by = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
    if (by) {
      this.cursor = Math.min(Math.max(this.cursor + by, 0), rows.length - 1);
      rows.forEach((row, i) => row.classList.toggle("cursor", i === this.cursor));
      rows[this.cursor]?.scrollIntoView({ block: "nearest" });
    } else if (event.key === "x") rows[this.cursor]?.querySelector("input").click();
    else if (event.key === "Enter" && !event.target.matches("a, button, input")) this.chosen().length ? this.open.click() : rows[this.cursor]?.querySelector("a").click();
    else return false;
    return true;
  }
}

const present = (v) => v !== null && v !== undefined && v === v;
const rank = (key) => (TELLS.includes(key) ? TELLS.indexOf(key) : TELLS.length);
const NAMES = { "algo.name": "system", "model.name": "model" };
const shorter = (key) => NAMES[key] || key.replace(/^(algo|train|run|rollout|model)\./, "");

function matches(run, word) {
  const found = /^([\w.]+)(<=|>=|!=|=|<|>)(.+)$/.exec(word);
  if (!found) return [run.name, run.system, run.state.is].some((t) => (t || "").toLowerCase().includes(word.toLowerCase()));
  const [, key, sign, text] = found, flat = { ...run.settings, ...run.last, "algo.name": run.system, state: run.state.is, gain: gain(run), held: held(run), seed: run.settings["run.seed"] };
  const value = flat[key], wanted = Number(text);
  if (sign === "=") return present(value) && (String(value).toLowerCase() === text.toLowerCase() || value === wanted);
  if (sign === "!=") return String(value).toLowerCase() !== text.toLowerCase();
  return typeof value === "number" && !Number.isNaN(wanted) && { "<": value < wanted, ">": value > wanted, "<=": value <= wanted, ">=": value >= wanted }[sign];
}
