// A list of any length: only the rows in sight are in the page, and only pages near them are asked for.
import { make } from "./parts.js";

const PAGE = 60, MOST_PAGES = 12, TALLEST = 8_000_000; // pixels that browsers can scroll

export class List {
  // `fetchPage(offset, limit)` gives {total, items}; `draw(item, at)` a row's content; `choose(item, at)` when one is chosen.
  constructor(rowHeight, fetchPage, draw, choose) {
    Object.assign(this, { rowHeight, fetchPage, draw, choose });
    this.box = make("div", "list");
    this.box.tabIndex = 0;
    this.box.setAttribute("role", "listbox");
    this.inner = make("div", "inner");
    this.box.append(this.inner);
    this.box.addEventListener("scroll", () => { this.asked ??= requestAnimationFrame(() => { this.asked = null; this.paint(); }); });
    this.resize = new ResizeObserver(() => this.paint());
    this.resize.observe(this.box);
    this.chosen = -1;
    this.clear();
  }

  clear() {
    this.pages = new Map();
    this.rows = new Map();
    this.total = 0;
    this.round = (this.round || 0) + 1;
    this.inner.replaceChildren();
  }

  // From the start, or where it stands now; resolves when the first page is there.
  async reload(keep = false) {
    const round = keep ? this.round : (this.clear(), this.round);
    if (keep) this.pages.clear();
    else this.box.scrollTop = 0;
    const first = keep ? Math.floor(this.first() / PAGE) : 0;
    await this.page(first);
    if (round !== this.round) return;
    if (keep) { this.rows.forEach((row) => row.remove()); this.rows.clear(); }
    this.paint();
  }

  get scale() { return Math.max(1, (this.total * this.rowHeight) / TALLEST); }
  first() { return Math.floor((this.box.scrollTop * this.scale) / this.rowHeight); }

  page(number) {
    if (!this.pages.has(number)) {
      const round = this.round, entry = { items: null };
      this.pages.set(number, entry);
      entry.ready = this.fetchPage(number * PAGE, PAGE).then((told) => {
        if (round !== this.round) return;
        entry.items = told.items;
        this.total = told.total;
        this.inner.style.height = `${Math.min(this.total * this.rowHeight, TALLEST)}px`;
        while (this.pages.size > MOST_PAGES) this.pages.delete(this.pages.keys().next().value);
        this.paint();
      }, () => this.pages.delete(number));
    }
    return this.pages.get(number).ready;
  }

  item(at) { return this.pages.get(Math.floor(at / PAGE))?.items?.[at % PAGE]; }

  paint() {
    const first = this.first(), count = Math.ceil(this.box.clientHeight / this.rowHeight) + 2;
    const low = Math.max(0, first - 4), high = Math.min(this.total, first + count + 4);
    for (const [at, row] of this.rows) if (at < low || at >= high) { row.remove(); this.rows.delete(at); }
    for (let at = low; at < high; at++) {
      const item = this.item(at);
      if (!item) { this.page(Math.floor(at / PAGE)); continue; }
      let row = this.rows.get(at);
      if (!row) {
        row = this.draw(item, at);
        row.classList.add("row");
        row.setAttribute("role", "option");
        row.id = `row-${at}`;
        row.addEventListener("click", () => this.select(at));
        this.rows.set(at, row);
        this.inner.append(row);
      }
      const top = this.scale === 1 ? at * this.rowHeight : this.box.scrollTop + at * this.rowHeight - this.box.scrollTop * this.scale;
      row.style.transform = `translateY(${top}px)`;
      row.setAttribute("aria-selected", at === this.chosen);
    }
    this.box.setAttribute("aria-activedescendant", this.chosen < 0 ? "" : `row-${this.chosen}`);
  }

  async select(at) {
    at = Math.min(Math.max(at, 0), this.total - 1);
    if (at < 0) return;
    this.chosen = at;
    const top = at * this.rowHeight, from = this.box.scrollTop * this.scale, to = from + this.box.clientHeight - this.rowHeight;
    if (top < from) this.box.scrollTop = top / this.scale;
    else if (top > to) this.box.scrollTop = (top - this.box.clientHeight + this.rowHeight) / this.scale;
    this.paint();
    if (!this.item(at)) await this.page(Math.floor(at / PAGE));
    const item = this.item(at);
    if (item && this.chosen === at) this.choose(item, at);
  }

  close() { this.resize.disconnect(); }
}
