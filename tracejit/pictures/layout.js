"use strict";
// Layered drawing of one level of a graph. In: boxes {w, h}, in an order in which edges go forward as
// far as they can, and edges [from, to] between them. Out: {x, y} of each box, a list of points for
// each edge, and the size of the whole.
//
//   layers (longest path) → rows of at most WIDE boxes, about BROAD wide → places for edges that pass rows
//   → order in the rows (barycenters) → x (least squares without overlap) → y

const GAP_X = 18, GAP_Y = 42, PASS = 10, WIDE = 7, BROAD = 1200, SWEEPS = 6;

function layered(boxes, edges) {
  const n = boxes.length;
  if (!n) return { places: [], routes: [], w: 0, h: 0 };
  const down = edges.map(([a, b]) => (a < b ? [a, b] : [b, a]));  // an edge back is drawn upward
  const ins = boxes.map(() => []), outs = boxes.map(() => []);
  for (const [a, b] of down) { outs[a].push(b); ins[b].push(a); }
  const rows = rowsOf(boxes, layersOf(n, ins, outs));
  const row = new Array(n);
  rows.forEach((some, r) => some.forEach((i) => (row[i] = r)));

  // items: the boxes, then places for edges that pass a row, one for all from the same box; chains:
  // the items along each edge
  const items = boxes.map((b) => ({ w: b.w, h: b.h, up: [], down: [], x: 0 }));
  const grid = rows.map((some) => [...some]), trunks = new Map();
  const chains = down.map(([a, b]) => {
    const chain = [a];
    for (let r = row[a] + 1; r < row[b]; r++) {
      const key = a * rows.length + r;
      if (!trunks.has(key)) {
        trunks.set(key, items.length);
        grid[r].push(items.length);
        items.push({ w: PASS, h: 0, up: [], down: [], x: 0, passes: true });
      }
      chain.push(trunks.get(key));
    }
    chain.push(b);
    for (let i = 1; i < chain.length; i++) {
      if (items[chain[i - 1]].down.includes(chain[i])) continue;
      items[chain[i - 1]].down.push(chain[i]);
      items[chain[i]].up.push(chain[i - 1]);
    }
    return chain;
  });
  order(grid, items);
  place(grid, items);

  const tops = [], heights = grid.map((some) => Math.max(...some.map((i) => items[i].h), 0));
  let y = 0;
  heights.forEach((h, r) => { tops[r] = y; y += h + GAP_Y; });
  const left = Math.min(...items.map((it) => it.x - it.w / 2));
  const right = Math.max(...items.map((it) => it.x + it.w / 2));
  const rowOf = new Array(items.length);
  grid.forEach((some, r) => some.forEach((i) => (rowOf[i] = r)));
  const places = boxes.map((b, i) => ({
    x: items[i].x - b.w / 2 - left,
    y: tops[row[i]],
  }));
  const routes = chains.map((chain, e) => {
    const points = [];
    chain.forEach((i, k) => {
      const x = items[i].x - left, r = rowOf[i];
      const top = tops[r], bottom = top + heights[r];
      if (k === 0) points.push([x, places[i].y + boxes[i].h], [x, bottom]);
      else if (k === chain.length - 1) points.push([x, top]);
      else points.push([x, top], [x, bottom]);
    });
    return edges[e][0] < edges[e][1] ? points : points.reverse();
  });
  return { places, routes, w: right - left, h: y - GAP_Y };
}

function layersOf(n, ins, outs) {
  // The longest path from above; what nothing comes before goes down to where it is read.
  const layer = new Array(n).fill(0);
  for (let i = 0; i < n; i++) for (const a of ins[i]) layer[i] = Math.max(layer[i], layer[a] + 1);
  for (let i = n - 1; i >= 0; i--) {
    if (!ins[i].length && outs[i].length) {
      layer[i] = Math.min(...outs[i].map((b) => layer[b])) - 1;
    }
  }
  return layer;
}

function rowsOf(boxes, layer) {
  const layers = [];
  layer.forEach((l, i) => (layers[l] = layers[l] || []).push(i));
  const rows = [];
  for (const some of layers) {
    if (!some) continue;
    const total = some.reduce((s, i) => s + boxes[i].w + GAP_X, 0);
    const count = Math.max(Math.ceil(some.length / WIDE), Math.ceil(total / BROAD));
    let row = [], w = 0;
    for (const i of some) {
      if (row.length && (row.length >= some.length / count || w + boxes[i].w / 2 > total / count)) {
        rows.push(row);
        row = [];
        w = 0;
      }
      row.push(i);
      w += boxes[i].w + GAP_X;
    }
    rows.push(row);
  }
  return rows;
}

function order(grid, items) {
  const at = new Array(items.length);
  const note = (some) => some.forEach((i, k) => (at[i] = k));
  grid.forEach(note);
  let best = grid.map((some) => [...some]), fewest = crossings(grid, items, at);
  for (let sweep = 0; sweep < SWEEPS && fewest > 0; sweep++) {
    const downward = sweep % 2 === 0;
    for (const some of downward ? grid : [...grid].reverse()) {
      const key = new Map(some.map((i) => {
        const near = downward ? items[i].up : items[i].down;
        return [i, near.length ? near.reduce((s, k) => s + at[k], 0) / near.length : at[i]];
      }));
      some.sort((a, b) => key.get(a) - key.get(b) || at[a] - at[b]);
      note(some);
    }
    const now = crossings(grid, items, at);
    if (now < fewest) { fewest = now; best = grid.map((some) => [...some]); }
  }
  best.forEach((some, r) => (grid[r] = some));
}

function crossings(grid, items, at) {
  let count = 0;
  for (const some of grid) {
    const ends = [];
    for (const i of some) for (const k of [...items[i].down].sort((a, b) => at[a] - at[b])) ends.push(at[k]);
    if (ends.length > 400) return ends.length;  // not worth the time
    for (let i = 0; i < ends.length; i++) for (let k = 0; k < i; k++) if (ends[k] > ends[i]) count++;
  }
  return count;
}

function place(grid, items) {
  // Each row in turn as near as it can be to the rows beside it; the order stays.
  for (const some of grid) {
    let x = 0;
    for (const i of some) { items[i].x = x + items[i].w / 2; x += items[i].w + GAP_X; }
    for (const i of some) items[i].x -= (x - GAP_X) / 2;
  }
  for (let sweep = 0; sweep < 2 * SWEEPS; sweep++) {
    const downward = sweep % 2 === 0;
    for (const some of downward ? grid : [...grid].reverse()) {
      const wanted = some.map((i) => {
        const near = downward ? items[i].up : items[i].down;
        return near.length ? near.reduce((s, k) => s + items[k].x, 0) / near.length : items[i].x;
      });
      const weights = some.map((i) => (items[i].passes ? 4 : 1));
      settle(some.map((i) => items[i].w), wanted, weights).forEach((x, k) => (items[some[k]].x = x));
    }
  }
}

function settle(widths, wanted, weights) {
  // Centers that are nearest to those that are wanted, GAP_X apart: blocks that would overlap are
  // one block (pool adjacent violators).
  const shift = [];
  let sum = 0;
  widths.forEach((w, i) => {
    sum += i ? (widths[i - 1] + w) / 2 + GAP_X : 0;
    shift.push(sum);
  });
  const blocks = [];
  wanted.forEach((x, i) => {
    let block = { mean: x - shift[i], weight: weights[i], count: 1 };
    while (blocks.length && blocks[blocks.length - 1].mean >= block.mean) {
      const last = blocks.pop(), weight = last.weight + block.weight;
      block = {
        mean: (last.mean * last.weight + block.mean * block.weight) / weight,
        weight,
        count: last.count + block.count,
      };
    }
    blocks.push(block);
  });
  const found = [];
  for (const b of blocks) for (let k = 0; k < b.count; k++) found.push(b.mean + shift[found.length]);
  return found;
}
