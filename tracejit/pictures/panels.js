"use strict";
// The panels beside the graph: the user's source on the left, kernels and a node's details on the
// right. What is pointed at in one of them lights up in all.

function makePanels(model, go) {
  const ofLine = new Map(), ofKernel = model.kernels.map(() => new Set());
  for (const n of model.nodes) {
    if (n.line >= 0) {
      if (!ofLine.has(n.line)) ofLine.set(n.line, new Set());
      ofLine.get(n.line).add(n.id);
    }
    for (const k of n.kernels) ofKernel[k].add(n.id);
  }
  Object.assign(model, { ofLine, ofKernel });
  makeSource(model, go);
  makeKernels(model, go);
  const rows = model.data.summary.map(([k, v]) => [html("dt", { textContent: k }), html("dd", { textContent: v })]);
  $("summary").append(...rows.flat());
  for (const text of model.data.notes) $("notes").append(html("p", { textContent: text }));
}

function hoverable(element, nodes, go) {
  element.addEventListener("pointerenter", () => go.hover(nodes));
  element.addEventListener("pointerleave", () => go.hover(null));
  element.addEventListener("focus", () => go.hover(nodes));
  element.addEventListener("blur", () => go.hover(null));
}

function makeSource(model, go) {
  const at = new Map();  // file, number -> which line
  model.lines.forEach(([file, number], i) => {
    const key = file + ":" + number;
    at.set(key, [...(at.get(key) || []), i]);
  });
  model.rowOfLine = new Map();
  model.data.files.forEach((file, f) => {
    const box = html("details", { open: f === 0 || model.data.files.length < 3, className: "file" });
    box.append(html("summary", { textContent: file.name, title: file.path }));
    const list = html("ol", {});
    list.style.setProperty("--digits", String(file.first + file.text.length).length);
    file.text.forEach((text, i) => {
      const row = html("li", {});
      row.append(html("span", { className: "no", textContent: file.first + i }));
      const code = html("div", {}, html("code", { textContent: text || " " }));
      row.append(code);
      const lines = at.get(f + ":" + (file.first + i)) || [];
      const nodes = new Set(lines.flatMap((l) => [...(model.ofLine.get(l) || [])]));
      if (nodes.size) {
        for (const l of lines) model.rowOfLine.set(l, row);
        const lanes = new Set([...nodes].map((id) => model.nodes[id].lane));
        const kernels = [...new Set([...nodes].flatMap((id) => model.nodes[id].kernels))].sort((a, b) => a - b);
        const bar = html("span", { className: "lanes" });
        for (const lane of [...lanes].sort()) bar.append(html("i", { className: LANES[lane] }));
        row.prepend(bar);
        if (kernels.length) code.append(chips(kernels, 4));
        row.className = "used";
        row.tabIndex = 0;
        row.title = `${nodes.size} nodes`;
        hoverable(row, nodes, go);
        const take = () => { go.pin(nodes, null); go.show(nodes); };
        row.addEventListener("click", take);
        row.addEventListener("keydown", (e) => e.key === "Enter" && take());
      }
      list.append(row);
    });
    box.append(list);
    $("source").append(box);
  });
  const first = model.nodes.length && model.rowOfLine.get(model.nodes[0].line);
  if (first) first.scrollIntoView({ block: "center" });
}

function chips(kernels, most) {
  const span = html("span", { className: "chips" });
  for (const k of kernels.slice(0, most)) span.append(html("b", { textContent: "k" + k }));
  if (kernels.length > most) span.append(html("b", { textContent: "+" + (kernels.length - most) }));
  return span;
}

function makeKernels(model, go) {
  const most = Math.max(0, ...model.kernels.map((k) => k.seconds || 0));
  model.cards = model.kernels.map((kernel, k) => {
    const nodes = model.ofKernel[k], box = html("details", { className: "kernel" });
    const lanes = html("span", { className: "lanes" });
    for (const lane of [...new Set([...nodes].map((id) => model.nodes[id].lane))].sort()) lanes.append(html("i", { className: LANES[lane] }));
    const time = kernel.cost.find(([name]) => name.startsWith("time"));
    const head = html("summary", {}, lanes, html("b", { textContent: kernel.name }),
      html("span", { className: "what", textContent: whatOf(model, nodes) || kernel.lines.join(" ") }),
      html("span", { className: "time", textContent: time ? time[1].split(" predicted")[0] : "" }));
    if (most) head.style.setProperty("--share", `${(100 * (kernel.seconds || 0)) / most}%`);
    box.append(head);
    box.addEventListener("toggle", () => {
      if (!box.open || box.childElementCount > 1) return;
      const cost = html("dl", {});
      for (const [name, text] of kernel.cost) cost.append(html("dt", { textContent: name }), html("dd", { textContent: text }));
      cost.append(html("dt", { textContent: "lines" }), html("dd", { textContent: kernel.lines.join(", ") }));
      box.append(cost, html("pre", { tabIndex: 0 }, html("code", { textContent: kernel.text })));
    });
    hoverable(box, nodes, go);
    hoverable(head, nodes, go);
    head.addEventListener("click", () => { go.pin(nodes, null); go.show(nodes); });
    return box;
  });
  $("kernels").append(...model.cards);
  $("kernel-count").textContent = `${model.kernels.length}`;
}

function whatOf(model, nodes) {
  // The operations of a kernel, products first, each once.
  const ops = [...new Set([...nodes].map((id) => model.nodes[id].op))];
  const heavy = (op) => (/matmul|attention|scan/.test(op) ? 0 : /reduce|gather|scatter|sort/.test(op) ? 1 : 2);
  return ops.sort((a, b) => heavy(a) - heavy(b)).slice(0, 4).join(" · ") + (ops.length > 4 ? " …" : "");
}

function lightPanels(model, nodes) {
  let row = null;
  for (const id of nodes) {
    const n = model.nodes[id], line = model.rowOfLine.get(n.line);
    if (line) { line.classList.add("hot"); row = row || line; }
    for (const k of n.kernels) model.cards[k].classList.add("hot");
  }
  if (nodes.size <= 60) {
    reveal(row);
    const first = [...nodes].flatMap((id) => model.nodes[id].kernels)[0];
    if (first !== undefined) reveal(model.cards[first]);
  }
}

function reveal(element) {
  // Scroll a panel so far that something in it is seen, unless the mouse is there.
  const panel = element && element.closest(".panel");
  if (!panel || panel.matches(":hover")) return;
  const a = panel.getBoundingClientRect(), b = element.getBoundingClientRect();
  if (b.top < a.top + 40 || b.bottom > a.bottom) panel.scrollTop += b.top - a.top - a.height / 3;
}

function showDetail(model, n, choose) {
  const box = $("detail");
  box.replaceChildren();
  box.hidden = !n;
  if (!n) return;
  const [file, number, text, called] = n.line >= 0 ? model.lines[n.line] : [-1, 0, "", ""];
  const rows = [
    ["operation", n.attrs ? `${n.op}(${n.attrs})` : n.op], ["result", `${n.type} · ${bytes(n.nbytes)}`],
    ["phase", LANES[n.lane]], ["module", n.module + (n.kind ? `  ${n.kind}` : "")],
    ["line", text + (called ? `  in ${called}` : "")], ["becomes", n.leaves.join(", ")],
  ];
  const list = html("dl", {});
  for (const [name, value] of rows) if (value.trim()) list.append(html("dt", { textContent: name }), html("dd", { textContent: value }));
  const near = (name, ids) => {
    if (!ids.length) return;
    const dd = html("dd", {});
    for (const id of ids.slice(0, 12)) {
      const button = html("button", { textContent: model.nodes[id].name, title: model.nodes[id].type });
      button.addEventListener("click", () => choose(id));
      dd.append(button);
    }
    if (ids.length > 12) dd.append(` and ${ids.length - 12} more`);
    list.append(html("dt", { textContent: name }), dd);
  };
  near("reads", n.operands);
  near("read by", n.readers);
  if (n.kernels.length) list.append(html("dt", { textContent: "kernels" }), html("dd", {}, chips(n.kernels, 8)));
  box.append(html("h2", { textContent: n.name }), list);
}
