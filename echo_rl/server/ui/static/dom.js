// Small helpers around the document. Nothing here knows what is shown.

const NS = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

/** Writes text only where it changed, so that an idle page stays idle. */
export function write(id, text) {
  const node = typeof id === "string" ? $(id) : id;
  if (node.textContent !== text) node.textContent = text;
}

/** A number with a small unit behind it, as in the tiles. */
export function writeUnit(id, value, unit) {
  const node = $(id);
  if (node.dataset.value === value + unit) return;
  node.dataset.value = value + unit;
  node.replaceChildren(value, make("small", {}, ` ${unit}`));
}

export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** Three digits that matter; a dash for what is unknown. */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 100 || value === 0) return whole.format(value);
  return value.toFixed(size >= 10 ? 1 : 2);
}

/** For small print: no digits behind the point from ten on. */
export const rough = (value) => (Math.abs(value) >= 10 ? whole.format(value) : short(value));

export const percent = (share) => (Number.isFinite(share) ? `${Math.round(100 * share)}%` : "–");
