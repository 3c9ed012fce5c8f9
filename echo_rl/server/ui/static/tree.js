// The live super-tree: a column a step, a row a request. In each cell the verified tree of that request, depth from
// left to right, the drafter's likeliest child on top. What the target accepted is lit; the ring is its own token.

import { draw, short } from "./dom.js";

const HEAD = 20, GAIN = 42, PAD = 11, TAIL = 15;
const MOST_ROWS = 24;
const KEPT = 40; // columns; more than fit on any screen

export class TreeView {
  constructor(stage, empty) {
    Object.assign(this, { stage, empty, columns: [], slots: new Map(), shape: "" });
    this.svg = draw("svg", { role: "img", "aria-label": "No step yet" });
    this.frame = draw("g");
    this.cols = draw("svg", { x: 0, y: 0, height: "100%" }); // cuts off what has yet to slide in
    this.rim = draw("g");
    this.svg.append(fadeIn(), this.frame, this.cols, this.rim);
    stage.append(this.svg);
    new ResizeObserver(() => this.render()).observe(stage);
  }

  /** Adds the step as the newest column. */
  show(step) {
    const trees = step.trees.slice(0, MOST_ROWS);
    this.#assignSlots(trees);
    const cells = trees.map((tree) => ({ slot: this.slots.get(tree.id), tree, place: layout(tree) }));
    this.columns.push({ step, cells, node: null, deep: Math.max(1, ...cells.map(({ place }) => place.deep)) });
    this.columns = this.columns.slice(-KEPT);
    this.render();
  }

  clear() {
    this.columns = [];
    this.slots.clear();
    this.shape = "";
    for (const group of [this.frame, this.cols, this.rim]) group.replaceChildren();
  }

  /** Draws what is new; all of it only where the rows, the depth or the room changed. */
  render() {
    const { width, height } = this.stage.getBoundingClientRect();
    this.empty.hidden = this.columns.length > 0;
    if (!width || !this.columns.length) return;
    this.label = width < 500 ? 46 : 84;
    const shape = this.#measure(width, height);
    if (shape !== this.shape) {
      this.cols.replaceChildren();
      for (const column of this.columns) column.node = null;
      this.shape = shape;
      this.#drawFrame(width, height);
    }
    const fit = Math.ceil((width - this.label - GAIN) / this.column) + 1;
    const shown = this.columns.slice(-fit);
    for (const column of this.columns.slice(0, -fit)) {
      column.node?.remove();
      column.node = null;
    }
    this.#place(shown, width);
    this.#drawRim(shown, width);
  }

  /** A request keeps its row while it runs; the next one takes the topmost free row. */
  #assignSlots(trees) {
    const here = new Set(trees.map((tree) => tree.id));
    for (const id of this.slots.keys()) if (!here.has(id)) this.slots.delete(id);
    const taken = new Set(this.slots.values());
    let next = 0;
    for (const { id } of trees) {
      if (this.slots.has(id)) continue;
      while (taken.has(next)) next += 1;
      taken.add(next);
      this.slots.set(id, next);
    }
  }

  /** Sets the sizes, and names them: the same name needs no new drawing. */
  #measure(width, height) {
    const recent = this.columns.slice(-12);
    const rows = Math.max(1, ...recent.flatMap(({ cells }) => cells.map(({ slot }) => slot + 1)));
    const deep = Math.max(...recent.map((column) => column.deep));
    const room = width - this.label - GAIN;
    this.rows = rows;
    this.row = (height - HEAD) / rows;
    this.scale = Math.max(0.75, Math.min(1.9, this.row / 40));
    this.dx = Math.max(7, Math.min(15 * this.scale, (room / 3 - PAD - TAIL) / deep));
    this.column = PAD + deep * this.dx + TAIL;
    return [width, height, rows, deep].join();
  }

  #place(shown, width) {
    const right = width - GAIN;
    this.cols.setAttribute("width", right);
    shown.forEach((column, i) => {
      const x = right - (shown.length - i) * this.column;
      if (!column.node) {
        column.node = this.#drawColumn(column);
        column.node.style.transform = `translate(${i === shown.length - 1 ? x + 0.4 * this.column : x}px, 0)`;
        if (i === shown.length - 1) column.node.classList.add("new");
        this.cols.append(column.node);
        column.node.getBoundingClientRect(); // lets the transition start from here
        column.node.classList.remove("new");
      }
      column.node.style.transform = `translate(${x}px, 0)`;
    });
  }

  #drawColumn({ step, cells }) {
    const group = draw("g", { class: "col", "data-verified": step.verified, "data-accepted": step.accepted });
    const title = step.budget ? `${step.verified}/${step.budget}` : "plain";
    group.append(draw("text", { x: PAD - 3, y: 11 }, title));
    for (const cell of cells) group.append(this.#drawCell(cell));
    if (!cells.length) group.append(draw("line", { class: "bare", x1: PAD, x2: PAD, y1: HEAD + 6, y2: HEAD + this.rows * this.row - 6 }));
    return group;
  }

  #drawCell({ slot, tree, place }) {
    const gap = place.rows > 1 ? Math.min(11 * this.scale, (this.row - 9) / (place.rows - 1)) : 0;
    const middle = HEAD + (slot + 0.5) * this.row;
    const x = (depth) => PAD + depth * this.dx;
    const y = (line) => middle + (line - (place.rows - 1) / 2) * gap;
    const small = Math.max(1.1, Math.min(2.1 * Math.sqrt(this.scale), gap ? 0.36 * gap : 9));
    const large = Math.max(2, Math.min(3.1 * Math.sqrt(this.scale), gap ? 0.46 * gap : 9));
    const spot = (i) => (i < 0 ? [x(0), y(place.root)] : [x(place.depth[i]), y(place.line[i])]);
    const lit = new Set(tree.accepted);
    const dim = tree.parents.map((_, i) => i).filter((i) => !lit.has(i));
    const own = [x(tree.accepted.length + 1), y(place.own)];
    const way = [spot(-1), ...tree.accepted.map(spot), own].map((p, i, all) => (i ? bend(all[i - 1], p) : `M${p.join(" ")}`)).join("");
    const cell = draw("g", {}, draw("title", {}, describe(tree)));
    cell.append(
      draw("path", { class: "edge", d: dim.map((i) => `M${spot(tree.parents[i]).join(" ")}${bend(spot(tree.parents[i]), spot(i))}`).join("") }),
      draw("path", { class: "node", d: dim.map((i) => disc(...spot(i), small)).join("") }),
      draw("path", { class: "glow", d: way }),
      draw("path", { class: "path", d: way }),
      draw("circle", { class: "root", cx: x(0), cy: y(place.root), r: small }),
      ...tree.accepted.map((i) => draw("circle", { class: "hit", cx: spot(i)[0], cy: spot(i)[1], r: large })),
      draw("circle", { class: "own", cx: own[0], cy: own[1], r: large - 0.5 }),
    );
    return cell;
  }

  #drawFrame(width, height) {
    const lines = Array.from({ length: this.rows + 1 }, (_, i) => Math.round(HEAD + i * this.row));
    const band = draw("rect", { class: "band", x: width - GAIN - this.column, y: 0, width: this.column, height, rx: 6 });
    this.frame.replaceChildren(band, ...lines.slice(0, -1).map((y) => draw("line", { class: "rule", x1: 0, x2: width, y1: y, y2: y })));
  }

  /** Names at the left, over a veil that older columns fade into; tokens a step at the right. */
  #drawRim(shown, width) {
    const narrow = this.label < 84;
    const texts = [draw("text", { x: 0, y: 11 }, narrow ? "nodes" : "verified/budget"), draw("text", { x: width, y: 11, "text-anchor": "end" }, "tokens")];
    for (const [id, slot] of this.slots) {
      const y = HEAD + (slot + 0.5) * this.row + 4;
      const mine = shown.flatMap(({ cells }) => cells.filter(({ tree }) => tree.id === id));
      const gain = mine.reduce((sum, { tree }) => sum + tree.accepted.length + 1, 0) / mine.length;
      texts.push(draw("text", { class: "mono", x: 0, y }, brief(id, narrow ? 4 : 8)), draw("text", { class: "gain", x: width, y, "text-anchor": "end" }, short(gain)));
    }
    const veil = draw("rect", { x: 0, y: 0, width: this.label + 34, height: "100%", fill: "url(#veil)" });
    this.rim.replaceChildren(veil, ...texts);
    this.svg.setAttribute("aria-label", summary(shown.at(-1)));
  }
}

/** Each node's line and depth: leaves take lines from top to bottom, a parent stands in the middle of its children. */
export function layout({ parents, accepted }) {
  const count = parents.length; // the target's own token is node `count`, a child of the last accepted one
  const root = count + 1;
  const children = Array.from({ length: count + 2 }, () => []);
  const depth = parents.map(() => 1);
  parents.forEach((parent, i) => {
    children[parent < 0 ? root : parent].push(i);
    if (parent >= 0) depth[i] = depth[parent] + 1;
  });
  children[accepted.at(-1) ?? root].push(count);
  const line = [];
  let rows = 0;
  const visit = (node) => {
    const below = children[node];
    below.forEach(visit);
    line[node] = below.length ? (line[below[0]] + line[below.at(-1)]) / 2 : rows++;
  };
  visit(root);
  return { line, depth, rows, root: line[root], own: line[count], deep: Math.max(accepted.length + 1, ...depth) };
}

function describe({ id, parents, accepted, drafted_depth }) {
  return `${id}: ${parents.length} verified, ${accepted.length} accepted, drafted to depth ${drafted_depth}`;
}

function summary({ step, cells }) {
  const many = `Super-tree of the last step shown: ${step.batch} requests, `;
  return many + (step.budget ? `${step.verified} of ${step.budget} nodes verified, ${step.accepted} accepted, ` : "plain decoding, ")
    + `${step.committed} tokens${cells.length < step.batch ? `; ${step.batch - cells.length} requests are not drawn` : ""}`;
}

const brief = (id, most) => (id.length > most + 1 ? `…${id.slice(-most)}` : id);
const disc = (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`;

function bend([x0, y0], [x1, y1]) {
  if (y0 === y1) return `L${x1} ${y1}`;
  const x = x0 + 0.55 * (x1 - x0);
  return `C${x} ${y0} ${x} ${y1} ${x1} ${y1}`;
}

function fadeIn() {
  const stops = [[0, 1], [0.74, 1], [1, 0]].map(([offset, opacity]) => draw("stop", { class: "veil", offset, "stop-opacity": opacity }));
  return draw("defs", {}, draw("linearGradient", { id: "veil" }, ...stops));
}
