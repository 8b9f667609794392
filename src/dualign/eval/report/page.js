// Completions are data: they enter the page through parts.js alone, which stands before this.
const runs = JSON.parse(document.getElementById("data").textContent);
const PER_PAGE = 10;
const at = (id) => document.getElementById(id);
let page = 0;

const SORTS = {
  order: ["as sampled", () => 0],
  best: ["highest reward", (g) => -extreme(g, Math.max)],
  worst: ["lowest reward", (g) => extreme(g, Math.min)],
  spread: ["widest spread of rewards", (g) => extreme(g, Math.min) - extreme(g, Math.max)],
  gain: ["largest gain", (g) => -gain(g)],
  loss: ["largest loss", (g) => gain(g)],
  weight: ["largest weight", (g) => -Math.max(...g.answers.map((a) => a.weight ?? 0))],
};
const FILTERS = {
  all: ["all prompts", () => true],
  clipped: ["with a clipped weight", (a) => a.clipped],
  cut: ["with a missing EOS", (a) => a.cut],
  absent: ["with an absent label", (a) => a.absent],
  note: ["with the judge's words", (a) => a.note],
};

function rewards(group) { return group.answers.map((a) => a.reward).filter((r) => r !== null && r !== undefined); }
function extreme(group, of) { const r = rewards(group); return r.length ? of(...r) : 0; }
function gain(group) {
  const first = group.answers[0].reward, last = group.answers[group.answers.length - 1].reward;
  return first === null || last === null ? 0 : last - first;
}

function options(select, pairs, chosen) {
  select.replaceChildren(...pairs.map(([value, label]) => new Option(plain(label), value, false, value === chosen)));
}

const named = (step) => (step === "0" ? "π_0" : "after batch " + step);

function fillWhat() {
  const run = runs[at("run").value];
  const held = Object.keys(run.answers), batches = Object.keys(run.batches);
  const pairs = held.map((s) => ["held " + s, "held-out answers, " + named(s)]);
  pairs.push(...batches.map((s) => ["batch " + s, "training batch " + s]));
  options(at("what"), pairs, held.length ? "held " + held[0] : undefined);
  options(at("with"), [["", "nothing"], ...held.map((s) => [s, named(s)])], held.length > 1 ? held[held.length - 1] : "");
}

// The groups to show: a training batch, or held-out answers with another checkpoint's to the same prompts beside them.
function groups() {
  const run = runs[at("run").value];
  const [kind, step] = at("what").value.split(" ");
  at("with-label").hidden = kind !== "held";
  if (kind === "batch") return run.batches[step];
  const other = at("with").value;
  const mark = (group, s) => group.answers.map((a) => ({ ...a, title: named(s) }));
  if (!other || other === step) return (run.answers[step] || []).map((g) => ({ ...g, answers: mark(g, step) }));
  const later = new Map(run.answers[other].map((g) => [g.id, g]));
  return run.answers[step].filter((g) => later.has(g.id)).map((g) => ({ ...g, answers: [...mark(g, step), ...mark(later.get(g.id), other)] }));
}

function chosen() {
  const words = at("text").value.toLowerCase().trim();
  const keep = FILTERS[at("only").value][1], key = SORTS[at("sort").value][1];
  const has = (text) => text && text.toLowerCase().includes(words);
  return groups()
    .filter((g) => g.answers.some(keep))
    .filter((g) => !words || has(g.prompt) || g.answers.some((a) => has(a.text) || has(a.note)))
    .map((g) => [key(g), g]).sort((x, y) => x[0] - y[0]).map(([, g]) => g);
}

function fact(facts, name, value) {
  const item = make("span", "", name + " ");
  item.append(make("b", "", value));
  facts.append(item);
}

function answerNode(answer, best) {
  const node = make("article", "answer" + (best ? " best" : ""));
  const facts = make("p", "facts");
  if (answer.title) facts.append(make("b", "", answer.title));
  fact(facts, "reward", signed(answer.reward));
  for (const [name, value] of Object.entries(answer.parts || {})) fact(facts, name, signed(value));
  if (answer.advantage !== undefined) fact(facts, "advantage", signed(answer.advantage));
  if (answer.weight !== undefined) fact(facts, "weight", number(answer.weight));
  if (answer.pull !== undefined) fact(facts, "= (π_0/π_t)^α", "e^" + signed(answer.pull));
  if (answer.push !== undefined) fact(facts, "× exp(A/β)", "e^" + signed(answer.push));
  if (best) facts.append(make("span", "", "★ best of these"));
  if (answer.clipped) facts.append(make("span", "flag", "clipped"));
  if (answer.cut) facts.append(make("span", "flag", "truncated"));
  if (answer.absent) facts.append(make("span", "flag", "no label: " + answer.absent));
  node.append(facts, make("p", "said", answer.text || "(empty)"));
  if (answer.note) {
    const details = make("details");
    details.append(make("summary", "", "The judge's words"), make("p", "said", answer.note));
    node.append(details);
  }
  return node;
}

function groupNode(group) {
  const node = make("section", "prompt");
  node.tabIndex = -1;
  const side = make("div", "side"), top = Math.max(...rewards(group));
  const several = rewards(group).some((r) => r < top);
  side.append(...group.answers.map((a) => answerNode(a, several && a.reward === top)));
  node.append(make("h3", "", group.id), make("p", "asked", group.prompt), side);
  return node;
}

function show() {
  const found = chosen(), pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
  page = Math.min(Math.max(page, 0), pages - 1);
  at("list").replaceChildren(...found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(groupNode));
  const run = runs[at("run").value], all = groups().length, held = Object.keys(run.batches).length;
  at("count").textContent = `${found.length} of ${all} prompts` +
    (held < run.batch_count ? `; this page holds ${held} of the run's ${run.batch_count} training batches` : "");
  at("page").textContent = `page ${page + 1} of ${pages}`;
  at("previous").disabled = page === 0;
  at("next").disabled = page === pages - 1;
}

function turn(by) { page += by; show(); at("answers").scrollIntoView(); }

function walk(by) {
  const cards = [...document.querySelectorAll(".prompt")];
  const now = cards.indexOf(document.activeElement.closest(".prompt"));
  const next = cards[Math.min(Math.max(now + by, 0), cards.length - 1)];
  if (next) { next.focus(); next.scrollIntoView({ block: "start" }); }
}

const KEYS = { j: () => walk(1), k: () => walk(-1), n: () => turn(1), p: () => turn(-1), "/": () => at("text").focus() };
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});

options(at("run"), runs.map((r, i) => [String(i), r.name]), "0");
options(at("sort"), Object.entries(SORTS).map(([k, [label]]) => [k, label]), "order");
options(at("only"), Object.entries(FILTERS).map(([k, [label]]) => [k, label]), "all");
fillWhat();
const again = () => { page = 0; show(); };
for (const select of document.querySelectorAll("#controls select")) {
  select.addEventListener("change", () => { if (select.id === "run") fillWhat(); again(); });
}
at("text").addEventListener("input", again);
at("controls").addEventListener("submit", (event) => event.preventDefault());
at("previous").addEventListener("click", () => turn(-1));
at("next").addEventListener("click", () => turn(1));
show();
