// The page's frame: where we are (all of it in the address), what the server says, keys, light and dark.
import { make, plain } from "./parts.js";
import { Runs } from "./runs.js";
import { Curves } from "./curves.js";
import { Completions } from "./completions.js";

const EVERY = 2000; // ms between looks at the runs
const at = (id) => document.getElementById(id);
const PAGES = { "/": Runs, "/curves": Curves, "/completions": Completions };

export const app = {
  runs: [], more: {}, differing: [], version: "", page: null, root: "",

  // The address's settings. `set` changes some: null takes one away, a list gives several.
  params: () => new URLSearchParams(location.search),
  set(changes, { path = location.pathname, push = false } = {}) {
    const params = push ? new URLSearchParams() : this.params();
    for (const [key, value] of Object.entries(changes)) {
      params.delete(key);
      for (const one of Array.isArray(value) ? value : [value]) if (one !== null && one !== "" && one !== undefined) params.append(key, one);
    }
    const text = params.toString(), address = path + (text ? "?" + text : "");
    if (address !== location.pathname + location.search) history[push ? "pushState" : "replaceState"](null, "", address);
  },
  go(path, changes = {}) { this.set(changes, { path, push: true }); open(); },
  run(name) { return this.runs.find((r) => r.name === name); },

  // What the server says; a newer question of the same `topic` makes an older one void.
  async ask(what, params, topic) {
    const pairs = Object.entries(params || {}).flatMap(([k, v]) => (Array.isArray(v) ? v : [v]).map((x) => [k, String(x)]));
    const stop = new AbortController();
    if (topic) { this.topics.get(topic)?.abort(); this.topics.set(topic, stop); }
    const answer = await fetch(`/api/${what}?${new URLSearchParams(pairs)}`, { signal: stop.signal });
    if (answer.status === 204) return null;
    const told = await answer.json().catch(() => ({ error: `the server says ${answer.status}` }));
    if (!answer.ok) throw new Error(told.error || answer.statusText);
    return told;
  },
  topics: new Map(),
};

function open() {
  app.page?.close?.();
  const Page = PAGES[location.pathname] || Runs;
  for (const link of document.querySelectorAll("nav [data-page]")) {
    const here = link.getAttribute("href") === location.pathname;
    link.toggleAttribute("aria-current", here);
    if (here) link.setAttribute("aria-current", "page");
  }
  document.body.dataset.page = Page.name.toLowerCase();
  const main = at("main");
  main.replaceChildren();
  title();
  app.page = new Page(app, main);
}

export function title(more = "") {
  document.title = plain((more ? more + " · " : "") + "dualign" + (app.root ? " · " + app.root : ""));
}

function live(ok, text) {
  at("live").dataset.ok = ok;
  at("live").lastElementChild.textContent = text;
}

async function look() {
  try {
    const told = await app.ask("runs", { have: app.version });
    if (told) {
      Object.assign(app, { runs: told.runs, differing: told.differing, version: told.version, root: told.root });
      at("root").replaceChildren(make("span", "", told.root));
      app.page ? app.page.update?.() : open();
    }
    const running = app.runs.filter((r) => r.state.is === "running").length;
    live(running ? "running" : "idle", running ? `${running} running` : "nothing running");
  } catch (error) {
    live("lost", "no answer from dualign view");
  }
}

async function poll() {
  if (!document.hidden) await look();
  setTimeout(poll, EVERY);
}

// --- links, keys, light and dark ---

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-link]");
  if (!link || event.metaKey || event.ctrlKey || event.shiftKey || event.button) return;
  event.preventDefault();
  const to = new URL(link.href), runs = app.params().getAll("run");
  if (link.dataset.page && link.dataset.page !== "runs" && !to.search) app.go(to.pathname, { run: link.dataset.page === "completions" ? runs.slice(0, 1) : runs });
  else if (link.dataset.page === "runs") app.go("/", { run: runs });
  else { history.pushState(null, "", to.pathname + to.search); open(); }
});
addEventListener("popstate", open);
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });

const KEYS = [
  ["r · c · m", "runs, curves, completions"], ["/", "search or filter"], ["j k or ↓ ↑", "next, previous"],
  ["x", "select a run"], ["Enter", "open it"], ["d", "show differences"], ["0", "zoom out"], ["t", "light or dark"], ["Esc", "back"],
];

function showKeys() {
  const list = make("dl");
  for (const [key, what] of KEYS) list.append(make("dt", "", key), make("dd", "", what));
  const hint = make("p", "soft", "Searching completions: words, \"two words\", prompt:word, note:word, reward>2, weight<0.1, " +
    "tokens>200, step<10, a reward's own name (helpful<0), id:PROMPT, is:clipped, is:cut, is:absent, is:note.");
  at("keys").replaceChildren(make("h2", "", "Keys"), list, hint);
  at("keys").showModal();
}

function turn(theme) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = theme || ((document.documentElement.dataset.theme || (dark ? "dark" : "light")) === "dark" ? "light" : "dark");
  if (!theme) try { localStorage.setItem("theme", document.documentElement.dataset.theme); } catch { /* not kept, then */ }
}

const GLOBAL = {
  r: () => app.go("/", { run: app.params().getAll("run") }),
  c: () => app.go("/curves", { run: app.params().getAll("run") }),
  m: () => app.go("/completions", { run: app.params().getAll("run").slice(0, 1) }),
  t: () => turn(), "?": showKeys,
  "/": () => document.querySelector("input[type=search]")?.focus(),
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || at("keys").open) return;
  const typing = event.target.matches("input:not([type=checkbox]):not([type=range]), select, textarea");
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (app.page?.key?.(event) || GLOBAL[event.key]?.() !== undefined || event.key in GLOBAL) event.preventDefault();
});
at("help").addEventListener("click", showKeys);
at("keys").addEventListener("click", (event) => { if (event.target === at("keys")) at("keys").close(); });
at("theme").addEventListener("click", () => turn());
try { if (localStorage.getItem("theme")) turn(localStorage.getItem("theme")); } catch { /* the system's, then */ }
poll();
