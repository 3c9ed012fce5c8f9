// What the page knows: the last minute of frames, as sums over a window and as a series for the charts.
// All times are the server's, in seconds.

const KEPT_SECONDS = 12; // the longest window that anything asks for, and a little
const LONGEST_GAP = 3; // between two frames; a longer one is a break, not slowness

const COUNTERS = ["steps", "seconds", "committed", "requests", "verified", "accepted", "drafted", "budget", "depth", "width", "prefill_tokens"];

export class Model {
  constructor({ bucket = 0.5, buckets = 120 } = {}) {
    this.bucket = bucket;
    this.most = buckets;
    this.clear();
  }

  clear() {
    this.frames = [];
    this.series = [];
    this.now = null;
    this.last = null; // the latest frame that had steps
  }

  add(frame) {
    const gap = this.now === null ? 0 : frame.time - this.now;
    if (gap < -1) this.clear(); // another clock: another server
    if (gap > LONGEST_GAP) this.frames = [];
    const elapsed = gap > 0 && gap <= LONGEST_GAP ? gap : 0;
    this.now = frame.time;
    if (frame.steps) this.last = frame;
    this.frames.push({ ...frame, elapsed });
    while (this.frames.length && this.frames[0].time < this.now - KEPT_SECONDS) this.frames.shift();
    this.#sample(frame, elapsed);
  }

  /** Sums over the last seconds; `elapsed` is the time that they cover. */
  over(seconds) {
    const sums = { elapsed: 0, times: {}, reached: [], taken: [] };
    for (const name of COUNTERS) sums[name] = 0;
    for (const frame of this.frames) {
      if (frame.time <= this.now - seconds) continue;
      sums.elapsed += frame.elapsed;
      if (!frame.steps) continue;
      for (const name of COUNTERS) sums[name] += frame[name];
      for (const [phase, time] of Object.entries(frame.times)) sums.times[phase] = (sums.times[phase] ?? 0) + time;
      addRagged(sums.reached, frame.reached_by_depth);
      addRagged(sums.taken, frame.accepted_by_depth);
    }
    return sums;
  }

  /** Finished stretches of the series, oldest first, at fixed places: index i is (length - i) stretches ago. */
  points() {
    const newest = Math.floor(this.now / this.bucket) - 1;
    const found = new Map(this.series.map((point) => [point.at, point]));
    return Array.from({ length: this.most }, (_, i) => summary(found.get(newest - this.most + 1 + i)));
  }

  /** Spreads a frame evenly over the stretches since the one before, so that a slow server leaves no holes. */
  #sample(frame, elapsed) {
    const at = Math.floor(frame.time / this.bucket);
    const before = this.series.at(-1)?.at ?? at;
    const first = elapsed ? Math.min(at, before + 1) : at;
    for (let i = first; i <= at; i += 1) this.#add(this.#point(i), frame, elapsed, 1 / (at - first + 1));
    while (this.series[0].at <= at - this.most - 2) this.series.shift();
  }

  #point(at) {
    const last = this.series.at(-1);
    if (last?.at === at) return last;
    const point = { at, elapsed: 0, committed: 0, steps: 0, budget: 0, verified: 0, knees: 0, known: 0 };
    this.series.push(point);
    return point;
  }

  #add(point, frame, elapsed, share) {
    point.elapsed += share * elapsed;
    if (!frame.steps) return;
    for (const name of ["committed", "steps", "budget", "verified"]) point[name] += share * frame[name];
    if (frame.knee === null) return;
    point.knees += share * frame.knee;
    point.known += share;
  }
}

function summary(point) {
  if (!point) return { tokens: null, budget: null, used: null, knee: null };
  return {
    tokens: point.elapsed > 0 ? point.committed / point.elapsed : null,
    budget: point.steps ? point.budget / point.steps : null,
    used: point.steps ? point.verified / point.steps : null,
    knee: point.known ? point.knees / point.known : null,
  };
}

function addRagged(total, counts) {
  counts.forEach((count, i) => { total[i] = (total[i] ?? 0) + count; });
}
