"use strict";
// Curves, sorting and spectra of the page. The numbers are in #data; the tables are there without
// this script. No library, no request.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const AXES = { step: "step", tokens: "tokens", flops: "FLOPs", seconds: "training time" };
const NAMES = {
  loss: "Loss, nats a token", val_perplexity: "Validation perplexity", lr: "Learning rate",
  grad_norm: "Norm of the gradient", tokens_per_s: "Tokens a second", peak_bytes: "Peak memory",
  val_bits_per_byte: "Validation bits per byte", val_accuracy: "Validation accuracy",
};
const NOT_DRAWN = new Set([...Object.keys(AXES), "val_loss", "val_tokens", "val_bytes"]);
const SMOOTHED = new Set(["loss", "grad_norm", "tokens_per_s"]);
const LOGARITHMIC = new Set(["val_perplexity"]);

const state = {
  axis: "step", logX: false, smoothing: 0.6, hidden: new Set(), zoom: null, at: null,
};
const charts = [];

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Numbers as people read them.

function short(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  for (const [unit, factor] of [["E", 1e18], ["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (size >= factor * 0.9995) return digits(value / factor, 3) + unit;
  }
  return size < 0.001 ? value.toExponential(1).replace("e-", "e−") : digits(value, 3);
}

function digits(value, count) {
  return String(Number(value.toPrecision(count)));
}

function duration(seconds) {
  if (seconds < 1) return digits(seconds, 2) + " s";
  if (seconds < 90) return digits(seconds, 3) + " s";
  if (seconds < 5400) return digits(seconds / 60, 3) + " min";
  return seconds < 172800 ? digits(seconds / 3600, 3) + " h" : digits(seconds / 86400, 3) + " d";
}

function bytes(value) {
  return value < 2 ** 30 ? digits(value / 2 ** 20, 3) + " MiB" : digits(value / 2 ** 30, 3) + " GiB";
}

function shownX(value) {
  return state.axis === "seconds" ? duration(value) : short(value);
}

function shownY(key, value) {
  if (value === null) return "not finite";
  if (key.endsWith("_bytes")) return bytes(value);
  return Math.abs(value) < 1e4 && Math.abs(value) >= 1e-3 ? digits(value, 5) : short(value);
}

// Scales and their ticks.

function scale(low, high, start, end, isLog) {
  const to = isLog ? Math.log : (value) => value;
  const from = isLog ? Math.exp : (value) => value;
  const span = to(high) - to(low) || 1;
  const at = (value) => start + ((to(value) - to(low)) / span) * (end - start);
  at.inverse = (pixel) => from(to(low) + ((pixel - start) / (end - start)) * span);
  at.low = low;
  at.high = high;
  at.isLog = isLog;
  return at;
}

function ticks(low, high, count, isLog) {
  if (isLog && high / low >= 4) {
    const found = [];
    const decades = Math.log10(high / low);
    const steps = decades > 4 ? [1] : decades > 1.5 ? [1, 3] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
      for (const step of steps) {
        const value = step * 10 ** power;
        if (value >= low && value <= high) found.push(value);
      }
    }
    return found;
  }
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((each) => each * power >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) {
    found.push(Number(value.toPrecision(12)));
  }
  return found;
}

// Series: what a chart draws of the runs that are shown.

function points(run, part, key) {
  const table = run[part];
  const [xs, ys] = [table[state.axis], table[key]];
  if (!xs || !ys) return [];
  return xs.map((x, index) => ({ x, y: ys[index], step: table.step[index] }))
    .filter((point) => point.y !== null || part === "training");
}

function smooth(found, amount) {
  let mean = 0, weight = 0;
  return found.map((point) => {
    if (point.y === null) return point;
    mean = amount * mean + (1 - amount) * point.y;
    weight = amount * weight + (1 - amount);
    return { ...point, y: mean / weight, raw: point.y };
  });
}

function seriesOf(key) {
  const found = [];
  data.runs.forEach((run, index) => {
    if (state.hidden.has(index)) return;
    const part = run.training[key] ? "training" : "validation";
    const raw = points(run, part, key);
    const isSmoothed = part === "training" && SMOOTHED.has(key) && state.smoothing > 0;
    if (raw.length) {
      const kind = part === "training" ? "line" : "valid";
      found.push({ run, index, kind, raw: isSmoothed ? raw : null,
        points: isSmoothed ? smooth(raw, state.smoothing) : raw });
    }
    if (key === "loss") {
      const valid = points(run, "validation", "val_loss");
      if (valid.length) found.push({ run, index, kind: "valid", raw: null, points: valid });
    }
  });
  return found;
}

function drawable(point, isLogY) {
  return point.y !== null && (!isLogY || point.y > 0) && (!state.logX || point.x > 0);
}

function rangeX() {
  if (state.zoom) return state.zoom;
  let [low, high] = [Infinity, -Infinity];
  data.runs.forEach((run, index) => {
    if (state.hidden.has(index)) return;
    for (const part of ["training", "validation"]) {
      for (const x of run[part][state.axis] || []) {
        if (state.logX && x <= 0) continue;
        low = Math.min(low, x);
        high = Math.max(high, x);
      }
    }
  });
  return low < high ? [low, high] : [state.logX ? 0.5 : 0, Math.max(high, 1)];
}

function rangeY(series, isLogY, [low, high]) {
  const seen = series.flatMap((each) => each.points
    .filter((point) => drawable(point, isLogY) && point.x >= low && point.x <= high)
    .map((point) => point.y));
  if (!seen.length) return [isLogY ? 0.1 : 0, 1];
  let [least, most] = [Math.min(...seen), Math.max(...seen)];
  if (least === most) [least, most] = isLogY ? [least / 2, most * 2] : [least - Math.abs(least || 1) / 10, most + Math.abs(most || 1) / 10];
  if (isLogY) {
    const room = (most / least) ** 0.06;
    return [least / room, most * room];
  }
  const room = (most - least) * 0.06;
  return [least >= 0 && least < room ? 0 : least - room, most + room];
}

function path(found, x, y) {
  let text = "", isOpen = false;
  for (const point of found) {
    if (!drawable(point, y.isLog)) {
      isOpen = false;
      continue;
    }
    text += `${isOpen ? "L" : "M"}${x(point.x).toFixed(1)} ${y(point.y).toFixed(1)}`;
    isOpen = true;
  }
  return text;
}

// One chart.

function makeChart(key, index) {
  const title = NAMES[key] || key.replaceAll("_", " ");
  const log = element("button", { class: "small", type: "button", "aria-pressed": LOGARITHMIC.has(key),
    "aria-label": `Logarithmic scale: ${title}` }, "log");
  const caption = element("figcaption", {}, element("h3", {}, title), log);
  if (key === "loss") caption.insertBefore(element("span", { class: "note" }, "solid: training; dashed: validation"), log);
  const svg = shape("svg", { tabindex: 0, role: "img",
    "aria-label": `${title}: arrow keys read values, plus and minus zoom, Escape shows everything` });
  const figure = element("figure", { class: "chart card" + (key === "loss" ? " wide" : ""),
    "data-chart": key }, caption, svg);
  const chart = { key, svg, figure, log, clip: `clip-${index}`, height: key === "loss" ? 340 : 210 };
  log.addEventListener("click", () => {
    log.setAttribute("aria-pressed", log.getAttribute("aria-pressed") !== "true");
    draw(chart);
  });
  listen(chart);
  return chart;
}

function draw(chart) {
  const { svg, key, height } = chart;
  const width = Math.max(svg.clientWidth, 240);
  const isLogY = chart.log.getAttribute("aria-pressed") === "true";
  const series = seriesOf(key);
  const range = rangeX();
  const [low, high] = rangeY(series, isLogY, range);
  const x = scale(...range, 54, width - 10, state.logX);
  const y = scale(low, high, height - 24, 8, isLogY);
  Object.assign(chart, { x, y, series, width });
  svg.setAttribute("height", height);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(...frame(chart), ...lines(chart));
  chart.over = shape("g", {});
  svg.append(chart.over);
}

function frame({ key, x, y, width, height, clip }) {
  const found = [];
  const limits = shape("clipPath", { id: clip });
  limits.append(shape("rect", { x: 54, y: 0, width: Math.max(width - 64, 1), height: height - 23 }));
  found.push(limits);
  for (const value of ticks(y.low, y.high, height / 48, y.isLog)) {
    found.push(shape("line", { class: "grid", x1: 54, x2: width - 10, y1: y(value), y2: y(value) }));
    const text = key.endsWith("_bytes") ? bytes(value) : short(value);
    found.push(shape("text", { x: 48, y: y(value) + 4, "text-anchor": "end" }, text));
  }
  for (const value of ticks(x.low, x.high, width / 110, x.isLog)) {
    const at = x(value);
    const anchor = at > width - 40 ? "end" : "middle";
    found.push(shape("text", { x: anchor === "end" ? width - 8 : at, y: height - 7, "text-anchor": anchor }, shownX(value)));
  }
  found.push(shape("line", { class: "axis", x1: 54, x2: width - 10, y1: height - 24, y2: height - 24 }));
  return found;
}

function lines({ x, y, series, clip, height }) {
  const inside = shape("g", { "clip-path": `url(#${clip})` });
  for (const { run, index, kind, raw, points: found } of series) {
    const style = `--run: var(--run-${index % 8})`;
    if (raw) inside.append(shape("path", { class: "raw", style, d: path(raw, x, y) }));
    inside.append(shape("path", { class: kind, style, d: path(found, x, y), "data-run": run.name }));
    if (kind === "valid" || found.length === 1) {
      for (const point of found) {
        if (drawable(point, y.isLog)) inside.append(shape("circle", { class: "point", style, cx: x(point.x), cy: y(point.y), r: 3 }));
      }
    }
    for (const point of found.filter((each) => each.y === null)) {
      const at = x(point.x);
      inside.append(shape("path", { class: "broken", d: `M${at - 4} 10l8 8m0 -8l-8 8` }));
    }
  }
  return height > 0 ? [inside] : [];
}

// Reading values and zooming.

function nearest(found, x) {
  let best = null;
  for (const point of found) {
    if (best === null || Math.abs(point.x - x) < Math.abs(best.x - x)) best = point;
  }
  return best;
}

function read(chart, value) {
  state.at = value;
  chart.over.replaceChildren();
  chart.figure.querySelector(".tip")?.remove();
  const found = chart.series
    .map((series) => ({ ...series, point: nearest(series.points, value) }))
    .filter(({ point }) => point && point.x >= chart.x.low && point.x <= chart.x.high);
  if (!found.length) return;
  const closest = nearest(found.map(({ point }) => point), value);
  const at = chart.x(closest.x);
  chart.over.append(shape("line", { class: "cursor", x1: at, x2: at, y1: 4, y2: chart.height - 24 }));
  const step = state.axis === "step" ? "" : `, step ${short(closest.step)}`;
  const tip = element("div", { class: "tip", role: "status" },
    element("div", { class: "note" }, `${AXES[state.axis]} ${shownX(closest.x)}${step}`));
  for (const { run, index, kind, point } of found) {
    const style = `--run: var(--run-${index % 8})`;
    if (drawable(point, chart.y.isLog)) {
      chart.over.append(shape("circle", { class: "point", style, cx: chart.x(point.x), cy: chart.y(point.y), r: 4 }));
    }
    const name = chart.key === "loss" && kind === "valid" ? `${run.name}, validation` : run.name;
    const number = shownY(chart.key, point.raw ?? point.y);
    tip.append(element("div", {}, element("span", { class: "dot", style }), name, element("b", {}, number)));
  }
  chart.figure.append(tip);
  const left = at + chart.svg.offsetLeft + 14 || at + 28;
  const fits = left + tip.offsetWidth < chart.figure.clientWidth;
  tip.style.left = `${fits ? left : Math.max(at - tip.offsetWidth, 4)}px`;
  tip.style.top = "3rem";
}

function unread(chart) {
  chart.over?.replaceChildren();
  chart.figure.querySelector(".tip")?.remove();
}

function valueAt(chart, event) {
  const box = chart.svg.getBoundingClientRect();
  const pixel = Math.min(Math.max(event.clientX - box.left, 54), chart.width - 10);
  return { pixel, value: chart.x.inverse(pixel) };
}

function listen(chart) {
  const { svg } = chart;
  let start = null;
  svg.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    start = valueAt(chart, event);
    if (event.pointerType === "mouse") svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    const now = valueAt(chart, event);
    read(chart, now.value);
    if (start && Math.abs(now.pixel - start.pixel) > 3) {
      const [left, right] = [start.pixel, now.pixel].sort((a, b) => a - b);
      chart.over.append(shape("rect", { class: "brush", x: left, width: right - left, y: 4, height: chart.height - 28 }));
    }
  });
  svg.addEventListener("pointerup", (event) => {
    const now = valueAt(chart, event);
    if (start && Math.abs(now.pixel - start.pixel) > 6) {
      zoom([start.value, now.value].sort((a, b) => a - b));
    }
    start = null;
  });
  svg.addEventListener("pointercancel", () => { start = null; });
  svg.addEventListener("pointerleave", () => { if (!start) unread(chart); });
  svg.addEventListener("dblclick", () => zoom(null));
  svg.addEventListener("blur", () => unread(chart));
  svg.addEventListener("keydown", (event) => keyed(chart, event));
}

function keyed(chart, event) {
  const stops = [...new Set(chart.series.flatMap((each) => each.points.map((point) => point.x)))]
    .filter((x) => x >= chart.x.low && x <= chart.x.high).sort((a, b) => a - b);
  if (!stops.length && event.key !== "Escape") return;
  const now = stops.findIndex((x) => x >= (state.at ?? chart.x.low));
  const index = now < 0 ? stops.length - 1 : now;
  const [low, high] = [chart.x.low, chart.x.high];
  const middle = stops[index] ?? low;
  if (event.key === "ArrowRight") read(chart, stops[Math.min(index + 1, stops.length - 1)]);
  else if (event.key === "ArrowLeft") read(chart, stops[Math.max(index - 1, 0)]);
  else if (event.key === "+" || event.key === "=") zoom([middle - (middle - low) / 2, middle + (high - middle) / 2]);
  else if (event.key === "-") widen(low, high);
  else if (event.key === "Escape" || event.key === "0") zoom(null);
  else return;
  event.preventDefault();
}

function widen(low, high) {
  if (!state.zoom) return;
  state.zoom = null;
  const [least, most] = rangeX();
  const room = (high - low) / 2;
  const wide = [Math.max(low - room, least), Math.min(high + room, most)];
  zoom(wide[0] <= least && wide[1] >= most ? null : wide);
}

function zoom(range) {
  state.zoom = range && range[0] < range[1] ? range : null;
  const place = document.getElementById("curves");
  place.dataset.from = state.zoom ? state.zoom[0] : "";
  place.dataset.to = state.zoom ? state.zoom[1] : "";
  document.getElementById("reset").disabled = !state.zoom;
  redraw();
}

function redraw() {
  for (const chart of charts) draw(chart);
}

// What the reader chooses.

function setUpCurves() {
  const keys = new Set(["loss"]);
  for (const run of data.runs) {
    for (const part of ["validation", "training"]) {
      for (const key of Object.keys(run[part])) if (!NOT_DRAWN.has(key)) keys.add(key);
    }
  }
  const place = document.querySelector("#curves .charts");
  [...keys].forEach((key, index) => {
    const chart = makeChart(key, index);
    charts.push(chart);
    place.append(chart.figure);
  });
  for (const button of document.querySelectorAll("#axis button")) {
    button.addEventListener("click", () => {
      state.axis = button.value;
      for (const each of document.querySelectorAll("#axis button")) each.setAttribute("aria-pressed", each === button);
      zoom(null);
    });
  }
  document.getElementById("log-x").addEventListener("change", (event) => {
    state.logX = event.target.checked;
    zoom(null);
  });
  document.getElementById("smoothing").addEventListener("input", (event) => {
    state.smoothing = Math.min(Number(event.target.value), 0.99);
    redraw();
  });
  document.getElementById("reset").addEventListener("click", () => zoom(null));
  document.querySelectorAll(".legend .chip").forEach((chip, index) => {
    chip.addEventListener("click", () => {
      state.hidden.has(index) ? state.hidden.delete(index) : state.hidden.add(index);
      chip.setAttribute("aria-pressed", !state.hidden.has(index));
      document.querySelectorAll(`[data-run-index="${index}"]`).forEach((each) => { each.hidden = state.hidden.has(index); });
      redraw();
    });
  });
  new ResizeObserver(redraw).observe(place);
  redraw();
}

function setUpTables() {
  for (const table of document.querySelectorAll("table.sortable")) {
    table.querySelectorAll("thead th").forEach((head, column) => {
      head.querySelector("button")?.addEventListener("click", () => sort(table, head, column));
    });
  }
}

function sort(table, head, column) {
  const isUp = head.getAttribute("aria-sort") !== "ascending";
  for (const each of table.querySelectorAll("thead th")) each.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows];
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  rows.sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    if (a === "" || b === "") return (a === "") - (b === ""); // nothing is known: last, both ways
    const difference = Number(a) - Number(b);
    const order = Number.isNaN(difference) ? a.localeCompare(b) : difference;
    return isUp ? order : -order;
  });
  table.tBodies[0].append(...rows);
}

// Singular values of a run's maps.

function setUpSpectra() {
  for (const place of document.querySelectorAll("[data-spectra]")) {
    const spectra = data.runs[Number(place.dataset.spectra)].spectra;
    const select = place.querySelector("select");
    const show = () => drawSpectra(place.querySelector("svg"), spectra.filter((each) => each.position === select.value));
    select.addEventListener("change", show);
    new ResizeObserver(show).observe(place);
    show();
  }
}

function drawSpectra(svg, found) {
  const [width, height] = [Math.max(svg.clientWidth, 240), 240];
  const all = found.flatMap((each) => each.values.map((value) => value / (each.values[0] || 1))).filter((value) => value > 1e-6);
  const x = scale(1, Math.max(2, ...found.map((each) => each.rank)), 54, width - 10, false);
  const y = scale(Math.min(...all, 0.5) / 1.2, 1.2, height - 24, 8, true);
  svg.setAttribute("height", height);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  for (const value of ticks(y.low, y.high, 4, true)) {
    svg.append(shape("line", { class: "grid", x1: 54, x2: width - 10, y1: y(value), y2: y(value) }),
      shape("text", { x: 48, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const value of ticks(x.low, x.high, width / 90, false)) {
    svg.append(shape("text", { x: x(value), y: height - 7, "text-anchor": "middle" }, short(value)));
  }
  found.forEach((each, index) => {
    const share = found.length > 1 ? (100 * index) / (found.length - 1) : 0;
    const points = each.values.map((value, at) => ({ x: each.at[at], y: value / (each.values[0] || 1) }));
    const line = shape("path", { d: path(points.filter((point) => point.y > 1e-6), x, y), fill: "none", "stroke-width": 1.6,
      style: `stroke: color-mix(in oklab, var(--warm) ${share}%, var(--cold))` });
    line.append(shape("title", {}, `block ${each.block}, ${each.tensor}`));
    svg.append(line);
  });
}

setUpTables();
setUpCurves();
setUpSpectra();
