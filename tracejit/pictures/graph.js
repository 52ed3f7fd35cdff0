"use strict";
// The model of the page: nodes, groups that are open or folded, what lies where. It knows no DOM.

const LANES = ["forward", "backward", "update"];
const CHAR = 7.3, SMALL = 6.1;  // widths of letters of the two monospaced sizes
const NODE_H = 26, FOLDED_H = 42, HEAD = 26, PAD = 11, LANE_GAP = 84;

function bytes(n) {
  if (n < 1024) return n + " B";
  const units = ["KiB", "MiB", "GiB"];
  let k = -1;
  while (n >= 1024 && k < 2) { n /= 1024; k++; }
  return Number(n.toPrecision(4)) + " " + units[k];
}

function makeModel(data) {
  const nodes = data.nodes.map((n, id) => ({
    id, name: n[0], op: n[1], type: n[2], nbytes: n[3], lane: n[4], module: n[5], kind: n[6],
    line: n[7], attrs: n[8], operands: n[9], kernels: n[10], free: !!n[11], leaves: n[12],
    readers: [], input: n[1] === "input",
  }));
  for (const n of nodes) for (const a of n.operands) nodes[a].readers.push(n.id);
  return { data, nodes, kernels: data.kernels, lines: data.lines, views: {}, view: null };
}

function shownOperands(model, hidden) {
  // Of each node, the nodes that it reads, seen through those that are hidden.
  const through = model.nodes.map(() => null);
  const find = (id) => {
    if (!hidden[id]) return [id];
    if (through[id] === null) {
      through[id] = [];
      through[id] = [...new Set(model.nodes[id].operands.flatMap(find))];
    }
    return through[id];
  };
  return model.nodes.map((n) => (hidden[n.id] ? [] : [...new Set(n.operands.flatMap(find))]));
}

function makeView(model, name, hideFree) {
  const key = name + (hideFree ? " without views" : "");
  if (model.views[key]) return model.views[key];
  const hidden = model.nodes.map((n) => hideFree && n.free && !n.leaves.length);
  const groups = [], home = new Array(model.nodes.length).fill(null);
  const build = (raw, parent) => {
    const [label, kind, lane, isOpen, children] = raw;
    const group = {
      id: groups.length, label, kind, lane, parent, open: isOpen || kind === "lane", children: [],
      links: [], index: -1, count: 0, first: -1,
    };
    groups.push(group);
    for (const child of children) {
      if (typeof child === "number") {
        if (hidden[child]) continue;
        home[child] = group;
        group.children.push(child);
        group.count++;
        if (group.first < 0) group.first = child;
      } else {
        const inner = build(child, group);
        if (!inner.count) continue;
        inner.index = group.children.length;
        group.children.push(inner);
        group.count += inner.count;
        if (group.first < 0) group.first = inner.first;
      }
    }
    return group;
  };
  const root = {
    id: -1, label: "", kind: "root", parent: null, open: true, children: [], links: [],
  };
  for (const raw of model.data.views[name]) {
    const lane = build(raw, root);
    if (!lane.count) continue;
    lane.index = root.children.length;
    root.children.push(lane);
  }
  const place = new Map();  // node -> its index in its group
  for (const group of groups) group.children.forEach((c, i) => typeof c === "number" && place.set(c, i));
  const operands = shownOperands(model, hidden);
  const kept = new Map();
  operands.forEach((from, to) => {
    for (const a of from) link(kept, a, to);
  });
  function link(found, from, to) {
    // The link stands in the innermost group that has both, between two of its children.
    const ways = (id) => {
      const way = [[home[id], place.get(id)]];
      for (let g = home[id]; g !== root; g = g.parent) way.push([g.parent, g.index]);
      return way.reverse();
    };
    const a = ways(from), b = ways(to);
    let k = 0;
    while (k + 1 < a.length && k + 1 < b.length && a[k][1] === b[k][1]) k++;
    const group = a[k][0], key = group.id + " " + a[k][1] + " " + b[k][1];
    let entry = found.get(key);
    if (!entry) {
      entry = { from: a[k][1], to: b[k][1], values: new Set() };
      found.set(key, entry);
      group.links.push(entry);
    }
    entry.values.add(from);
  }
  return (model.views[key] = { name, root, groups, home, place, operands, hidden, layouts: new Map() });
}

function linkText(model, entry) {
  const values = [...entry.values].map((i) => model.nodes[i]);
  const total = values.reduce((s, n) => s + n.nbytes, 0);
  if (values.every((n) => n.type.endsWith("@host"))) {
    return values.length === 1 ? "a number" : `${values.length} numbers`;
  }
  if (values.length === 1) return `${values[0].type} · ${bytes(total)}`;
  return `${values.length} tensors · ${bytes(total)}`;
}

function nodeTitle(n) {
  return n.input ? n.name : n.op;
}

function short(text, most) {
  return text.length <= most ? text : "…" + text.slice(text.length - most + 1);
}

function sizeOfNode(n) {
  const badge = n.kernels.length ? SMALL * badgeOf(n).length + 12 : 0;
  const leaves = n.leaves.map((x) => short(x, 34));
  const w = CHAR * short(nodeTitle(n), 30).length + 18 + badge;
  const below = Math.max(0, ...leaves.map((x) => SMALL * x.length + 14));
  return { w: Math.max(44, w, below), h: NODE_H + 14 * leaves.length };
}

function badgeOf(n) {
  const k = n.kernels.length;
  return "k" + n.kernels[0] + (k > 1 ? "+" + (k - 1) : "");
}

function groupNote(model, view, group) {
  if (group.note) return group.note;
  const inside = new Set();
  const walk = (g) => g.children.forEach((c) => {
    if (typeof c === "number") model.nodes[c].kernels.forEach((k) => inside.add(k));
    else walk(c);
  });
  walk(group);
  const ns = group.count === 1 ? "1 node" : `${group.count} nodes`;
  const ks = inside.size === 1 ? "1 kernel" : `${inside.size} kernels`;
  group.kernels = inside;
  return (group.note = inside.size ? `${ns} · ${ks}` : ns);
}

function sizeOfFolded(model, view, group) {
  const label = CHAR * short(group.label, 30).length + 34;
  return { w: Math.max(label, SMALL * groupNote(model, view, group).length + 20), h: FOLDED_H };
}

function layoutGroup(model, view, group) {
  // {w, h, boxes, routes} of what is in an open group, kept until something in it opens or folds.
  const known = view.layouts.get(group);
  if (known) return known;
  const boxes = group.children.map((c) => {
    if (typeof c === "number") return { node: c, ...sizeOfNode(model.nodes[c]) };
    if (!c.open) return { group: c, ...sizeOfFolded(model, view, c) };
    const inner = layoutGroup(model, view, c);
    const title = CHAR * short(c.label, 30).length + SMALL * groupNote(model, view, c).length + 60;
    return { group: c, inner, w: Math.max(inner.w + 2 * PAD, title), h: inner.h + HEAD + 2 * PAD };
  });
  let found;
  if (group.kind === "root") {
    found = besideEachOther(boxes);
  } else {
    found = layered(boxes, group.links.map((l) => [l.from, l.to]));
    const label = Math.max(0, ...group.links.map((l) => SMALL * linkText(model, l).length));
    const more = Math.max(0, (label - found.w) / 2);  // for labels, on either side
    for (const p of [...found.places, ...found.routes.flat()]) shiftBy(p, more);
    found.w += 2 * more;
  }
  boxes.forEach((b, i) => Object.assign(b, found.places[i]));
  const made = { boxes, routes: found.routes, w: found.w, h: found.h };
  view.layouts.set(group, made);
  return made;
}

function shiftBy(point, dx) {
  if (Array.isArray(point)) point[0] += dx;
  else point.x += dx;
}

function besideEachOther(lanes) {
  // The first lane, and to the right of it the others, one above the other.
  if (!lanes.length) return { places: [], routes: [], w: 1, h: 1 };
  const [first, ...others] = lanes;
  const places = [{ x: 0, y: 0 }], x = first.w + LANE_GAP;
  let y = 0;
  for (const b of others) { places.push({ x, y }); y += b.h + LANE_GAP; }
  const w = others.length ? x + Math.max(...others.map((b) => b.w)) : first.w;
  return { places, routes: [], w, h: Math.max(first.h, y - LANE_GAP) };
}

function forget(view, group) {
  // Lay out anew what a group is in.
  for (let g = group; g; g = g.parent) view.layouts.delete(g);
}

function pathTo(view, id) {
  const way = [];
  for (let g = view.home[id]; g && g.kind !== "root"; g = g.parent) way.push(g);
  return way;
}
