// The viewer: one image enlarged, with all its maps, values under the pointer, and keys.

let viewed = null; // { entry, map (its place), block, head, stored }
let turn = 0; // so that what loads too late is not shown

const viewedMap = () => viewed?.entry.image.maps[viewed.map];
const figure = (value) => (value === 0 ? "0" : Math.abs(value) >= 1000 || Math.abs(value) < 0.001
  ? value.toExponential(2) : value.toPrecision(3)).replaceAll("-", "\u2212");

function openViewer(entry) {
  const place = entry.image.maps.findIndex((map) => mapName(map) === settings.map);
  viewed = { entry, map: Math.max(place, 0), block: 0, head: "mean", stored: null };
  showImage();
  if (!find("viewer").open) find("viewer").showModal();
  find("viewer").focus();
}

function showImage() {
  const { image } = viewed.entry;
  find("viewer-name").textContent = baseOf(image.name);
  find("viewer-path").textContent = image.name;
  find("predictions").replaceChildren(...image.predictions.map(([index, label, score]) => {
    const bar = make("span", { className: "filled" });
    bar.style.width = `${100 * Math.min(score, 1)}%`;
    return make("div", { className: "prediction", title: className(index, label) },
      make("span", { className: "label" }, short(className(index, label))), make("span", { className: "rail" }, bar), make("span", { className: "number" }, percent(score)));
  }));
  find("maps").replaceChildren(...image.maps.map((map, place) => {
    const chip = make("button", { type: "button", role: "option", className: "map" },
      map.range || !map.picture ? make("canvas", { width: 0, height: 0 }) : make("img", { src: map.picture, alt: "", loading: "lazy" }),
      make("span", {}, make("b", {}, word(map.method)), about(map)));
    chip.addEventListener("click", () => showMap(place));
    return chip;
  }));
  find("original").src = image.picture ? `${report.files}/${image.picture}` : "";
  find("original").hidden = !image.picture;
  showMap(viewed.map);
}

function about(map) {
  if (map.class === undefined) return map.request ? ` ${map.request}` : "";
  const own = ` ${short(className(map.class, map.label))}${map.score === undefined ? "" : ` ${percent(map.score)}`}`;
  return map.versus === undefined ? own : `${own} versus ${short(className(map.versus, map.versusLabel))}`;
}

async function showMap(place) {
  Object.assign(viewed, { map: place, block: 0, head: "mean", stored: null });
  const map = viewedMap(), mine = ++turn;
  [...find("maps").children].forEach((chip, each) => chip.setAttribute("aria-selected", each === place));
  find("maps").children[place]?.scrollIntoView({ block: "nearest", inline: "nearest" });
  tellSettings(map);
  find("caveats").replaceChildren(...(map.caveats ?? []).map((each) => make("li", {}, word(each))));
  find("files").replaceChildren(...Object.entries(map.files).map(([kind, href]) => make("a", { href, target: "_blank", rel: "noopener" }, kind)));
  const stored = map.range ? await loadMap(map.id) : null;
  if (mine !== turn || !viewed) return;
  viewed.stored = stored;
  fillParts();
  drawViewed();
  drawChips();
}

/** Offer the blocks and heads of raw attention, from the last block on. */
function fillParts() {
  const { stored } = viewed;
  find("parts").hidden = !stored || stored.slices.length === 1;
  if (find("parts").hidden) return;
  const [blocks, heads] = stored.shape;
  viewed.block = lastBlock(stored);
  const options = (count) => Array.from({ length: count }, (_, each) => make("option", { value: each }, String(each)));
  find("block").replaceChildren(...options(blocks));
  find("head").replaceChildren(make("option", { value: "mean" }, "mean"), ...options(heads));
  find("block").value = viewed.block;
}

function drawViewed() {
  const { stored, entry } = viewed, map = viewedMap(), canvas = find("heat");
  const [height, width] = (entry.image.original && entry.image.size) || (stored ? [stored.rows * 16, stored.cols * 16] : [1, 1]);
  const alone = !stored && map.picture; // the page has no numbers: it shows the file
  const source = alone ? map.picture : entry.image.picture && `${report.files}/${entry.image.picture}`;
  find("original").hidden = !source || (!alone && !entry.image.original);
  if (source && find("original").getAttribute("src") !== source) find("original").src = source;
  find("instead").hidden = Boolean(stored);
  find("instead").textContent = alone ? "The picture as it was written: no numbers of this map are kept, so it has no sliders." : "There is nothing to show of this map.";
  find("frame").classList.toggle("grey", Boolean(stored) && opacityOf(map) > 0);
  find("patch").hidden = true;
  canvas.hidden = find("frames").hidden = !stored;
  document.querySelector(".key").hidden = !stored;
  fitFrame(alone ? null : [height, width]);
  if (!stored) return;
  drawHeat(canvas, width, height, stored, drawOptions(map, viewed.block, viewed.head));
  canvas.style.opacity = entry.image.original ? opacityOf(map) : 1;
  drawFrames(find("frames"), width, height, stored, sharedRange(map));
  find("frames").hidden = canvas.style.opacity === "0";
  drawKey();
}

/** Make the frame as large as the stage allows, in the shape of the picture. */
function fitFrame(size) {
  const stage = document.querySelector(".stage"), frame = find("frame");
  const [height, width] = size ?? [find("original").naturalHeight || 1, find("original").naturalWidth || 1];
  const room = [stage.clientHeight - 32, stage.clientWidth - 32];
  const scale = Math.min(room[0] / height, room[1] / width, 3);
  frame.style.height = `${Math.max(height * scale, 1)}px`;
  frame.style.width = `${Math.max(width * scale, 1)}px`;
}

async function drawChips() {
  const mine = turn, { image } = viewed.entry;
  for (const [place, map] of image.maps.entries()) {
    const stored = map.range ? await loadMap(map.id) : null;
    if (mine !== turn || !viewed) return;
    const canvas = find("maps").children[place].querySelector("canvas");
    if (!stored) continue;
    const options = drawOptions(map, lastBlock(stored));
    [canvas.width, canvas.height] = [56, 42];
    canvas.getContext("2d").putImageData(colorHeat(heatOf(stored, 42, 56, options), 56, stored.is_signed, options, false), 0, 0);
  }
}

/** Draw the colours with the numbers that they stand for. */
function drawKey() {
  const { stored } = viewed, map = viewedMap(), key = find("key");
  const scale = scaleOf(stored, sliceOf(stored, viewed.block, viewed.head), sharedRange(map));
  const table = colorTable(colormapOf(map)), pixels = new ImageData(256, 1);
  for (let each = 0; each < 256; each++) {
    const heat = each / 255, level = Math.round(heat * (LEVELS - 1)) * 4;
    pixels.data.set(table.subarray(level, level + 4), each * 4);
    pixels.data[each * 4 + 3] = weightOf(heat, stored.is_signed, settings.threshold) || !settings.threshold ? 255 : 0;
  }
  key.getContext("2d").putImageData(pixels, 0, 0);
  const ends = scale ? [figure(scale[0]), stored.unit, figure(scale[1])] : ["", "constant: no heat", ""];
  ["low", "middle", "high"].forEach((id, each) => (find(id).textContent = ends[each]));
  key.setAttribute("aria-label", `Colours from ${ends[0]} to ${ends[2]} ${stored.unit}`);
}

// The value and the patch under the pointer

function point(event) {
  const { stored } = viewed ?? {};
  if (!stored) return;
  const box = find("frame").getBoundingClientRect();
  const [left, top, right, bottom] = stored.region;
  const col = Math.floor((((event.clientX - box.left) / box.width - left) / (right - left)) * stored.cols);
  const row = Math.floor((((event.clientY - box.top) / box.height - top) / (bottom - top)) * stored.rows);
  const inside = row >= 0 && col >= 0 && row < stored.rows && col < stored.cols;
  find("patch").hidden = !inside;
  if (!inside) return void (find("pointed").textContent = "not seen by the model");
  const values = sliceOf(stored, viewed.block, viewed.head), value = values[row * stored.cols + col];
  find("pointed").textContent = `row ${row}, column ${col} · ${figure(value)} ${stored.unit}`;
  const [high, wide] = [(bottom - top) / stored.rows, (right - left) / stored.cols];
  const place = { left: left + col * wide, top: top + row * high, width: wide, height: high };
  for (const [side, share] of Object.entries(place)) find("patch").style[side] = `${100 * share}%`;
}

find("frame").addEventListener("pointermove", point);
find("frame").addEventListener("pointerdown", point);
find("frame").addEventListener("pointerleave", () => {
  find("patch").hidden = true;
  find("pointed").textContent = "\u00a0";
});
find("original").addEventListener("load", () => viewed && !viewed.stored && fitFrame(null));
window.addEventListener("resize", () => viewed && drawViewed());
for (const id of ["block", "head"]) {
  find(id).addEventListener("change", (event) => {
    viewed[id] = id === "block" ? Number(event.target.value) : event.target.value;
    drawViewed();
  });
}

// Moving on

function step(by) {
  const images = shown.filter((entry) => entry.image);
  const place = images.indexOf(viewed.entry) + by;
  if (images[place]) {
    const name = mapName(viewedMap());
    viewed = { ...viewed, entry: images[place], map: Math.max(images[place].image.maps.findIndex((map) => mapName(map) === name), 0) };
    showImage();
  }
}

function stepMap(by) {
  const count = viewed.entry.image.maps.length;
  showMap((viewed.map + by + count) % count);
}

let before = null; // the opacity that the original was shown instead of

function toggleOriginal() {
  const now = opacityOf(viewedMap());
  if (now > 0) before = settings.opacity;
  change("opacity", now > 0 ? 0 : before);
}

/** Move among the cards by arrow keys, as they lie. */
function stepCard(key) {
  const cards = shown.map((entry) => entry.card), place = cards.indexOf(document.activeElement);
  if (place < 0) return false;
  const columns = cards.filter((card) => card.offsetTop === cards[0].offsetTop).length;
  cards[place + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key]]?.focus();
  return true;
}

const KEYS = { ArrowLeft: () => step(-1), ArrowRight: () => step(1), ArrowUp: () => stepMap(-1), ArrowDown: () => stepMap(1), o: toggleOriginal };

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
  if (viewed && KEYS[event.key]) KEYS[event.key]();
  else if (event.key === "d") changeTheme();
  else if (!viewed && event.key === "/") find("search").focus();
  else if (viewed || !event.key.startsWith("Arrow") || !stepCard(event.key)) return;
  event.preventDefault();
});

find("before").addEventListener("click", () => step(-1));
find("after").addEventListener("click", () => step(1));
find("close").addEventListener("click", () => find("viewer").close());
find("viewer").addEventListener("close", () => {
  const { entry } = viewed;
  viewed = null;
  turn++;
  find("original").removeAttribute("src");
  tellSettings(firstMap());
  entry.card.focus();
});

find("map").value = settings.map;
tellSettings(firstMap());
arrange();
