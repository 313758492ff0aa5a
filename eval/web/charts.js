"use strict";
// Charts drawn as SVG at the width they have, so that type keeps its size on every screen.

/** Round numbers that cover [low, high] in about `count` steps. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

const scale = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);

/** A number with a metric's digits and unit; null is what JSON holds for an infinite PSNR. */
function shown(value, metric) {
  if (value === undefined) return "–";
  if (value === null) return metric.key.startsWith("psnr") ? "identical" : "–";
  return `${metric.prefix ?? ""}${value.toFixed(metric.digits)}${metric.unit ? (metric.unit === "×" ? "×" : ` ${metric.unit}`) : ""}`;
}

/**
 * One metric over the frames of a video. It is a slider: pointing, dragging and arrow keys move the frame, through
 * `onSeek(frame, passing)`, where passing says that a mouse merely moved over it.
 */
class FrameCurve {
  constructor(metric, numFrames, onSeek) {
    Object.assign(this, { metric, numFrames, onSeek, chosen: [], others: [], worst: null, frame: 0 });
    this.now = make("span", { class: "now" });
    this.holder = make("div", {
      class: "scrubbable", role: "slider", tabindex: 0, "aria-label": `${metric.name} of each frame; moves the frame`,
      "aria-valuemin": 1, "aria-valuemax": numFrames,
    });
    this.root = make("div", { class: "curve" },
      make("h3", {}, make("span", {}, makeTerm(metric.term, metric.name), metric.higher ? " ↑" : " ↓"), this.now), this.holder);
    const seek = (event) => {
      if (!event.isPrimary) return;
      const box = this.holder.getBoundingClientRect();
      // a mouse passes over; a finger or a held button means it
      const passing = event.type === "pointermove" && event.buttons === 0;
      onSeek(clamp(Math.round(this.frameAt(event.clientX - box.left)), 0, numFrames - 1), passing);
    };
    this.holder.addEventListener("pointermove", seek);
    this.holder.addEventListener("pointerdown", seek);
    this.holder.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageUp: 10, PageDown: -10 }[event.key];
      const to = { Home: 0, End: numFrames - 1 }[event.key] ?? (by === undefined ? undefined : this.frame + by);
      if (to === undefined) return;
      event.preventDefault();
      event.stopPropagation();
      onSeek(clamp(to, 0, numFrames - 1), false);
    });
    onResize(this.holder, () => this.render());
  }

  show(chosen, others, worst) {
    Object.assign(this, { chosen, others, worst });
    this.render();
  }

  frameAt(x) {
    return ((x - this.left) / (this.width - this.left - 6)) * (this.numFrames - 1);
  }

  render() {
    this.width = this.holder.clientWidth;
    if (!this.width) return;
    const height = 110;
    const values = [this.chosen, ...this.others].flat().filter((value) => value !== null && value !== undefined);
    let [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
    const margin = (high - low || Math.abs(high) || 1) * 0.08;
    low = Math.max(low - margin, this.metric.least ?? -Infinity);
    high = Math.min(high + margin, this.metric.most ?? Infinity);
    if (high <= low) high = low + 1;
    const marks = ticks(low, high, 4);
    this.left = 8 + 7 * Math.max(...marks.map((mark) => String(mark).length), 2);
    this.x = scale(0, Math.max(this.numFrames - 1, 1), this.left, this.width - 6);
    this.y = scale(low, high, height - 20, 8);
    const path = (list) => {
      let text = "";
      let down = false;
      for (let i = 0; i < this.numFrames; i++) {
        // an identical frame has no finite value: it is drawn at the top
        const value = list[i] === null && this.metric.key === "psnr" ? high : list[i];
        if (value === null || value === undefined) down = false;
        else {
          text += `${down ? "L" : "M"}${this.x(i).toFixed(1)} ${this.y(value).toFixed(1)}`;
          down = true;
        }
      }
      return text;
    };
    this.cursor = draw("line", { class: "cursor", y1: 4, y2: height - 16 });
    this.dot = draw("circle", { class: "now-dot", r: 4.5 });
    const frames = ticks(1, this.numFrames, Math.max(3, Math.floor(this.width / 110))).filter((frame) => frame >= 1 && Number.isInteger(frame));
    const worst = this.worst === null ? null : this.chosen[this.worst];
    this.holder.replaceChildren(draw("svg", { height, "aria-hidden": "true" },
      marks.map((mark) => [
        draw("line", { class: "grid", x1: this.left, x2: this.width - 6, y1: this.y(mark), y2: this.y(mark) }),
        draw("text", { x: this.left - 6, y: this.y(mark) + 4, "text-anchor": "end" }, String(mark))]),
      frames.map((frame) => draw("text", { x: this.x(frame - 1), y: height - 3, "text-anchor": "middle" }, String(frame))),
      this.others.map((list) => draw("path", { class: "other", d: path(list) })),
      draw("path", { class: "line", d: path(this.chosen) }),
      worst === null || worst === undefined ? null : draw("circle", { class: "dot", r: 4, cx: this.x(this.worst), cy: this.y(worst) }),
      this.cursor, this.dot));
    this.moveTo(this.frame);
  }

  moveTo(frame) {
    this.frame = frame;
    const value = this.chosen[frame];
    const text = value === undefined ? "–" : shown(value, this.metric);
    this.now.replaceChildren(`frame ${frame + 1}: `, make("b", {}, text));
    this.holder.setAttribute("aria-valuenow", frame + 1);
    this.holder.setAttribute("aria-valuetext", `frame ${frame + 1}: ${text}`);
    if (!this.cursor || !this.x) return;
    for (const name of ["x1", "x2"]) this.cursor.setAttribute(name, this.x(frame));
    const drawn = value !== null && value !== undefined;
    this.dot.style.display = drawn ? "" : "none";
    if (drawn) {
      this.dot.setAttribute("cx", this.x(frame));
      this.dot.setAttribute("cy", this.y(value));
    }
  }
}

/** Quality against speed. Settings are a group of radio buttons; `onPick(setting)` when one is chosen. */
class TradePlot {
  constructor(holder, settings, runs, onPick) {
    Object.assign(this, { holder, settings, runs, onPick, metric: null, chosen: 0 });
    onResize(holder, () => this.render());
  }

  show(metric, chosen) {
    Object.assign(this, { metric, chosen });
    this.render();
  }

  render() {
    const width = this.holder.clientWidth;
    if (!width || !this.metric) return;
    const { metric } = this;
    const height = clamp(width * 0.56, 260, 430);
    const points = (list) => list.filter((item) => item.values.speedup != null && item.values[metric.key] != null);
    const settings = points(this.settings.map((setting, i) => ({ ...setting, i })));
    const runs = points(this.runs);
    if (!settings.length) {
      this.holder.replaceChildren(make("p", { class: "note" },
        "Nothing to plot: these videos are identical to dense ones, or no step was timed."));
      return;
    }
    const span = (list, least, most) => {
      const [low, high] = [Math.min(...list, least), Math.max(...list, most)];
      const margin = (high - low || Math.abs(high) || 1) * 0.09;
      return [low - margin, high + margin];
    };
    const xs = [...settings, ...runs].map((item) => item.values.speedup);
    const ys = [...settings, ...runs].map((item) => item.values[metric.key]);
    const [x0, x1] = span(xs, 1, 1);
    let [y0, y1] = span(ys, Infinity, -Infinity);
    y0 = Math.max(y0, metric.least ?? -Infinity);
    y1 = Math.min(y1, metric.most ?? Infinity);
    const yMarks = ticks(y0, y1, 5);
    const left = 12 + 7 * Math.max(...yMarks.map((mark) => String(mark).length));
    const x = scale(x0, x1, left, width - 14);
    // better is always up: lower-is-better metrics hang from the top
    const y = metric.higher ? scale(y0, y1, height - 40, 28) : scale(y0, y1, 28, height - 40);
    const boxes = [];
    const marks = settings.map((setting) => {
      const at = [x(setting.values.speedup), y(setting.values[metric.key])];
      boxes.push([at[0] - 9, at[1] - 9, at[0] + 9, at[1] + 9]);
      return { setting, at };
    });
    // the chosen setting's label finds its place first
    marks.sort((a, b) => (b.setting.i === this.chosen) - (a.setting.i === this.chosen));
    const groups = marks.map(({ setting, at }) => {
      const label = placeLabel(setting.short, at, boxes, [left, width]);
      const text = `${setting.label}: ${setting.values.speedup.toFixed(2)}× per step, ${metric.name} ${shown(setting.values[metric.key], metric)}`;
      return draw("g", {
        class: "mark", role: "radio", tabindex: setting.i === this.chosen ? 0 : -1, "data-setting": setting.i,
        "aria-checked": String(setting.i === this.chosen), "aria-label": text, click: () => this.onPick(setting.i),
        pointermove: (event) => showTip(text, event.clientX, event.clientY), pointerleave: () => showTip(""),
      }, draw("circle", { class: "halo", cx: at[0], cy: at[1], r: 18 }),
        draw("circle", { class: "big", cx: at[0], cy: at[1], r: 7 }),
        label && draw("text", { x: label.x, y: label.y, "text-anchor": label.anchor }, setting.short));
    });
    const focused = this.holder.contains(document.activeElement);
    this.holder.replaceChildren(draw("svg", {
      height, role: "radiogroup", "aria-label": `${metric.name} against speed; each point is a setting`,
      keydown: (event) => this.onKey(event, settings),
    },
    yMarks.map((mark) => [
      draw("line", { class: "grid", x1: left, x2: width - 8, y1: y(mark), y2: y(mark) }),
      draw("text", { x: left - 7, y: y(mark) + 4, "text-anchor": "end" }, String(mark))]),
    ticks(x0, x1, Math.floor(width / 110)).map((mark) =>
      draw("text", { x: x(mark), y: height - 22, "text-anchor": "middle" }, `${mark}×`)),
    draw("line", { class: "cursor", x1: x(1), x2: x(1), y1: 28, y2: height - 38, "stroke-dasharray": "3 3" }),
    draw("text", { x: x(1) + 5, y: height - 44 }, "dense"),
    draw("text", { class: "axis", x: left, y: 14 },
      `${metric.higher ? "↑" : "↑ closer to dense:"} ${metric.name}${metric.unit ? `, ${metric.unit}` : ""}${metric.higher ? "" : " (lower is better)"}`),
    draw("text", { class: "axis", x: width - 8, y: height - 4, "text-anchor": "end" }, "speed of a denoising step →"),
    runs.map((run) => draw("circle", {
      class: `small${run.setting === this.chosen ? " chosen" : ""}`, r: 2.6, cx: x(run.values.speedup), cy: y(run.values[metric.key]),
    })),
    groups.reverse()));
    if (focused) this.holder.querySelector('[aria-checked="true"]')?.focus();
  }

  onKey(event, settings) {
    const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const ordered = [...settings].sort((a, b) => a.values.speedup - b.values.speedup);
    const at = ordered.findIndex((setting) => setting.i === this.chosen);
    this.onPick(ordered[(at + by + ordered.length) % ordered.length].i);
  }
}

/** Where a point's label does not cover another point or label; null if nowhere. */
function placeLabel(text, [x, y], boxes, [least, most]) {
  const width = text.length * 6.6;
  const tries = [
    [x + 12, y + 4, "start"], [x - 12, y + 4, "end"], [x, y - 14, "middle"], [x, y + 23, "middle"],
    [x + 10, y - 11, "start"], [x - 10, y - 11, "end"], [x + 10, y + 19, "start"], [x - 10, y + 19, "end"],
  ];
  for (const [labelX, labelY, anchor] of tries) {
    const start = { start: labelX, middle: labelX - width / 2, end: labelX - width }[anchor];
    const box = [start, labelY - 11, start + width, labelY + 3];
    if (box[0] < least || box[2] > most) continue;
    if (boxes.some((other) => box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1])) continue;
    boxes.push(box);
    return { x: labelX, y: labelY, anchor };
  }
  return null;
}

/** Density of every layer (down) and step (across). Arrow keys move a cell; the reading stands below. */
class DensityMap {
  constructor(holder) {
    this.reading = make("p", { class: "heat-read", "aria-live": "polite" });
    this.chart = make("div", { class: "heat-map", tabindex: 0, role: "group", "aria-label": "Density by layer and step; arrow keys move" });
    this.legend = make("div", { class: "legend" });
    holder.replaceChildren(this.chart, this.reading, this.legend);
    this.cell = [0, 0];
    this.chart.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!by || !this.map) return;
      event.preventDefault();
      event.stopPropagation();
      this.read(this.cell[0] + by[0], this.cell[1] + by[1]);
    });
    for (const name of ["pointermove", "pointerdown"]) {
      this.chart.addEventListener(name, (event) => {
        const cell = event.target.dataset?.cell;
        if (cell) this.read(...cell.split(",").map(Number));
      });
    }
    document.addEventListener("theme", () => this.render());
    onResize(holder, () => this.render());
  }

  show(map) {
    this.map = map;
    this.render();
  }

  render() {
    const { map } = this;
    const width = this.chart.clientWidth;
    if (!map || !width) return;
    const left = 46;
    const top = 20;
    const cellWidth = Math.min((width - left) / map.steps.length, 64);
    const cellHeight = clamp(360 / map.layers.length, 7, 20);
    const sparse = map.values.flat().filter((value) => value !== null && value < 1);
    this.most = sparse.length ? Math.max(...sparse) : 1;
    const low = sparse.length ? Math.min(...sparse) : 0;
    // nearly equal densities must not look like a contrast
    this.least = Math.min(low, this.most * 0.5);
    const cells = map.values.flatMap((row, i) => row.map((value, j) => draw("rect", {
      x: left + j * cellWidth, y: top + i * cellHeight, width: Math.max(cellWidth - 1, 1), height: cellHeight - 1,
      "data-cell": `${i},${j}`, style: `fill: ${this.color(value)}`,
    })));
    const every = (count, size, room) => [...Array(count).keys()].filter((i) => i % Math.ceil(room / size) === 0);
    this.here = draw("rect", { class: "here", width: cellWidth + 1, height: cellHeight + 1 });
    const height = top + map.layers.length * cellHeight + 4;
    this.chart.replaceChildren(draw("svg", { height },
      every(map.steps.length, cellWidth, 30).map((j) =>
        draw("text", { x: left + (j + 0.5) * cellWidth, y: 13, "text-anchor": "middle" }, map.steps[j] === null ? "–" : String(map.steps[j] + 1))),
      every(map.layers.length, cellHeight, 15).map((i) =>
        draw("text", { x: left - 8, y: top + (i + 0.5) * cellHeight + 4, "text-anchor": "end" }, String(map.layers[i]))),
      draw("text", { x: 0, y: 13 }, "step"), cells, this.here));
    this.legend.replaceChildren(
      make("span", {}, `${percent(this.least)}`, make("span", { class: "ramp", style: `background: linear-gradient(to right, ${this.color(this.least)}, ${this.color(this.most)})` }), `${percent(this.most)} of all scores computed`),
      make("span", {}, make("span", { class: "full" }), "all of them (dense)"));
    this.read(...this.cell);
  }

  color(value) {
    if (value === null || value === undefined) return "transparent";
    if (value >= 1) return "var(--dense)";
    const share = this.most > this.least ? (value - this.least) / (this.most - this.least) : 1;
    return `color-mix(in oklab, var(--draft) ${Math.round(12 + 88 * share)}%, var(--sunken))`;
  }

  read(layer, step) {
    const { map } = this;
    this.cell = [clamp(layer, 0, map.layers.length - 1), clamp(step, 0, map.steps.length - 1)];
    const [i, j] = this.cell;
    const target = this.chart.querySelector(`[data-cell="${i},${j}"]`);
    for (const name of ["x", "y"]) this.here.setAttribute(name, Number(target.getAttribute(name)) - 1);
    const value = map.values[i][j];
    const where = `Layer ${map.layers[i]}${map.steps[j] === null ? "" : `, step ${map.steps[j] + 1}`}`;
    this.reading.textContent = value === null ? `${where}: not called` : value >= 1 ? `${where}: dense` : `${where}: ${percent(value)} of all scores computed`;
  }
}

const percent = (share) => `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;
