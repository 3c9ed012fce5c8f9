// Opens the stream and shows what it says.

import { Api, ControlPanel, ExperimentPanel } from "./admin.js";
import { depthBars, milliseconds, phaseBar, TimeChart } from "./charts.js";
import { $, percent, short, write, writeUnit } from "./dom.js";
import { Model } from "./model.js";
import { TreeView } from "./tree.js";

const WINDOW = 2; // seconds that the tiles look back
const DEPTH_WINDOW = 10;
const REFRESH = 240; // milliseconds between two drawings of numbers and charts
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const HIDDEN_FOR = 30_000; // a page that nobody sees for so long lets go of the stream

class Page {
  constructor() {
    this.api = new Api();
    this.model = new Model();
    this.tree = new TreeView($("stage"), $("tree-empty"));
    this.control = new ControlPanel(this.api);
    this.experiment = new ExperimentPanel(this.api);
    const series = (key, name, style, kind) => ({ key, name, style, kind, colour: `k-${style === "used" ? "lit" : style}` });
    this.speed = new TimeChart($("p-speed"), $("r-speed"), [series("tokens", "", "lit", "area")], 60);
    this.budget = new TimeChart($("p-budget"), $("r-budget"), [
      series("budget", "budget", "budget", "area"), series("used", "verified", "used", "line"), { ...series("knee", "Kmax", "knee", "line"), guide: true },
    ], 60);
    Object.assign(this, { source: null, failures: 0, paused: false, drawn: -Infinity, column: -Infinity, report: null });
    $("pause").addEventListener("click", () => this.pause(!this.paused));
    $("gate").addEventListener("submit", (event) => this.unlock(event));
    document.addEventListener("visibilitychange", () => this.seen());
  }

  // --------------------------------------------------------------- connection

  async connect() {
    this.close();
    const attempt = (this.attempt = {});
    this.state("connecting", "connecting");
    try {
      const { token, ready } = await this.api.call("POST", "ui/session");
      if (attempt !== this.attempt) return; // another one has begun meanwhile
      if (ready) this.open(token);
      else this.again(2, "engine is loading");
    } catch (error) {
      if (attempt !== this.attempt) return;
      if (error.status === 401 || error.status === 403) this.lock(error);
      else this.lost();
    }
  }

  close() {
    clearTimeout(this.retry);
    this.source?.close();
    this.source = null;
  }

  open(token) {
    const source = new EventSource(`ui/stream?token=${encodeURIComponent(token)}`);
    const on = (name, act) => source.addEventListener(name, (event) => act.call(this, JSON.parse(event.data)));
    on("hello", this.hello);
    on("steps", this.frame);
    on("experiment", this.compared);
    source.onerror = () => this.lost();
    this.source = source;
    this.control.load();
  }

  /** A token opens one stream, so a broken one is opened anew rather than by the browser itself. */
  lost() {
    this.failures += 1;
    const seconds = Math.min(15, 2 ** this.failures);
    this.again(seconds, `offline, again in ${seconds} s`);
  }

  again(seconds, text) {
    this.close();
    this.state("offline", text);
    this.retry = setTimeout(() => this.connect(), 1000 * seconds);
  }

  lock({ message, status }) {
    this.state("locked", status === 401 ? "admin key needed" : "not open from here");
    const asked = this.api.key ? "That is not the admin key." : "The admin key opens this view.";
    write("gate-text", status === 401 ? asked : message);
    this.api.key = "";
    $("gate").hidden = false;
    $("gate").classList.toggle("closed", status === 403);
    $("gate-key").focus();
  }

  unlock(event) {
    event.preventDefault();
    this.api.key = $("gate-key").value;
    $("gate-key").value = "";
    $("gate").hidden = true;
    this.connect();
  }

  seen() {
    clearTimeout(this.hiding);
    if (document.hidden) {
      this.hiding = setTimeout(() => this.close(), HIDDEN_FOR);
    } else if (!this.source && $("gate").hidden) {
      this.connect();
    }
  }

  state(name, text) {
    $("status").dataset.state = name;
    write("status", text);
  }

  pause(on) {
    this.paused = on;
    $("pause").setAttribute("aria-pressed", String(on));
    write("pause", on ? "Resume" : "Pause");
    $("stage").classList.toggle("still", on);
  }

  // --------------------------------------------------------------- events

  hello(data) {
    this.failures = 0;
    this.greeting = data;
    const { model, device, dtype, cpu, threads } = data.environment;
    const parts = [model, dtype, cpu ?? device, threads && `${threads} thread${threads === "1" ? "" : "s"}`];
    write("machine", parts.filter(Boolean).join(" · "));
    this.control.fallbacks(data.fallbacks);
    this.control.show(data.controller, data.experiment);
    this.compared(data.experiment);
  }

  frame(data) {
    this.model.add(data);
    const now = performance.now();
    if (this.paused) return;
    if (drawable(data.step) && now - this.column >= (calm.matches ? 1900 : 380)) {
      this.column = now;
      this.tree.show(data.step);
      write("tree-note", plan(data.step));
    }
    if (now - this.drawn < REFRESH) return;
    this.drawn = now;
    this.numbers(data);
  }

  compared(report) {
    this.report = report;
    this.experiment.show(report);
  }

  // --------------------------------------------------------------- numbers

  numbers(latest) {
    const { last } = this.model;
    const idle = !last || latest.time - last.time > 1.5;
    this.state(idle ? "idle" : "live", idle ? "idle" : "live");
    $("stage").classList.toggle("idle", idle);
    const points = this.model.points();
    this.speed.show(points);
    this.budget.show(points);
    write("version", `ECHO-RL ${this.greeting.version}, engine restarted ${latest.restarts} times`);
    this.tiles(this.model.over(WINDOW), latest, idle);
    const { reached, taken } = this.model.over(DEPTH_WINDOW);
    depthBars($("depth"), reached, taken);
    if (idle && !last) write("tree-empty", "Nothing has decoded yet. Send a request to /v1/chat/completions");
    if (last) {
      this.control.show(last.controller, this.report);
      this.control.fallbacks(last.fallbacks);
    }
  }

  tiles(sums, { in_flight }, idle) {
    const { last } = this.model;
    const rate = (count) => (sums.elapsed ? count / sums.elapsed : null);
    write("t-speed", short(rate(sums.committed)));
    write("t-speed-sub", `${short(rate(sums.prefill_tokens))} prompt tokens/s`);
    write("t-mat", sums.requests ? (sums.committed / sums.requests).toFixed(2) : "–");
    write("t-mat-sub", sums.verified ? `${percent(sums.accepted / sums.verified)} of nodes accepted` : "plain decoding");
    write("t-nodes", sums.steps ? short(sums.verified / sums.steps) : "–");
    write("t-nodes-sub", `budget ${sums.steps ? short(sums.budget / sums.steps) : "–"}, Kmax ${short(last?.knee)}`);
    write("t-batch", String(idle ? in_flight : last.running));
    write("t-batch-sub", idle ? "in flight" : `${last.batch} decoding, ${last.waiting} waiting`);
    writeUnit("t-step", sums.steps ? milliseconds(sums.seconds / sums.steps) : "–", "ms");
    write("t-step-sub", `${short(rate(sums.steps))} steps a second`);
    const used = last ? 100 * last.kv_used : 0;
    write("t-kv", last ? `${used.toFixed(used < 10 ? 1 : 0)}%` : "–");
    $("kv-meter").setAttribute("aria-valuenow", used.toFixed(0));
    $("kv-meter").firstElementChild.style.width = `${used}%`;
    phaseBar($("phase-stack"), $("phases"), sums.times, sums.steps);
  }
}

/** Steps that speculated before this page was there carry no trees. */
const drawable = (step) => step && (step.trees.length || !step.budget);

function plan({ budget, knee, depth, width }) {
  if (!budget) return "this step decodes plainly";
  return `budget ${budget}${knee ? ` of Kmax ${knee}` : ""}, depth ${depth}, width ${width}`;
}

new Page().connect();
