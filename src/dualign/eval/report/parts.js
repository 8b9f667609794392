"use strict";
// What all pages share. Texts of runs enter a page through these functions alone, as text: never as markup.

export function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined && text !== null) put(node, String(text));
  return node;
}

// Characters that are not seen, or that turn the reading direction: shown by their number.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]/u;
const MOST_HIDDEN = 2000;

// Puts a text into a node. `words`: lower case; where they stand, they are marked.
export function put(node, text, words = []) {
  const pieces = text.split(new RegExp(`(${HIDDEN.source})`, "u"));
  const whole = pieces.length > 2 * MOST_HIDDEN ? [text.replace(new RegExp(HIDDEN.source, "gu"), "\ufffd")] : pieces;
  whole.forEach((piece, i) => {
    if (i % 2 === 0) node.append(...marked(piece, words));
    else {
      const shown = document.createElement("span");
      shown.className = "ctl";
      shown.textContent = "U+" + piece.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      node.append(shown);
    }
  });
  return node;
}

// The same for places that hold no nodes: options, titles.
export const plain = (text) => text.replace(new RegExp(HIDDEN.source, "gu"), (c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);

function marked(text, words) {
  if (!words.length || !text) return text ? [text] : [];
  const lower = text.toLowerCase(), found = [];
  if (lower.length !== text.length) return [text];
  for (let at = 0; at < text.length;) {
    const next = words.map((w) => [lower.indexOf(w, at), w.length]).filter(([i]) => i >= 0).sort((a, b) => a[0] - b[0])[0];
    if (!next || found.length > 400) { found.push(text.slice(at)); break; }
    if (next[0] > at) found.push(text.slice(at, next[0]));
    const mark = document.createElement("mark");
    mark.textContent = text.slice(next[0], next[0] + next[1]);
    found.push(mark);
    at = next[0] + next[1];
  }
  return found;
}

export const known = (v) => v !== null && v !== undefined && Number.isFinite(v);
export const number = (v, digits = 2) => (known(v) ? v.toFixed(digits).replace("-", "−") : "–");
export const signed = (v, digits = 2) => (known(v) ? (v < 0 ? "−" : "+") + Math.abs(v).toFixed(digits) : "–");
