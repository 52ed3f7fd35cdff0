"use strict";
// Drawing: the laid out view as SVG. Every box has its place on the whole in data-box, for keys and
// for whoever checks that nothing overlaps.

const SVG = "http://www.w3.org/2000/svg";

function el(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  made.append(...children);
  return made;
}

function drawView(model, view) {
  // The elements of a view, and its boxes: {element, x, y, w, h, nodes | node, group}.
  const found = { element: el("g", { class: "drawing" }), boxes: [], links: [] };
  const root = layoutGroup(model, view, view.root);
  const lanes = el("g", {});
  found.element.append(lanes);
  drawInside(model, view, view.root, root, 0, HEAD, lanes, found);
  drawLanes(model, view, root, found);
  found.w = root.w;
  found.h = root.h + HEAD;
  return found;
}

function drawInside(model, view, group, layout, x0, y0, into, found) {
  const edges = el("g", { class: "links" }), labels = el("g", { class: "labels" });
  into.append(edges, labels);
  const taken = [];
  for (const b of layout.boxes) {
    const box = { x: x0 + b.x, y: y0 + b.y, w: b.w, h: b.h, level: layout };
    taken.push(box);
    if (b.node !== undefined) drawNode(model, b.node, box, into, found);
    else if (!b.inner) drawFolded(model, view, b.group, box, into, found);
    else {
      drawOpen(model, view, b.group, box, into, found);
      const inset = (b.w - b.inner.w) / 2;
      drawInside(model, view, b.group, b.inner, box.x + inset, box.y + HEAD + PAD, into, found);
    }
  }
  if (group.kind !== "root") drawLinks(model, group, layout, x0, y0, [edges, labels], taken, found);
}

function laneOf(model, item) {
  return LANES[item];
}

function drawNode(model, id, box, into, found) {
  const n = model.nodes[id], lane = laneOf(model, n.lane);
  const kinds = `box node ${lane}${n.input ? " input" : ""}${n.free ? " free" : ""}`;
  const g = el("g", { class: kinds, "data-node": id, "data-box": boxText(box) });
  g.append(el("rect", { x: box.x, y: box.y, width: box.w, height: NODE_H, rx: n.input ? 13 : 5 }));
  const badge = n.kernels.length ? badgeOf(n) : "";
  const room = badge ? SMALL * badge.length + 12 : 0;
  const title = el("text", { x: box.x + (box.w - room) / 2, y: box.y + 17, class: "title" });
  title.textContent = short(nodeTitle(n), 30);
  g.append(title);
  if (badge) {
    const w = SMALL * badge.length + 8, x = box.x + box.w - w - 5;
    g.append(el("rect", { class: "badge", x, y: box.y + 6, width: w, height: 14, rx: 4 }));
    const text = el("text", { x: x + w / 2, y: box.y + 16.5, class: "small" });
    text.textContent = badge;
    g.append(text);
  }
  n.leaves.forEach((leaf, i) => {
    const text = el("text", { x: box.x + box.w / 2, y: box.y + NODE_H + 11 + 14 * i, class: "leaf" });
    text.textContent = "→ " + short(leaf, 34);
    g.append(text);
  });
  const tip = el("title", {});
  tip.textContent = `${n.name}: ${n.type} · ${bytes(n.nbytes)}`;
  g.append(tip);
  into.append(g);
  found.boxes.push({ element: g, ...box, h: box.h, node: id });
}

function drawFolded(model, view, group, box, into, found) {
  const g = el("g", {
    class: `box folded ${laneOf(model, group.lane)} ${group.kind}`,
    "data-group": group.id, "data-box": boxText(box),
  });
  g.append(el("rect", { class: "under", x: box.x + 3, y: box.y + 3, width: box.w, height: box.h, rx: 7 }));
  g.append(el("rect", { x: box.x, y: box.y, width: box.w, height: box.h, rx: 7 }));
  const title = el("text", { x: box.x + box.w / 2, y: box.y + 18, class: "title" });
  title.textContent = short(group.label, 30);
  const half = (CHAR * title.textContent.length) / 2;
  title.setAttribute("x", box.x + box.w / 2 + 6);
  g.append(triangle(box.x + box.w / 2 - half - 6, box.y + 14, false));
  const note = el("text", { x: box.x + box.w / 2, y: box.y + 33, class: "small" });
  note.textContent = groupNote(model, view, group);
  g.append(title, note);
  into.append(g);
  found.boxes.push({ element: g, ...box, group });
}

function drawOpen(model, view, group, box, into, found) {
  const kind = group.kind === "lane" ? "lane" : "open " + group.kind;
  const g = el("g", {
    class: `frame ${kind} ${laneOf(model, group.lane)}`, "data-group": group.id,
    "data-box": boxText(box),
  });
  g.append(el("rect", { x: box.x, y: box.y, width: box.w, height: box.h, rx: 9 }));
  const head = el("g", { class: "head" });
  head.append(el("rect", { class: "grip", x: box.x, y: box.y, width: box.w, height: HEAD, rx: 9 }));
  const folds = group.kind !== "lane";
  const title = el("text", { x: box.x + (folds ? 24 : 12), y: box.y + 17, class: "title start" });
  title.textContent = short(group.label, 30);
  if (folds) head.append(triangle(box.x + 14, box.y + 13, true));
  const note = el("text", { x: box.x + box.w - 12, y: box.y + 17, class: "small end" });
  note.textContent = groupNote(model, view, group);
  head.append(title, note);
  g.append(head);
  into.append(g);
  found.boxes.push({ element: g, ...box, h: HEAD, group, frame: true });
}

function triangle(x, y, down) {
  const d = down ? `M${x - 4},${y - 3}h8l-4,6z` : `M${x - 3},${y - 4}v8l6,-4z`;
  return el("path", { class: "turn", d });
}

function boxText(b) {
  return [b.x, b.y, b.w, b.h].map((v) => v.toFixed(1)).join(" ");
}

function curve(points) {
  let d = `M${points[0][0].toFixed(1)},${points[0][1].toFixed(1)}`;
  for (let i = 1; i < points.length; i++) {
    const [x0, y0] = points[i - 1], [x, y] = points[i];
    if (x0 === x) d += `V${y.toFixed(1)}`;
    else {
      const m = (y0 + y) / 2;
      d += `C${x0.toFixed(1)},${m.toFixed(1)} ${x.toFixed(1)},${m.toFixed(1)} ${x.toFixed(1)},${y.toFixed(1)}`;
    }
  }
  return d;
}

function drawLinks(model, group, layout, x0, y0, into, taken, found) {
  const labels = [], said = new Set();
  group.links.forEach((entry, i) => {
    const points = layout.routes[i].map(([x, y]) => [x + x0, y + y0]);
    const total = [...entry.values].reduce((s, v) => s + model.nodes[v].nbytes, 0);
    const width = Math.min(5, 1 + Math.log2(1 + total / 65536) / 3).toFixed(1);
    const g = el("g", { class: "link" });
    g.append(el("path", { d: curve(points), "stroke-width": width, "marker-end": "url(#arrow)" }));
    into[0].append(g);
    const one = entry.values.size === 1 ? entry.from + " " + [...entry.values][0] : "";
    const text = linkText(model, entry), w = SMALL * text.length + 4;
    const at = one && said.has(one) ? null : freePlace(points, w, [...taken, ...labels], [x0, x0 + layout.w]);
    if (one && at) said.add(one);
    const label = el("text", { class: at ? "edge" : "edge more" });
    label.textContent = text;
    const [cx, cy] = at || middle(points);
    label.setAttribute("x", cx.toFixed(1));
    label.setAttribute("y", (cy + 3.5).toFixed(1));
    if (at) {
      const box = { x: cx - w / 2, y: cy - 6, w, h: 12 };
      labels.push(box);
      label.setAttribute("data-box", boxText(box));
    }
    into[1].append(label);
    addLink(found, g, [label], entry.values);
  });
}

function addLink(found, element, labels, values) {
  element.dataset.link = found.links.length;
  found.links.push({ element, labels, values });
}

function middle(points) {
  const k = Math.floor((points.length - 1) / 2), [a, b] = [points[k], points[Math.min(k + 1, points.length - 1)]];
  return [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2];
}

function freePlace(points, w, taken, [left, right]) {
  // Somewhere on the edge, in a gap between rows, where a label hides nothing.
  for (let k = 1; k < points.length; k++) {
    const [xa, ya] = points[k - 1], [xb, yb] = points[k];
    if (Math.abs(yb - ya) < GAP_Y - 2 || Math.abs(yb - ya) > GAP_Y + 2) continue;
    for (const t of [0.5, 0.22, 0.78]) {
      const s = t * t * (3 - 2 * t);  // about where the curve is
      const y = ya + (yb - ya) * t, onIt = xa + (xb - xa) * s;
      const x = Math.min(Math.max(onIt, left + w / 2), right - w / 2);
      const box = { x: x - w / 2, y: y - 6, w, h: 12 };
      if (!taken.some((b) => overlap(box, b, 1))) return [x, y];
    }
  }
  return null;
}

function overlap(a, b, by) {
  return a.x < b.x + b.w + by && b.x < a.x + a.w + by && a.y < b.y + b.h + by && b.y < a.y + a.h + by;
}

function drawLanes(model, view, root, found) {
  // What goes from one phase to another: an arrow between the lanes, and how much that is.
  const into = el("g", { class: "links between" });
  for (const entry of view.root.links) {
    const [a, b] = [root.boxes[entry.from], root.boxes[entry.to]];
    const [d, x, y] = betweenLanes(a, b, entry.to > entry.from);
    const g = el("g", { class: "link" });
    g.append(el("path", { d, "stroke-width": 1.5, "marker-end": "url(#arrow)" }));
    linkText(model, entry).split(" · ").forEach((part, i) => {
      const label = el("text", { class: "edge", x, y: y - 5 + 16 * i });
      label.textContent = part;
      g.append(label);
    });
    into.append(g);
    addLink(found, g, [], entry.values);
  }
  found.element.append(into);
}

function betweenLanes(a, b, onward) {
  // The path of an arrow, and the middle of its label.
  if (a.x === b.x) {
    const x = a.x + 60 + (onward ? 0 : 90), from = HEAD + (onward ? a.y + a.h : a.y);
    const to = HEAD + (onward ? b.y : b.y + b.h);
    return [`M${x},${from}V${to}`, x, (from + to) / 2];
  }
  const y = HEAD + 13 + (onward ? 0 : 34) + (a.x < b.x ? b.y : a.y);
  const [left, right] = a.x < b.x ? [a, b] : [b, a];
  const edge = left.x + left.w, middle = (edge + right.x) / 2;
  const beside = y < HEAD + left.y + left.h - 12;
  const way = beside ? [[edge, y], [right.x, y]] : [[edge - 30, HEAD + left.y + left.h], [edge - 30, y], [right.x, y]];
  if (!onward) way.reverse();
  return ["M" + way.map((p) => p.join(",")).join("L"), middle, y];
}

function overlayOf(found, reps, pairs) {
  // Direct lines between the boxes that stand for some nodes: what is selected, and what it touches.
  const g = el("g", { class: "overlay" }), drawn = new Set();
  for (const [from, to] of pairs) {
    const a = reps(from), b = reps(to);
    if (!a || !b || a === b) continue;
    const key = a.element.dataset.box + b.element.dataset.box;
    if (drawn.has(key) || drawn.size > 80) continue;
    drawn.add(key);
    const x0 = a.x + a.w / 2, y0 = a.y + a.h, x = b.x + b.w / 2, y = b.y;
    const bend = Math.max(30, Math.abs(y - y0) / 2);
    g.append(el("path", {
      d: `M${x0},${y0}C${x0},${y0 + bend} ${x},${y - bend} ${x},${y}`, "marker-end": "url(#arrow)",
    }));
  }
  return g;
}
