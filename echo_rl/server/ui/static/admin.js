// Who decides: the controller in force, its switch, and the A/B experiment, over the server's admin API.

import { $, draw, make, short, write } from "./dom.js";

const KEY = "echo-rl-admin-key";
const CAUSES = ["exception", "nan", "deadline", "invalid"];

/** The server's JSON API, relative to this page. The key lives in this tab's session storage alone. */
export class Api {
  get key() { return sessionStorage.getItem(KEY) ?? ""; }
  set key(value) { value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY); }

  /** The answer's JSON; throws an Error with the server's own message and `status`. */
  async call(method, path, body) {
    const headers = body ? { "Content-Type": "application/json" } : {};
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body), cache: "no-store" });
    const data = await answer.json().catch(() => null);
    if (answer.ok) return data;
    const message = data?.error?.message ?? data?.detail ?? answer.statusText;
    throw Object.assign(new Error(typeof message === "string" ? message : "the server refused this"), { status: answer.status });
  }
}

export class ControlPanel {
  constructor(api) {
    Object.assign(this, { api, offers: new Map(), decides: null });
    $("switch").addEventListener("submit", (event) => this.#switch(event));
    $("spec").addEventListener("input", () => this.#hint());
  }

  /** Fills the list of what can be chosen. */
  async load() {
    try {
      this.#offer(await this.api.call("GET", "admin/controllers"));
    } catch (error) {
      answer("switch-answer", error.message, true);
    }
  }

  #offer({ controllers, checkpoints }) {
    this.offers = new Map(controllers.map((offer) => [offer.name, offer]));
    const specs = controllers.flatMap(({ name, takes_checkpoint }) => [name, ...(takes_checkpoint ? checkpoints.map((c) => `${name}@${c}`) : [])]);
    $("specs").replaceChildren(...specs.map((value) => make("option", { value })));
  }

  show(controller, experiment) {
    if (controller !== this.decides) {
      this.since = this.decides === null ? null : Date.now(); // how long the first one has decided is not known
      this.decides = controller;
    }
    const split = experiment?.state === "running";
    write("force", controller);
    write("chip", split ? `A/B ${experiment.control} | ${experiment.treatment}` : controller);
    write("control-note", split ? `this block: ${controller === experiment.treatment ? "treatment" : "control"}` : this.since === null ? "in force" : `in force ${ago(Date.now() - this.since)}`);
    $("switch").querySelector("button").disabled = split || this.busy;
  }

  fallbacks(counts) {
    const total = CAUSES.reduce((sum, cause) => sum + (counts[cause] ?? 0), 0);
    for (const cause of CAUSES) mark(`f-${cause}`, counts[cause] ?? 0);
    mark("f-total", total);
  }

  async #switch(event) {
    event.preventDefault();
    this.busy = true;
    answer("switch-answer", "Building and trying it out");
    try {
      const done = await this.api.call("PUT", "admin/controller", choice($("spec").value));
      answer("switch-answer", `${done.controller} decides; before it was ${done.previous}.`);
      $("spec").value = "";
      this.#hint();
    } catch (error) {
      answer("switch-answer", error.message, true);
    }
    this.busy = false;
  }

  #hint() {
    const offer = this.offers.get($("spec").value.split(/[:@]/)[0].trim());
    const options = Object.entries(offer?.options ?? {}).map(([name, value]) => `${name}=${value}`);
    write("hint", options.join(" "));
  }
}

export class ExperimentPanel {
  constructor(api) {
    Object.assign(this, { api, now: null });
    $("ab-form").addEventListener("submit", (event) => this.#start(event));
    $("ab-stop").addEventListener("click", () => this.#send("DELETE"));
    new ResizeObserver(() => this.now && this.#plot(this.now)).observe($("ab-plot"));
  }

  /** `report`: arms, blocks, rates and the ratio's interval, flat; null where there was no experiment. */
  show(report) {
    this.now = report;
    const running = report?.state === "running";
    $("ab-stop").hidden = !running;
    $("ab-new").hidden = running;
    if (!this.known || report) $("ab-new").open = !report;
    this.known = Boolean(report);
    $("ab-result").hidden = !report;
    write("ab-note", report ? progress(report) : "nothing compared yet");
    if (!report) return;
    this.#ratio(report);
    this.#arms(report);
    this.#plot(report);
  }

  #ratio({ ratio, state, reason }) {
    const sign = side(ratio);
    $("ab-result").dataset.side = sign;
    write("ab-ratio", ratio ? `${ratio.estimate.toFixed(3)}×` : "–");
    const found = ratio?.low != null ? `95 % interval ${ratio.low.toFixed(3)} to ${ratio.high.toFixed(3)}` : "no interval yet";
    write("ab-interval", found);
    const verdict = { 1: "The treatment is faster.", "-1": "The control is faster.", 0: "No clear difference." }[sign];
    answer("ab-answer", state === "running" ? "" : [verdict, reason && `Ended: ${reason}.`].filter(Boolean).join(" "));
  }

  #arms(report) {
    const rates = ["control", "treatment"].map((arm) => report.tokens_per_request_second[arm]);
    const most = Math.max(...rates.map((rate) => rate ?? 0), 1e-9);
    $("ab-arms").replaceChildren(...["control", "treatment"].map((arm, i) => {
      const fill = make("i");
      fill.style.width = `${(100 * (rates[i] ?? 0)) / most}%`;
      return make("div", { class: "arm" }, make("span", { class: "mono", title: `${arm}: ${report[arm]}` }, report[arm]),
        make("span", { class: "track" }, fill), make("span", {}, make("b", {}, short(rates[i])), " tok/s each"));
    }));
  }

  /** The interval on an axis around 1, with the line at which harm ends the experiment. */
  #plot({ ratio, harm }) {
    const { width, height } = $("ab-plot").getBoundingClientRect();
    if (!width) return;
    const values = [1, harm || 1, ratio?.estimate ?? 1, ratio?.low ?? 1, ratio?.high ?? 1];
    const reach = Math.max(0.05, ...values.map((value) => Math.abs(value - 1))) * 1.12;
    const x = (value) => 8 + (width - 16) * Math.max(0, Math.min(1, (value - 1 + reach) / (2 * reach)));
    const line = (style, value, y0, y1) => draw("line", { class: style, x1: x(value), x2: x(value), y1: y0, y2: y1 });
    const parts = [line("even", 1, 2, height - 14), caption(x(1), height - 2, "even")];
    if (harm) parts.push(line("harm", harm, 2, height - 14), caption(x(harm), height - 2, `harm ${harm}`));
    const y = (height - 14) / 2 + 1;
    if (ratio?.low != null) parts.push(draw("line", { class: "span", x1: x(ratio.low), x2: x(ratio.high), y1: y, y2: y }));
    if (ratio) parts.push(draw("circle", { class: "mean", cx: x(ratio.estimate), cy: y, r: 6 }));
    $("ab-plot").replaceChildren(draw("svg", {}, ...parts));
    $("ab-plot").setAttribute("aria-label", ratio ? `Ratio of treatment to control ${ratio.estimate.toFixed(3)}, ${$("ab-interval").textContent}` : "No ratio yet");
  }

  async #start(event) {
    event.preventDefault();
    const number = (id) => Number($(id).value);
    await this.#send("POST", {
      control: choice($("ab-control").value), treatment: choice($("ab-treatment").value),
      blocks: number("ab-blocks"), block_seconds: number("ab-seconds"), harm: number("ab-harm"),
    });
  }

  async #send(method, body) {
    const button = $(method === "POST" ? "ab-form" : "ab-stop");
    const press = button.querySelector?.("button") ?? button;
    press.disabled = true;
    answer("ab-answer", method === "POST" ? "Building and trying out both" : "");
    try {
      const { state, value } = await this.api.call(method, "admin/ab", body);
      this.show(state === "none" ? null : { ...value, state });
    } catch (error) {
      answer("ab-answer", error.message, true);
    }
    press.disabled = false;
  }
}

/** `ppo@run1:option=2` names the checkpoint run1 of the operator's folder. */
function choice(text) {
  const [, name, checkpoint, options = ""] = text.trim().match(/^([^:@]+)@([^:]+)(:.*)?$/) ?? [];
  return name ? { controller: name + options, checkpoint } : { controller: text.trim() };
}

function progress({ blocks, of, state }) {
  const done = Math.min(blocks.control, blocks.treatment);
  return `${state === "running" ? "" : `${state}, `}${done} of ${of} pairs of blocks`;
}

function side(ratio) {
  if (ratio?.low == null) return 0;
  return Number(ratio.low > 1) - Number(ratio.high < 1);
}

function answer(id, text, wrong = false) {
  write(id, text);
  $(id).classList.toggle("wrong", wrong);
}

function mark(id, count) {
  write(id, String(count));
  $(id).parentElement.classList.toggle("some", count > 0);
}

function ago(milliseconds) {
  const seconds = Math.floor(milliseconds / 1000);
  if (seconds < 60) return `for ${seconds} s`;
  return seconds < 3600 ? `for ${Math.floor(seconds / 60)} min` : `for ${Math.floor(seconds / 3600)} h`;
}

const caption = (x, y, text) => draw("text", { x, y, "text-anchor": "middle" }, text);
