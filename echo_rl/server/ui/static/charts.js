// A chart over the last minute, and the two pictures of shares: bars by depth, one bar of phases.

import { draw, make, percent, rough } from "./dom.js";

/** A guide so many times above all else does not stretch the axis: it runs along its upper end. */
const FAR = 4;
const TOP = 6, BOTTOM = 16, LEFT = 0, RIGHT = 2;

export class TimeChart {
  /** `series`: [{key, style, name, kind}], drawn in order; kind "area" fills below, "step" holds a value;
   *  a `guide` is there to compare the others with. */
  constructor(plot, readout, series, seconds) {
    Object.assign(this, { plot, readout, series, seconds, points: [], at: null });
    this.svg = draw("svg", { role: "img" });
    plot.append(this.svg);
    new ResizeObserver(() => this.render()).observe(plot);
    plot.addEventListener("pointermove", (event) => this.#point(event));
    plot.addEventListener("pointerleave", () => { this.at = null; this.render(); });
  }

  show(points) {
    this.points = points;
    this.render();
  }

  render() {
    const { width, height } = this.plot.getBoundingClientRect();
    if (!width || !this.points.length) return;
    this.width = width;
    const own = this.#most(false), guide = this.#most(true);
    const top = nice(Math.max(1, own, own && guide > FAR * own ? 0 : guide));
    const x = (i) => LEFT + ((width - LEFT - RIGHT) * i) / (this.points.length - 1);
    const y = (value) => TOP + (height - TOP - BOTTOM) * (1 - Math.min(1, value / top));
    const parts = [0, 0.5, 1].map((share) => rule(width, y(share * top)));
    for (const one of this.series) parts.push(...shapes(one, this.points.map((p) => p[one.key]), x, y));
    for (const share of [0.5, 1]) parts.push(label(2, y(share * top) + 11, tick(share * top)));
    parts.push(label(2, height - 4, `${this.seconds} s ago`), label(width - 2, height - 4, "now", "end"));
    if (this.at !== null) parts.push(draw("line", { class: "cursor", x1: x(this.at), x2: x(this.at), y1: TOP, y2: height - BOTTOM }));
    this.svg.replaceChildren(...parts);
    this.#read();
  }

  /** The largest value of the guides, or of all others. */
  #most(guides) {
    const keys = this.series.filter((s) => Boolean(s.guide) === guides).map((s) => s.key);
    return Math.max(0, ...this.points.flatMap((p) => keys.map((key) => p[key] ?? 0)));
  }

  #point(event) {
    const share = (event.clientX - this.plot.getBoundingClientRect().left - LEFT) / (this.width - LEFT - RIGHT);
    this.at = Math.max(0, Math.min(this.points.length - 1, Math.round(share * (this.points.length - 1))));
    this.render();
  }

  #read() {
    const point = this.points[this.at ?? this.points.length - 1];
    const ago = (this.seconds * (this.points.length - 1 - (this.at ?? this.points.length - 1))) / this.points.length;
    const cells = this.series.flatMap(({ key, name, colour }) => [make("i", { class: colour }), `${name} `, make("b", {}, rough(point[key]))]);
    this.readout.replaceChildren(...(this.at === null ? cells : [`${ago.toFixed(0)} s ago`, ...cells]));
    const values = this.series.map(({ key, name }) => `${name} ${rough(point[key])}`).join(", ");
    if (this.at === null) this.svg.setAttribute("aria-label", `Over the last ${this.seconds} seconds. Latest: ${values}`);
  }
}

function shapes({ style, kind }, values, x, y) {
  const runs = [];
  values.forEach((value, i) => {
    if (value === null) return;
    if (i === 0 || values[i - 1] === null) runs.push([]);
    runs.at(-1).push([x(i), y(value)]);
  });
  return runs.flatMap((run) => {
    const along = run.map(([px, py], i) => (i === 0 ? `M${at(px)} ${at(py)}` : kind === "step" ? `H${at(px)}V${at(py)}` : `L${at(px)} ${at(py)}`)).join("");
    const line = draw("path", { class: `line s-${style}`, d: run.length > 1 ? along : `${along}h.1` });
    if (kind === "line" || run.length < 2) return [line];
    return [draw("path", { class: `area s-${style}`, d: `${along}V${at(y(0))}H${at(run[0][0])}Z` }), line];
  });
}

const tick = (value) => Number(value.toPrecision(3)).toLocaleString("en");
const at = (value) => value.toFixed(1);
const rule = (width, y) => draw("line", { class: "rule", x1: 0, x2: width, y1: Math.round(y), y2: Math.round(y) });
const label = (x, y, text, anchor = "start") => draw("text", { x, y, "text-anchor": anchor }, text);

/** The least round number that holds the value. */
export function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].find((step) => step * power >= value * 0.999);
}

/** Bars of accepted over reached; a pale bar rests on few tries. */
export function depthBars(box, reached, taken) {
  const depths = Math.max(reached.length, 1);
  while (box.children.length < depths) box.append(bar(box.children.length + 1));
  while (box.children.length > depths) box.lastChild.remove();
  const said = [];
  [...box.children].forEach((node, i) => {
    const share = reached[i] ? taken[i] / reached[i] : NaN;
    node.querySelector("b").textContent = percent(share);
    node.querySelector("i").style.height = `${Number.isFinite(share) ? 82 * share : 0}%`;
    node.title = `depth ${i + 1}: ${taken[i] ?? 0} accepted of ${reached[i] ?? 0} requests whose path reached it`;
    node.toggleAttribute("data-few", (reached[i] ?? 0) < 30);
    said.push(`depth ${i + 1} ${percent(share)}`);
  });
  box.setAttribute("aria-label", `Acceptance by depth: ${said.join(", ")}`);
}

const bar = (depth) => make("div", { class: "bar" }, make("div", {}, make("b"), make("i")), make("span", {}, String(depth)));

/** Phases of a step in the order in which they run. */
export const PHASES = ["schedule", "plan", "draft", "select", "verify", "accept", "commit", "other"];

export function phaseBar(stack, list, times, steps) {
  if (!list.children.length) {
    PHASES.forEach((phase, i) => {
      stack.append(make("i", { class: `c${i}` }));
      list.append(make("div", { class: `c${i}` }, make("dt", {}, phase), make("dd")));
    });
  }
  const total = PHASES.reduce((sum, phase) => sum + (times[phase] ?? 0), 0);
  PHASES.forEach((phase, i) => {
    const time = times[phase] ?? 0;
    stack.children[i].style.flexGrow = total ? (1000 * time) / total : 0;
    list.children[i].lastChild.textContent = steps ? `${milliseconds(time / steps)} ms` : "–";
    list.children[i].title = `${phase}: ${percent(time / total)} of a step`;
  });
}

export function milliseconds(seconds) {
  const value = 1000 * seconds;
  return value.toFixed(value >= 100 ? 0 : value >= 10 ? 1 : 2);
}
