// Where two texts differ, word by word (Myers 1986), for texts of reasonable length.
const MOST = 1000; // words and spaces of each
const FURTHEST = 250; // changes; beyond it nothing is alike enough to compare

const words = (text) => text.match(/\s+|[^\s\w]|\w+/gu) || [];

// [[kind, text]] with kind "same", "gone" (only in a) or "added" (only in b); null where they are too long or too unlike.
export function difference(a, b) {
  const x = words(a), y = words(b);
  if (x.length > MOST || y.length > MOST) return null;
  const trace = path(x, y);
  if (!trace) return null;
  const found = [];
  let i = x.length, j = y.length;
  for (let d = trace.length - 1; d >= 0 && (i || j); d--) {
    const V = trace[d], k = i - j, at = (n) => V.get(n) ?? -1;
    const before = k === -d || (k !== d && at(k - 1) < at(k + 1)) ? k + 1 : k - 1;
    const from = d ? at(before) : 0, fromJ = d ? from - before : 0;
    while (i > from && j > fromJ) { found.push(["same", x[--i]]); j--; }
    if (d && i > from) found.push(["gone", x[--i]]);
    else if (d && j > fromJ) found.push(["added", y[--j]]);
  }
  return merged(found.reverse());
}

function path(x, y) {
  const trace = [];
  let V = new Map([[1, 0]]);
  for (let d = 0; d <= Math.min(x.length + y.length, FURTHEST); d++) {
    trace.push(new Map(V));
    for (let k = -d; k <= d; k += 2) {
      let i = k === -d || (k !== d && (V.get(k - 1) ?? -1) < (V.get(k + 1) ?? -1)) ? V.get(k + 1) ?? 0 : (V.get(k - 1) ?? 0) + 1;
      let j = i - k;
      while (i < x.length && j < y.length && x[i] === y[j]) { i++; j++; }
      V.set(k, i);
      if (i >= x.length && j >= y.length) return trace;
    }
  }
  return null;
}

// Changes that only spaces stand between are one change: what is gone first, then what is added.
function merged(pieces) {
  const found = [];
  let gone = "", added = "", space = "";
  const close = () => {
    if (gone) found.push(["gone", gone]);
    if (added) found.push(["added", added]);
    if (space) found.push(["same", space]);
    gone = added = space = "";
  };
  for (const [kind, text] of pieces) {
    if (kind === "same" && /^\s+$/.test(text) && (gone || added)) space += text;
    else if (kind === "same") {
      close();
      if (found.at(-1)?.[0] === "same") found.at(-1)[1] += text;
      else found.push(["same", text]);
    } else {
      gone += space + (kind === "gone" ? text : "");
      added += space + (kind === "added" ? text : "");
      space = "";
    }
  }
  close();
  return found;
}
