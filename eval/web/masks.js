"use strict";
// The mask page: one state (layer, head, step, tile, direction), drawn into canvases.

const [numFrames, gridHeight, gridWidth] = pageData.grid;
const { boxes } = pageData;
const numBlocks = boxes.length;
const state = { ...pageData.start, query: pageData.query, incoming: false, heat: true };
// Attention differs by orders of magnitude: colours follow its logarithm, so far below a row's largest. Over the video
// less far, for chosen tiles are among the largest.
const MAP_DECADES = 2;
const HEAT_DECADES = 1;
const DIM = 0.28;
const QUERY = `rgb(${pageData.query_color.join(" ")})`;

/** The place of a record's maps, unpacked when first shown. */
const unpacked = new Map();
async function mapsOf(record) {
  if (!unpacked.has(record.id)) {
    const stream = new Blob([bytesOf(byId(record.id).textContent)]).stream().pipeThrough(new DecompressionStream("deflate"));
    unpacked.set(record.id, new Uint8Array(await new Response(stream).arrayBuffer()));
  }
  const bytes = unpacked.get(record.id);
  const head = pageData.heads.indexOf(state.head);
  const size = numBlocks * numBlocks;
  const packedSize = Math.ceil(size / 8);
  const start = pageData.heads.length * size + head * packedSize;
  return { levels: bytes.subarray(head * size, (head + 1) * size), bits: bytes.subarray(start, start + packedSize) };
}

const shareOf = (level) => (level === 0 ? 0 : 10 ** (pageData.decades * (level / 255 - 1)));

/** A colour of the ramp for a value in [0, 1]. */
function rampColor(value) {
  const at = clamp(value, 0, 1) * (pageData.ramp.length - 1);
  const low = Math.min(Math.floor(at), pageData.ramp.length - 2);
  return pageData.ramp[low].map((channel, i) => Math.round(channel + (at - low) * (pageData.ramp[low + 1][i] - channel)));
}

const strength = (share, largest) => (share > 0 ? clamp(1 + Math.log10(share / largest) / HEAT_DECADES, 0, 1) : 0);

const images = pageData.frames.map((source) => {
  const image = new Image();
  image.src = source;
  return image;
});
const strip = images.map((image, frame) => {
  const canvas = make("canvas", { click: (event) => pick(canvas, frame, event), "aria-hidden": "true" });
  const caption = make("figcaption");
  const root = make("figure", {}, canvas, caption);
  return { canvas, caption, root };
});
byId("frames").replaceChildren(...strip.map((part) => part.root));

let shown = null;

/** Draws everything for the state. */
async function update() {
  const record = pageData.records.find((one) => one.layer === state.layer && one.step === state.step);
  const { levels, bits } = await mapsOf(record);
  const isChosen = (row, column) => {
    const at = row * numBlocks + column;
    return (bits[at >> 3] >> (7 - (at & 7))) & 1;
  };
  const pair = (other) => (state.incoming ? [other, state.query] : [state.query, other]);
  const shares = boxes.map((_, other) => shareOf(levels[pair(other)[0] * numBlocks + pair(other)[1]]));
  const chosen = boxes.map((_, other) => Boolean(isChosen(...pair(other))));
  shown = { record, shares, chosen, largest: Math.max(...shares), levels, isChosen };
  drawFrames();
  drawMatrices();
  read();
}

function frameOf(block) {
  return boxes[block][0];
}

function drawFrames() {
  const here = frameOf(state.query);
  drawFrame(byId("query-canvas"), here, 2);
  strip.forEach(({ canvas, caption, root }, frame) => {
    drawFrame(canvas, frame, 1);
    const inside = blocksOf(frame);
    const count = inside.filter((block) => shown.chosen[block]).length;
    root.classList.toggle("here", frame === here);
    caption.textContent = `Frame ${frame + 1}: ${count} of ${inside.length} tiles`;
  });
  byId("query-caption").textContent = `Frame ${here + 1} of ${numFrames}`;
}

function blocksOf(frame) {
  return boxes.flatMap((box, i) => (box[0] <= frame && frame < box[1] ? [i] : []));
}

/** One frame with heat, outlines and the dimmed rest. */
function drawFrame(canvas, frame, weight) {
  const [width, height] = pageData.frame_size;
  const zoom = weight > 1 ? Math.max(1, Math.round(1100 / width)) : 1;
  if (canvas.width !== width * zoom) Object.assign(canvas, { width: width * zoom, height: height * zoom });
  const context = canvas.getContext("2d");
  const place = (block) => {
    const [, , top, bottom, left, right] = boxes[block];
    const x = Math.round((left / gridWidth) * canvas.width);
    const y = Math.round((top / gridHeight) * canvas.height);
    return [x, y, Math.round((right / gridWidth) * canvas.width) - x, Math.round((bottom / gridHeight) * canvas.height) - y];
  };
  context.globalAlpha = 1;
  context.drawImage(images[frame], 0, 0, canvas.width, canvas.height);
  const inside = blocksOf(frame);
  for (const block of inside) {
    if (shown.chosen[block]) {
      if (!state.heat) continue;
      const value = strength(shown.shares[block], shown.largest);
      context.globalAlpha = 0.2 + 0.35 * value;
      context.fillStyle = `rgb(${rampColor(value).join(" ")})`;
    } else {
      context.globalAlpha = 1 - DIM;
      context.fillStyle = "#0b0b0d";
    }
    context.fillRect(...place(block));
  }
  context.globalAlpha = 1;
  const line = (weight > 1 ? 1.2 : 1) * zoom;
  const outline = (block, color, thick) => {
    const [x, y, w, h] = place(block);
    context.strokeStyle = color;
    context.lineWidth = thick;
    context.strokeRect(x + thick / 2, y + thick / 2, w - thick, h - thick);
  };
  if (weight > 1) for (const block of inside) outline(block, "rgb(255 255 255 / 0.16)", 1);
  for (const block of inside) if (shown.chosen[block]) outline(block, "rgb(255 214 120)", line);
  if (inside.includes(state.query)) {
    outline(state.query, "#08131a", 3.4 * line);
    outline(state.query, QUERY, 2.2 * line);
  }
}

const painted = new Map();

/** A map as a canvas with a pixel for every pair of tiles, painted once; `color` gives red, green and blue. */
function paintedMap(name, color) {
  const key = `${shown.record.id} ${state.head} ${name}`;
  if (!painted.has(key)) {
    const canvas = make("canvas", { width: numBlocks, height: numBlocks });
    const context = canvas.getContext("2d");
    const image = context.createImageData(numBlocks, numBlocks);
    let at = 0;
    for (let row = 0; row < numBlocks; row++) {
      for (let column = 0; column < numBlocks; column++) {
        [image.data[at], image.data[at + 1], image.data[at + 2], image.data[at + 3]] = [...color(row, column), 255];
        at += 4;
      }
    }
    context.putImageData(image, 0, 0);
    painted.set(key, canvas);
  }
  return painted.get(key);
}

function drawMatrices() {
  const show = (canvas, map) => {
    if (canvas.width !== numBlocks) Object.assign(canvas, { width: numBlocks, height: numBlocks });
    const context = canvas.getContext("2d");
    context.globalAlpha = 1;
    context.drawImage(map, 0, 0);
    context.fillStyle = QUERY;
    context.globalAlpha = 0.45;
    // at least two pixels on the screen, however many tiles there are
    const thick = Math.max(1, (2 * numBlocks) / Math.max(canvas.clientWidth, 1));
    if (state.incoming) context.fillRect(state.query, 0, thick, numBlocks);
    else context.fillRect(0, state.query, numBlocks, thick);
  };
  show(byId("draft-map"), paintedMap("draft", draftColors()));
  show(byId("block-mask"), paintedMap("mask", (row, column) => (shown.isChosen(row, column) ? [255, 214, 120] : pageData.ramp[0])));
}

/** Colours of the draft map: every row in relation to its largest entry. */
function draftColors() {
  const colors = [...Array(256).keys()].map((i) => rampColor(i / 255));
  const largest = Array.from({ length: numBlocks }, (_, row) =>
    shown.levels.subarray(row * numBlocks, (row + 1) * numBlocks).reduce((most, level) => Math.max(most, level), 0));
  // levels are logarithms already: a difference of levels is a ratio of shares
  const span = (255 * MAP_DECADES) / pageData.decades;
  return (row, column) => {
    const below = largest[row] - shown.levels[row * numBlocks + column];
    return colors[Math.round(255 * clamp(1 - below / span, 0, 1))];
  };
}

/** The frames a tile covers, in words. */
function framesOf(block) {
  const [first, end] = boxes[block];
  return end - first > 1 ? `frames ${first + 1}–${end}` : `frame ${first + 1}`;
}

function read() {
  const count = shown.chosen.filter(Boolean).length;
  const frames = new Set(boxes.flatMap(([from, to], i) =>
    shown.chosen[i] ? Array.from({ length: to - from }, (_, k) => from + k) : [])).size;
  const [, , top, bottom, left, right] = boxes[state.query];
  const head = pageData.heads.indexOf(state.head);
  const where = `The tile in rows ${top}–${bottom - 1}, columns ${left}–${right - 1} of ${framesOf(state.query)}`;
  const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
  byId("reading").replaceChildren(...(state.incoming
    ? [`${where} is looked at by `, make("b", {}, `${count} of ${numBlocks}`), ` tiles, from ${frames} of ${numFrames} frames.`]
    : [`${where} is compared with `, make("b", {}, `${count} of ${numBlocks}`), ` tiles, in ${frames} of ${numFrames} frames. `,
      "By the draft they hold ", make("b", {}, percent(shown.record.kept[head][state.query])), " of its attention."]));
}

/** The tile under a click in a frame becomes the query. */
function pick(canvas, frame, event) {
  const box = canvas.getBoundingClientRect();
  const column = ((event.clientX - box.left) / box.width) * gridWidth;
  const row = ((event.clientY - box.top) / box.height) * gridHeight;
  choose(frame, row, column);
}

function choose(frame, row, column) {
  const found = boxes.findIndex(([first, end, top, bottom, left, right]) =>
    first <= frame && frame < end && top <= row && row < bottom && left <= column && column < right);
  if (found < 0) return;
  state.query = found;
  update();
}

byId("query-canvas").addEventListener("click", (event) => pick(byId("query-canvas"), frameOf(state.query), event));
for (const id of ["draft-map", "block-mask"]) {
  const canvas = byId(id);
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [
      clamp(Math.floor(((event.clientY - box.top) / box.height) * numBlocks), 0, numBlocks - 1),
      clamp(Math.floor(((event.clientX - box.left) / box.width) * numBlocks), 0, numBlocks - 1),
    ];
  };
  canvas.addEventListener("click", (event) => {
    state.query = at(event)[state.incoming ? 1 : 0];
    update();
  });
  canvas.addEventListener("pointermove", (event) => {
    const [row, column] = at(event);
    showTip(`tile ${row + 1} (${framesOf(row)}) → tile ${column + 1} (${framesOf(column)}): ` +
      `${(100 * shareOf(shown.levels[row * numBlocks + column])).toPrecision(2)} %`, event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", () => showTip(""));
}

/** Moves the query to the neighbouring tile, or to the same place in another frame. */
function move(frames, rows, columns) {
  const [first, end, top, bottom, left, right] = boxes[state.query];
  const frame = frames > 0 ? end : frames < 0 ? first - 1 : first;
  const row = rows > 0 ? bottom : rows < 0 ? top - 1 : (top + bottom - 1) >> 1;
  const column = columns > 0 ? right : columns < 0 ? left - 1 : (left + right - 1) >> 1;
  choose(frame, row, column);
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.(".choices")) return;
  const step = { ArrowLeft: [0, 0, -1], ArrowRight: [0, 0, 1], ArrowUp: [0, -1, 0], ArrowDown: [0, 1, 0], PageUp: [-1, 0, 0], PageDown: [1, 0, 0] }[event.key];
  // elsewhere on the page these keys scroll it
  if (step && byId("query").contains(event.target)) {
    event.preventDefault();
    move(...step);
  }
  const name = { l: "layers", h: "heads", t: "steps" }[event.key.toLowerCase()];
  if (name) {
    const inputs = [...byId(name).querySelectorAll("input")];
    const now = inputs.findIndex((input) => input.checked);
    inputs[(now + (event.shiftKey ? -1 : 1) + inputs.length) % inputs.length].click();
  }
});

const switches = [["layers", "layer", (number) => String(number)], ["heads", "head", (number) => String(number)], ["steps", "step", (number) => String(number + 1)]];
for (const [id, key, label] of switches) {
  makeChoices(byId(id), id, pageData[id].map(label), pageData[id].indexOf(state[key]), (i) => {
    state[key] = pageData[id][i];
    update();
  });
}
makeChoices(byId("directions"), "directions", ["What it looks at", "What looks at it"], 0, (i) => {
  state.incoming = i === 1;
  update();
});
byId("earlier").addEventListener("click", () => move(-1, 0, 0));
byId("later").addEventListener("click", () => move(1, 0, 0));
byId("heat").addEventListener("click", () => {
  state.heat = !state.heat;
  byId("heat").setAttribute("aria-pressed", String(state.heat));
  drawFrames();
});
{
  const context = byId("ramp").getContext("2d");
  for (let x = 0; x < 128; x++) {
    context.fillStyle = `rgb(${rampColor(x / 127).join(" ")})`;
    context.fillRect(x, 0, 1, 1);
  }
}
byId("frames-note").textContent = numFrames < pageData.num_video_frames
  ? `The model sees ${numFrames} frames for the video's ${pageData.num_video_frames}; each picture is the middle of those that one stands for.`
  : "Pick a tile in any of them.";
byId("facts").replaceChildren(...pageData.facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
Promise.all(images.map((image) => image.decode())).then(update);
