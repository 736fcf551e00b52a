"use strict";
// Numbers of a map → colours on a canvas, to the pixel as vitviz draws its PNGs.

const LEVELS = 4081; // of heat, as in the PNGs: the middle is one
const DIMMED = 0.6; // of the brightness is taken where the model saw nothing
const FRAME = ["#fff", "#1e1e1e"]; // around patches whose tokens are of outlying norm
const FLAT = 1e-5; // a range of at most this share of the largest magnitude counts as constant

/** Read what a script beside the page holds: one Float32Array for each (rows, cols). */
function decodeMap(stored) {
  const [rows, cols] = stored.shape.slice(-2);
  const bytes = Uint8Array.from(atob(stored.values), (each) => each.charCodeAt(0));
  const levels = new DataView(bytes.buffer);
  const slices = stored.ranges.map(([low, high], slice) => {
    const at = (cell) => levels.getUint16(2 * (slice * rows * cols + cell), true);
    return Float32Array.from({ length: rows * cols }, (_, cell) => low + (at(cell) / 65535) * (high - low));
  });
  return { ...stored, rows, cols, slices };
}

/** Return the values of a block and a head; head "mean": the average over the heads. */
function sliceOf(map, block, head) {
  if (map.slices.length === 1) return map.slices[0];
  const heads = map.shape[1];
  if (head !== "mean") return map.slices[block * heads + Number(head)];
  const chosen = map.slices.slice(block * heads, (block + 1) * heads);
  return chosen[0].map((_, cell) => chosen.reduce((sum, each) => sum + each[cell], 0) / heads);
}

/** Return what is drawn coldest and hottest; null for a constant map, which gives no heat. */
function scaleOf(map, values, shared) {
  if (shared) return map.is_signed ? symmetric(shared) : shared;
  if (map.extent) return map.extent[0] < map.extent[1] ? map.extent : null;
  const counted = values.filter((_, cell) => !map.is_muted || !isOutlier(map, cell));
  const [low, high] = (counted.length ? counted : values).reduce(
    ([least, most], each) => [Math.min(least, each), Math.max(most, each)], [Infinity, -Infinity]);
  const largest = Math.max(Math.abs(low), Math.abs(high));
  if (!largest || (high - low) / largest <= FLAT) return null;
  return map.is_signed ? symmetric([low, high]) : [low, high];
}

/** Tell whether a cell belongs to a patch whose token is of outlying norm. */
function isOutlier(map, cell) {
  const row = Math.floor((Math.floor(cell / map.cols) * map.patches[0]) / map.rows);
  const col = Math.floor(((cell % map.cols) * map.patches[1]) / map.cols);
  return map.outliers.some(([its, other]) => its === row && other === col);
}

/** Return the patches that get a frame: of muted outliers, those that are beyond the colours. */
function framedPatches(map, shared) {
  const [values] = map.slices, scale = scaleOf(map, values, shared);
  if (map.slices.length > 1 || !scale) return [];
  return map.outliers.filter(([row, col]) => !map.is_muted || values.some((value, cell) =>
    (value < scale[0] || value > scale[1]) && isOutlier({ ...map, outliers: [[row, col]] }, cell)));
}

function symmetric([low, high]) {
  const most = Math.max(-low, high);
  return [-most, most];
}

/** Interpolate (rows, cols) to (height, cols) by monotone cubics, as vitviz/pictures/interpolation.py says. */
function downColumns(cells, rows, cols, height) {
  const grown = new Float32Array(height * cols);
  for (let col = 0; col < cols; col++) {
    const value = (row) => cells[Math.min(Math.max(row, 0), rows - 1) * cols + col];
    const slope = (row) => {
      const [before, after] = [value(row) - value(row - 1), value(row + 1) - value(row)];
      return before * after > 0 ? (2 * before * after) / (before + after) : 0;
    };
    for (let pixel = 0; pixel < height; pixel++) {
      const place = ((pixel + 0.5) * rows) / height - 0.5;
      const row = Math.floor(place), t = place - row;
      const step = value(row + 1) - value(row), [m0, m1] = [slope(row), slope(row + 1)];
      grown[pixel * cols + col] = value(row) + t * (m0 + t * (3 * step - 2 * m0 - m1 + t * (m0 + m1 - 2 * step)));
    }
  }
  return grown;
}

function transposed(values, rows, cols) {
  const turned = new Float32Array(values.length);
  for (let row = 0; row < rows; row++) for (let col = 0; col < cols; col++) turned[col * rows + row] = values[row * cols + col];
  return turned;
}

/** Interpolate (rows, cols) to (height, width), along the rows first. */
function interpolate(cells, rows, cols, height, width) {
  const wide = downColumns(transposed(cells, rows, cols), cols, rows, width);
  return downColumns(transposed(wide, width, rows), rows, width, height);
}

const even = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x)); // halves to even

/** Return the pixels of a stretch of a side, as the PNGs have them: at least one. */
function span(start, stop, length) {
  const first = Math.min(even(start * length), length - 1);
  return [first, Math.max(even(stop * length), first + 1)];
}

const tables = new Map();

/** Return the colours of a colormap, four bytes for each level. */
function colorTable(name) {
  if (!tables.has(name)) {
    const anchors = Uint8Array.from(atob(report.colormaps[name]), (each) => each.charCodeAt(0));
    const table = new Uint8ClampedArray(LEVELS * 4);
    for (let level = 0; level < LEVELS; level++) {
      const place = (level / (LEVELS - 1)) * 255;
      const below = Math.min(Math.floor(place), 254);
      for (let channel = 0; channel < 3; channel++) {
        const [from, to] = [anchors[below * 3 + channel], anchors[below * 3 + 3 + channel]];
        table[level * 4 + channel] = Math.round(from + (place - below) * (to - from));
      }
      table[level * 4 + 3] = 255;
    }
    tables.set(name, table);
  }
  return tables.get(name);
}

/** Tell how much of the heat is drawn, in [0, 1]: the more the hotter it is, below the threshold nothing. */
function weightOf(heat, isSigned, threshold) {
  const strength = isSigned ? Math.abs(2 * heat - 1) : heat;
  return strength >= threshold ? strength * (2 - strength) : 0;
}

/** Interpolate a map to the size of what the model saw: heat in [0, 1]. */
function heatOf(map, height, width, options) {
  const values = sliceOf(map, options.block, options.head);
  const scale = scaleOf(map, values, options.shared);
  const cold = map.is_signed ? 0.5 : 0;
  const cells = values.map((each) => (scale ? Math.min(Math.max((each - scale[0]) / (scale[1] - scale[0]), 0), 1) : cold));
  return interpolate(cells, map.rows, map.cols, height, width).map((each) => Math.min(Math.max(each, 0), 1));
}

/** Colour heat; of `weigh`, false: all of it alike, as in the PNGs of heat alone. */
function colorHeat(heat, width, isSigned, options, weigh = true) {
  const table = new Uint32Array(colorTable(options.colormap).buffer); // a colour a number, red lowest
  const pixels = new ImageData(width, heat.length / width);
  const colors = new Uint32Array(pixels.data.buffer);
  for (let each = 0; each < heat.length; each++) {
    const weight = weigh ? Math.round(255 * weightOf(heat[each], isSigned, options.threshold)) : 255;
    colors[each] = (table[Math.round(heat[each] * (LEVELS - 1))] & 0xffffff) | (weight << 24);
  }
  return pixels;
}

/** Draw a frame around patches of a map, on a canvas of a picture's size, as in the PNGs. */
function drawFrames(canvas, width, height, map, shared) {
  const [left, top, right, bottom] = map.region;
  const [[x0, x1], [y0, y1]] = [span(left, right, width), span(top, bottom, height)];
  const context = canvas.getContext("2d");
  [canvas.width, canvas.height] = [width, height];
  const edge = (side, place, count) => even((side * place) / count);
  for (const [row, col] of framedPatches(map, shared)) {
    const [l, r] = [col, col + 1].map((each) => x0 + edge(x1 - x0, each, map.patches[1]));
    const [t, b] = [row, row + 1].map((each) => y0 + edge(y1 - y0, each, map.patches[0]));
    for (const [inset, ink] of FRAME.entries()) {
      context.strokeStyle = ink;
      context.strokeRect(l + inset + 0.5, t + inset + 0.5, r - l - 2 * inset - 1, b - t - 2 * inset - 1);
    }
  }
}

/**
 * Draw a map on a canvas of a picture's size; what the model did not see is dimmed.
 *
 * options: block, head, shared (a range, or null for the map's own), colormap, threshold.
 */
function drawHeat(canvas, width, height, map, options) {
  const [left, top, right, bottom] = map.region;
  const [[x0, x1], [y0, y1]] = [span(left, right, width), span(top, bottom, height)];
  const heat = heatOf(map, y1 - y0, x1 - x0, options);
  const context = canvas.getContext("2d");
  [canvas.width, canvas.height] = [width, height];
  context.fillStyle = `rgb(0 0 0 / ${Math.min(DIMMED / (map.alpha || 1), 1)})`; // at the opacity of the PNG: as there
  context.fillRect(0, 0, width, height);
  context.putImageData(colorHeat(heat, x1 - x0, map.is_signed, options), x0, y0);
}
