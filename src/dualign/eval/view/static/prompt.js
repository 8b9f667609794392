// One prompt in full: what was asked, the answers side by side, how each was rewarded and weighted.
import { known, make, number, put, signed } from "./parts.js";
import { difference } from "./diff.js";
import { named } from "./completions.js";

const LINE = /^\[(yes|no|absent)\] (.*) \(weight ([-\d.e+]+)\): ?(.*)$/; // a criterion's, as annotate/checklist.py writes it
const NAMED = { missing_eos: "missing EOS" };
const TOLD = new Set(["clipped", "keep"]);

export class Prompt {
  constructor(app, box, back) {
    Object.assign(this, { app, box, back });
    this.clear("");
  }

  clear(text = "") { this.box.replaceChildren(make("p", "empty", text)); }

  async show(place, held, words, run) {
    Object.assign(this, { held, words, run, place });
    try {
      this.told = await this.app.ask("prompt", place, "prompt");
      this.draw();
      this.box.scrollTop = 0;
    } catch (error) {
      if (error.name !== "AbortError") this.box.replaceChildren(make("p", "empty trouble", error.message));
    }
  }

  toggle() {
    this.app.set({ diff: this.app.params().get("diff") ? null : "1" });
    if (this.told) this.draw();
  }

  draw() {
    const { told } = this, head = make("header"), on = this.app.params().get("diff");
    const back = make("button", "back", "‹ list");
    back.addEventListener("click", this.back);
    head.append(back, make("span", "id", told.id));
    for (const [key, value] of Object.entries(told.columns || {})) if (key !== "id" && value !== told.id) head.append(make("span", "soft", `${key}: ${value}`));
    const same = make("a", "", this.held ? "in training" : "in every batch");
    same.href = "/completions?" + new URLSearchParams({ run: this.run, q: `id:"${told.id}"` });
    same.dataset.link = "";
    const differ = make("button", "chip", "differences");
    differ.setAttribute("aria-pressed", Boolean(on));
    differ.title = this.held ? "to the evaluation on the left (d)" : "to the best answer (d)";
    differ.addEventListener("click", () => this.toggle());
    head.append(same, differ);
    const asked = make("div", "asked");
    told.messages.forEach((m, i) => {
      const turn = make("div", "turn");
      if (m.role && told.messages.length > 1) turn.append(make("span", "role", m.role));
      turn.append(this.text(m.content, m.chars, i === 0 && told.messages.length === 1 ? { ...this.source(told.sides[0], told.sides[0].answers[0]), column: "prompt" } : null));
      asked.append(turn);
    });
    this.box.replaceChildren(head, asked, this.held ? this.evaluations() : this.batch());
  }

  batch() {
    const [side] = this.told.sides, grid = make("div", "answers");
    const best = side.answers.filter((a) => known(a.reward)).sort((a, b) => b.reward - a.reward)[0];
    const range = span(side.answers);
    grid.append(...side.answers.map((a, i) => this.answer(side, a, `#${i + 1}`, { best: a === best && range.high > range.low, range, against: a === best ? null : best })));
    return grid;
  }

  evaluations() {
    const grid = make("div", "answers sides"), range = span(this.told.sides.flatMap((s) => s.answers));
    this.told.sides.forEach((side, i) => {
      const column = make("div", "side");
      column.append(make("h3", "", named(`${side.run}@${side.step}`, this.run)));
      const before = i ? this.told.sides[i - 1].answers : [];
      column.append(...side.answers.map((a, k) => this.answer(side, a, side.answers.length > 1 ? `#${k + 1}` : "", { range, against: before[k] || null, first: this.told.sides[0].answers[k] })));
      if (!side.answers.length) column.append(make("p", "soft", "this prompt is not in this evaluation"));
      grid.append(column);
    });
    return grid;
  }

  source(side, answer) { return { run: side.run, kind: side.kind, step: side.step, row: answer?.row ?? 0 }; }

  answer(side, a, name, { best, range, against, first }) {
    const box = make("article", "answer" + (best ? " best" : "")), head = make("div", "score");
    if (name) head.append(make("span", "soft", name));
    head.append(make("b", "value", known(a.reward) ? signed(a.reward) : "no label"));
    if (first && first !== a && known(first.reward) && known(a.reward)) head.append(make("span", a.reward >= first.reward ? "up" : "down", signed(a.reward - first.reward)));
    if (best) head.append(make("span", "up", "★ best"));
    for (const [flag, text] of [[a.clipped, "clipped"], [a.cut, "cut off"], [a.more.keep === 0, "left out"]]) if (flag) head.append(make("span", "flag", text));
    head.append(make("span", "soft end", `${a.tokens} tokens`));
    box.append(head, meter(a.reward, range));
    if (a.absent) box.append(make("p", "flag", "no label: " + a.absent));
    box.append(this.facts(a));
    const changed = this.app.params().get("diff") && against && a.chars === a.text.length ? difference(against.text, a.text) : null;
    box.append(changed ? shown(changed) : this.text(a.text, a.chars, { ...this.source(side, a), column: "completion" }));
    if (a.note) box.append(this.note(side, a));
    return box;
  }

  // each reward, and the weight with its factors: w = (π_0/π_t)^α · exp(A/β), as DAR has it
  facts(a) {
    const list = make("dl", "parts");
    const add = (name, value, title) => { const dt = make("dt", "", name); if (title) dt.title = title; list.append(dt, make("dd", "", value)); };
    const parts = Object.entries(a.parts || {});
    if (parts.length > 1 || (parts.length && parts[0][1] !== a.reward)) for (const [key, value] of parts) add(NAMED[key] || key, known(value) ? signed(value) : "absent");
    if (known(a.advantage)) add("advantage", signed(a.advantage));
    if (known(a.weight)) add("weight", number(a.weight, Math.abs(a.weight) < 0.1 ? 3 : 2) + (known(a.pull) && known(a.push) ? ` = e^${signed(a.pull)} · e^${signed(a.push)}${a.clipped ? ", clipped" : ""}` : ""), "weight = (π₀/π_t)^α · exp(advantage/β)");
    for (const [key, value] of Object.entries(a.more)) if (!TOLD.has(key)) add(key, signed(value));
    return list;
  }

  note(side, a) {
    const box = make("details", "note"), lines = a.note.split("\n").map((line) => LINE.exec(line));
    box.open = a.note.length < 600 || this.words.some((w) => a.note.toLowerCase().includes(w));
    const criteria = lines.filter(Boolean);
    box.append(make("summary", "", criteria.length ? `criteria: ${criteria.filter((c) => c[1] === "yes").length} of ${criteria.length} met` : "the judge's words"));
    if (criteria.length) {
      const list = make("ul", "criteria");
      for (const [, verdict, text, weight, why] of criteria) {
        const item = make("li", verdict);
        item.append(make("b", "", { yes: "✓ ", no: "✗ ", absent: "? " }[verdict] + text), make("span", "soft", ` weight ${weight}`));
        if (why) item.append(put(make("div"), why, this.words));
        list.append(item);
      }
      box.append(list);
      const rest = a.note.split("\n").filter((_, i) => !lines[i]).join("\n").trim();
      if (rest) box.append(put(make("p", "said"), rest, this.words));
    } else box.append(this.text(a.note, a.note_chars, { ...this.source(side, a), column: "note" }));
    return box;
  }

  // A text, and a button for more of it where it is long.
  text(text, chars, source) {
    const box = make("div", "said");
    box.dir = "auto";
    put(box, text || "(empty)", this.words);
    if (chars > text.length && source) {
      const more = make("button", "more");
      let have = text.length;
      const label = () => { more.textContent = `more (${(chars - have).toLocaleString("en")} characters)`; };
      label();
      more.addEventListener("click", async () => {
        const told = await this.app.ask("text", { ...source, start: have }).catch((error) => ({ text: "", error: error.message }));
        have += told.text.length;
        const next = put(make("div", "said"), told.error || told.text, this.words);
        more.before(next);
        if (have >= chars || !told.text) more.remove();
        else label();
      });
      const whole = make("div");
      whole.append(box, more);
      return whole;
    }
    return box;
  }
}

function span(answers) {
  const there = answers.map((a) => a.reward).filter(known);
  return { low: Math.min(...there), high: Math.max(...there) };
}

// Where a reward stands between the lowest and the highest that are shown.
function meter(reward, range) {
  const box = make("div", "meter"), dot = make("i");
  if (known(reward)) {
    dot.style.left = `${range.high > range.low ? (100 * (reward - range.low)) / (range.high - range.low) : 50}%`;
    box.append(dot);
  }
  return box;
}

function shown(pieces) {
  const box = make("div", "said");
  box.dir = "auto";
  for (const [kind, text] of pieces) {
    if (kind === "same") put(box, text);
    else box.append(make(kind === "gone" ? "del" : "ins", "", text));
  }
  return box;
}
