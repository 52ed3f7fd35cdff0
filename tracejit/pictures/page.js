"use strict";
// The page: what is shown, and what keys, mouse and search do. Layout, model and drawing stand above.

const $ = (id) => document.getElementById(id);

function html(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children.filter((c) => c !== null));
  return made;
}

function start(data) {
  const model = makeModel(data), svg = $("graph"), stage = $("stage");
  const state = { name: "module", at: null, found: null, view: null, hits: [], hit: -1, focus: null };
  $("views").checked = data.showViews;
  let zoom = { k: 1, x: 0, y: 0 }, moved = false;  // by whoever looks at it

  // ---- the drawing

  function apply() {
    stage.setAttribute("transform", `translate(${zoom.x},${zoom.y}) scale(${zoom.k})`);
    svg.classList.toggle("far", zoom.k < 0.45);
  }

  function redraw(keep) {
    // Draw what is open now; a group stays where it is on the screen if it is to be kept.
    const before = keep && boxOfGroup(keep);
    state.view = makeView(model, state.name, !$("views").checked);
    if (model.nodes.length && !state.view.root.children.length) {  // there is nothing but views
      $("views").checked = true;
      state.view = makeView(model, state.name, false);
    }
    state.found = drawView(model, state.view);
    stage.replaceChildren(state.found.element);
    state.reps = new Map();
    for (const b of state.found.boxes) {
      if (b.node !== undefined) state.reps.set("n" + b.node, b);
      else state.reps.set("g" + b.group.id, b);
    }
    const after = keep && boxOfGroup(keep);
    if (before && after) {
      zoom.x += (before.x - after.x) * zoom.k;
      zoom.y += (before.y - after.y) * zoom.k;
    }
    apply();
    mark();
    $("count").textContent = `${state.found.boxes.filter((b) => !b.frame).length} boxes of ${model.nodes.length} nodes`;
    document.body.dataset.drawn = state.found.boxes.length;
  }

  function boxOfGroup(group) {
    return state.reps && state.reps.get("g" + group.id);
  }

  function rep(id) {
    // The box that stands for a node: its own, or that of the folded group that it is in.
    const own = state.reps.get("n" + id);
    if (own) return own;
    const way = state.view.home[id] ? pathTo(state.view, id) : [];
    for (const g of way.reverse()) if (!g.open) return state.reps.get("g" + g.id);
    return null;
  }

  function fit(all) {
    const { w, h } = state.found, r = svg.getBoundingClientRect();
    const across = (r.width - 40) / w, whole = Math.min(across, (r.height - 60) / (h + 40));
    const k = Math.min(1.15, all ? whole : Math.max(across, 0.66));
    const first = state.found.boxes.find((b) => !b.frame);
    const x = w * k <= r.width ? (r.width - w * k) / 2 : Math.min(20, r.width / 2 - k * (first ? first.x : 0));
    zoom = { k, x: all ? (r.width - w * k) / 2 : x, y: 20 + 30 * k };
    apply();
  }

  function scaled(factor, cx, cy) {
    const r = svg.getBoundingClientRect();
    if (cx === undefined) { cx = r.width / 2; cy = r.height / 2; }
    const k = Math.min(4, Math.max(0.03, zoom.k * factor));
    zoom = { k, x: cx - ((cx - zoom.x) * k) / zoom.k, y: cy - ((cy - zoom.y) * k) / zoom.k };
    apply();
  }

  function show(box) {
    // Move so far that a box is on the screen.
    if (!box) return;
    const r = svg.getBoundingClientRect();
    const x = zoom.x + (box.x + box.w / 2) * zoom.k, y = zoom.y + (box.y + box.h / 2) * zoom.k;
    if (zoom.k < 0.5) { scaled(0.8 / zoom.k, x, y); return show(box); }
    if (x < 60 || x > r.width - 60 || y < 60 || y > r.height - 60) {
      zoom.x += r.width / 2 - x;
      zoom.y += r.height / 2 - y;
      apply();
    }
  }

  function toggle(group, open) {
    group.open = open === undefined ? !group.open : open;
    forget(state.view, group);
    redraw(group);
  }

  function setAll(open) {
    // Unfold all (where that are not too many boxes, as far as they go), or fold all.
    const groups = state.view.groups;
    for (const g of groups) if (g.kind !== "lane") g.open = false;
    if (open) {
      let shown = 0, level = state.view.root.children;
      while (level.length && shown < 3000) {
        const next = [];
        for (const g of level) { g.open = true; shown += g.children.length; next.push(...g.children.filter((c) => typeof c !== "number")); }
        level = next;
      }
    }
    state.view.layouts.clear();
    redraw();
    fit(false);
  }

  // ---- what is pointed at

  function mark() {
    // Light up the boxes, lines and kernels of some nodes.
    const nodes = state.hot || state.pinned;
    document.body.classList.toggle("lit", !!nodes);
    for (const e of document.querySelectorAll(".hot,.near")) e.classList.remove("hot", "near");
    stage.querySelector(".overlay")?.remove();
    if (!nodes) return;
    const pairs = [];
    for (const id of nodes) {
      rep(id)?.element.classList.add("hot");
      if (nodes.size > 60) continue;
      for (const a of state.view.operands[id]) pairs.push([a, id]);
      for (const b of model.nodes[id].readers) if (state.view.operands[b].includes(id)) pairs.push([id, b]);
    }
    for (const id of pairs.flat()) rep(id)?.element.classList.add("near");
    for (const l of state.found.links) {
      if (nodes.size <= 60 && [...l.values].some((v) => nodes.has(v))) lightLink(l, true);
    }
    state.found.element.append(overlayOf(state.found, rep, pairs));
    lightPanels(model, nodes);
  }

  function lightLink(link, on) {
    for (const e of [link.element, ...link.labels]) e.classList.toggle("hot", on);
  }

  function nodesOf(box) {
    if (box.node !== undefined) return new Set([box.node]);
    const found = new Set();
    const walk = (g) => g.children.forEach((c) => (typeof c === "number" ? found.add(c) : walk(c)));
    walk(box.group);
    return found;
  }

  function boxAt(target) {
    const g = target.closest?.("[data-node],[data-group]");
    if (!g) return null;
    return state.reps.get(g.dataset.node !== undefined ? "n" + g.dataset.node : "g" + g.dataset.group);
  }

  function hover(nodes) {
    state.hot = nodes;
    mark();
  }

  function pin(nodes, box) {
    state.pinned = nodes;
    state.hot = null;
    mark();
    showDetail(model, box && box.node !== undefined ? model.nodes[box.node] : null, choose);
  }

  function focusOn(box) {
    state.focus = box;
    for (const e of stage.querySelectorAll(".focus")) e.classList.remove("focus");
    if (!box) return;
    box.element.classList.add("focus");
    const n = box.node !== undefined ? model.nodes[box.node] : null;
    $("said").textContent = n ? `${n.name}, ${n.type}, ${LANES[n.lane]}` : `${box.group.label}, ${groupNote(model, state.view, box.group)}`;
  }

  function choose(id) {
    // Go to a node: open what it is in.
    const way = state.view.home[id] ? pathTo(state.view, id) : [];
    if (!way.length) {
      $("views").checked = true;
      redraw();
      return state.view.home[id] && choose(id);
    }
    for (const g of way) g.open = true;
    for (const g of way) forget(state.view, g);
    redraw();
    const box = rep(id);
    pin(new Set([id]), box);
    focusOn(box);
    show(box);
  }

  // ---- search

  function search(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    state.hits = !words.length ? [] : model.nodes.filter((n) => {
      const line = n.line >= 0 ? model.lines[n.line][2] : "";
      const own = [n.name, n.op, n.type, n.module, n.kind, line, LANES[n.lane], ...n.leaves, ...n.kernels.map((k) => "k" + k)];
      const whole = own.join(" ").toLowerCase();
      return words.every((w) => (/^k\d+$/.test(w) ? own.includes(w) : whole.includes(w)));
    }).map((n) => n.id);
    state.hit = -1;
    $("hits").textContent = words.length ? `${state.hits.length} found` : "";
    state.pinned = state.hits.length ? new Set(state.hits) : null;
    mark();
  }

  function nextHit(step) {
    if (!state.hits.length) return;
    state.hit = (state.hit + step + state.hits.length) % state.hits.length;
    choose(state.hits[state.hit]);
    $("hits").textContent = `${state.hit + 1} of ${state.hits.length}`;
  }

  // ---- mouse

  let drag = null;
  svg.addEventListener("pointerdown", (e) => {
    drag = { x: e.clientX, y: e.clientY, from: { ...zoom }, moved: false };
  });
  window.addEventListener("pointermove", (e) => {
    if (!drag) return;
    const dx = e.clientX - drag.x, dy = e.clientY - drag.y;
    drag.moved = drag.moved || Math.hypot(dx, dy) > 4;
    moved = moved || drag.moved;
    if (drag.moved) { zoom = { k: drag.from.k, x: drag.from.x + dx, y: drag.from.y + dy }; apply(); }
  });
  window.addEventListener("pointerup", (e) => {
    const was = drag;
    drag = null;
    if (!was || was.moved || !svg.contains(e.target)) return;
    const box = boxAt(e.target);
    focusOn(box);
    if (!box) return pin(null, null);
    if (box.group && (!box.frame || e.target.closest(".head"))) {
      if (box.group.kind !== "lane") toggle(box.group);
      pin(null, null);
    } else if (box.node !== undefined) pin(nodesOf(box), box);
  });
  svg.addEventListener("wheel", (e) => {
    e.preventDefault();
    moved = true;
    const r = svg.getBoundingClientRect();
    if (e.ctrlKey || e.metaKey || !e.shiftKey && Math.abs(e.deltaX) < 1 && e.deltaMode === 0 && Math.abs(e.deltaY) >= 50) {
      scaled(Math.exp(-e.deltaY / 400), e.clientX - r.left, e.clientY - r.top);
    } else { zoom.x -= e.deltaX; zoom.y -= e.deltaY; apply(); }
  }, { passive: false });
  svg.addEventListener("pointerover", (e) => {
    if (drag) return;
    const on = e.target.closest("[data-link]");
    if (state.link) lightLink(state.link, false);
    state.link = on && state.found.links[on.dataset.link];
    if (state.link) lightLink(state.link, true);
    const box = boxAt(e.target);
    hover(box && !box.frame ? nodesOf(box) : null);
  });
  svg.addEventListener("pointerleave", () => hover(null));

  // ---- keys

  const ways = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
  function step([dx, dy]) {
    const here = state.focus && state.reps.get(state.focus.node !== undefined ? "n" + state.focus.node : "g" + state.focus.group.id);
    const boxes = state.found.boxes;
    if (!here) { focusOn(boxes[0]); show(boxes[0]); return; }
    let best = null, least = Infinity;
    for (const b of boxes) {
      const x = b.x + b.w / 2 - here.x - here.w / 2, y = b.y + b.h / 2 - here.y - here.h / 2;
      const along = x * dx + y * dy, beside = Math.abs(x * dy) + Math.abs(y * dx);
      if (b === here || along < 4) continue;
      const far = along + 2.5 * beside;
      if (far < least) { least = far; best = b; }
    }
    if (best) { focusOn(best); hover(best.frame ? null : nodesOf(best)); show(best); }
  }
  svg.addEventListener("keydown", (e) => {
    if (ways[e.key]) step(ways[e.key]);
    else if ((e.key === "Enter" || e.key === " ") && state.focus) {
      const { group } = state.focus;
      if (group && group.kind !== "lane") { toggle(group); focusOn(boxOfGroup(group)); }
      else if (!group) pin(nodesOf(state.focus), state.focus);
    } else return;
    e.preventDefault();
  });
  document.addEventListener("keydown", (e) => {
    if (e.target.matches("input,select,textarea")) {
      if (e.key === "Escape") { e.target.blur(); svg.focus(); }
      return;
    }
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    if (e.key === "/") { $("search").focus(); e.preventDefault(); }
    else if (e.key === "+" || e.key === "=") scaled(1.25);
    else if (e.key === "-") scaled(0.8);
    else if (e.key === "0") fit(true);
    else if (e.key === "Escape") { pin(null, null); focusOn(null); }
  });
  $("search").addEventListener("input", (e) => search(e.target.value));
  $("search").addEventListener("keydown", (e) => e.key === "Enter" && nextHit(e.shiftKey ? -1 : 1));
  $("group").addEventListener("change", (e) => { state.name = e.target.value; state.focus = null; redraw(); fit(false); });
  $("views").addEventListener("change", () => { state.focus = null; redraw(); fit(false); });
  $("open").addEventListener("click", () => setAll(true));
  $("fold").addEventListener("click", () => setAll(false));
  $("fit").addEventListener("click", () => fit(true));
  $("in").addEventListener("click", () => scaled(1.25));
  $("out").addEventListener("click", () => scaled(0.8));
  for (const side of ["left", "right"]) {
    $("hide-" + side).addEventListener("click", (e) => {
      const off = document.body.classList.toggle("no-" + side);
      e.currentTarget.setAttribute("aria-pressed", String(!off));
      fit(false);
    });
  }

  makePanels(model, { hover, pin, choose, show: (nodes) => { for (const id of nodes) { const b = rep(id); if (b) return show(b); } } });
  if (location.hash.startsWith("#view=")) state.name = $("group").value = location.hash.slice(6);
  redraw();
  fit(false);
  window.addEventListener("resize", () => moved || fit(false));
}

window.addEventListener("error", (e) => {
  document.body.dataset.error = String(e.message);
});
start(JSON.parse($("data").textContent));
document.body.dataset.ready = "1";
