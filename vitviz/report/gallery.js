// The gallery: what is shown of all images, in which order, and with which settings.

const report = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const settings = { map: "", opacity: null, threshold: 0, colormap: "", scale: "image" };

/** Make an element; whatever it says is text, never markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in element && name !== "role") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((each) => each !== null));
  return element;
}

const word = (place) => (place === undefined || place === null ? null : report.words[place]);
const percent = (score) => (score < 0.01 && score > 0 ? "<1 %" : `${Math.round(100 * score)} %`);
const short = (label) => label.split(",")[0];
const baseOf = (path) => path.split(/[\\/]/).pop();

function className(index, label) {
  return word(label) ?? `class ${index}`;
}

/** Say what a map is of: all that share this are one choice of the gallery. */
function mapName(map) {
  return [word(map.method), map.request].filter(Boolean).join(" · ");
}

// Maps come from scripts beside the page, since a page from disk may read nothing else.

const KEPT = 400; // decoded maps
const waiting = new Map();
const loaded = new Map();

function vitvizMap(id, stored) {
  waiting.get(id)?.(decodeMap(stored));
}

/** Load a map; null where its script is not there. */
function loadMap(id) {
  if (!loaded.has(id)) {
    loaded.set(id, new Promise((resolve) => {
      const script = make("script", { src: `${report.files}/${id}.js` });
      const done = (map) => (waiting.delete(id), script.remove(), resolve(map));
      waiting.set(id, done);
      script.onerror = script.onload = () => done(null);
      document.head.append(script);
    }));
    if (loaded.size > KEPT) loaded.delete(loaded.keys().next().value);
  }
  return loaded.get(id);
}

// What is chosen

const ranges = new Map(); // of all maps of a method
for (const map of report.images.flatMap((image) => image.maps)) {
  if (!map.range) continue;
  const [low, high] = ranges.get(map.method) ?? [Infinity, -Infinity];
  ranges.set(map.method, [Math.min(low, map.range[0]), Math.max(high, map.range[1])]);
}

const opacityOf = (map) => settings.opacity ?? map.alpha ?? 0.75;
const colormapOf = (map) => settings.colormap || map.colormap;
const sharedRange = (map) => (settings.scale === "all" ? ranges.get(map.method) : null);

function drawOptions(map, block, head = "mean") {
  return { block, head, shared: sharedRange(map), colormap: colormapOf(map), threshold: settings.threshold };
}

const lastBlock = (stored) => (stored.slices.length > 1 ? stored.shape[0] - 1 : 0);

// Cards

function cardOf(image, place) {
  const top = image.predictions[0];
  const label = top ? short(className(top[0], top[1])) : "";
  const canvas = make("canvas", { width: 0, height: 0 });
  const picture = image.thumbnail
    ? make("img", { src: `${report.files}/${image.thumbnail}`, alt: "", loading: "lazy", decoding: "async", width: image.size[1], height: image.size[0] })
    : make("span", { className: "none" }, "no picture");
  const card = make("button", { type: "button", className: "card" },
    make("span", { className: "frame" }, make("span", { className: "fit" }, picture, canvas)),
    make("span", { className: "line" }, make("span", { className: "file", title: image.name }, baseOf(image.name)),
      make("span", { className: "mark", hidden: true }, "caveat")),
    top ? make("span", { className: "line said" }, make("span", { className: "label" }, label), make("span", { className: "number" }, percent(top[2]))) : null);
  if (image.size) card.querySelector(".fit").style.aspectRatio = `${image.size[1]} / ${image.size[0]}`;
  if (image.size && image.size[1] / image.size[0] < Math.min(Math.max(report.aspect, 0.75), 1.6)) card.classList.add("tall");
  card.addEventListener("click", () => openViewer(entry));
  const entry = {
    place, image, card, canvas,
    name: image.name, score: top ? top[2] : -1, label, labels: image.predictions.map(([index, text]) => className(index, text)),
    methods: [...new Set(image.maps.map((map) => word(map.method)))],
  };
  return entry;
}

function failedCard(failure, place) {
  const card = make("div", { className: "card failed", tabIndex: 0 },
    make("span", { className: "frame" }, make("span", { className: "none" }, failure.error)),
    make("span", { className: "line" }, make("span", { className: "file", title: failure.name }, baseOf(failure.name)), make("span", { className: "mark" }, "failed")),
    make("span", { className: "line said" }, make("span", { className: "label", title: failure.methods.join(", ") }, failure.methods.join(", "))));
  return { place, card, failure, name: failure.name, score: -2, label: "", labels: [], methods: failure.methods };
}

const entries = [
  ...report.images.map(cardOf),
  ...report.failures.map((failure, place) => failedCard(failure, report.images.length + place)),
];
let shown = entries;
find("gallery").style.setProperty("--aspect", Math.min(Math.max(report.aspect, 0.75), 1.6));
const near = new Set();

const chosenMap = (entry) => entry.image?.maps.find((each) => mapName(each) === settings.map);

/** Return what may mislead in what a card shows. */
const caveatsOf = (entry) => chosenMap(entry)?.caveats ?? [];

/** Draw the heat of a card that is in sight, and let go of one that is not. */
async function drawCard(entry) {
  const map = chosenMap(entry);
  entry.card.classList.toggle("grey", Boolean(map?.range) && settings.opacity !== 0);
  if (!map?.range || !near.has(entry)) {
    entry.canvas.width = entry.canvas.height = 0;
    return;
  }
  const stored = await loadMap(map.id);
  if (!stored || !near.has(entry) || mapName(map) !== settings.map) return;
  const [height, width] = entry.image.size ?? [stored.rows, stored.cols];
  const scale = Math.min(360 / Math.max(height, width), 1);
  drawHeat(entry.canvas, Math.max(Math.round(width * scale), 1), Math.max(Math.round(height * scale), 1), stored, drawOptions(map, lastBlock(stored)));
  entry.canvas.style.opacity = entry.image.original ? opacityOf(map) : 0; // on a map, no second one
}

const sight = new IntersectionObserver((seen) => {
  for (const each of seen) {
    const entry = entries[each.target.dataset.place];
    if (each.isIntersecting) near.add(entry);
    else near.delete(entry);
    drawCard(entry);
  }
}, { rootMargin: "400px" });

for (const entry of entries) {
  entry.card.dataset.place = entry.place;
  if (entry.image) sight.observe(entry.card);
}

// Filters and order

const ORDERS = {
  folder: (a, b) => a.place - b.place,
  name: (a, b) => a.name.localeCompare(b.name),
  high: (a, b) => b.score - a.score,
  low: (a, b) => (a.score < 0) - (b.score < 0) || a.score - b.score,
  class: (a, b) => (a.label === "") - (b.label === "") || a.label.localeCompare(b.label) || b.score - a.score,
  method: (a, b) => a.methods.join().localeCompare(b.methods.join()),
  caveat: (a, b) => caveatsOf(b).length - caveatsOf(a).length,
  failed: (a, b) => Boolean(b.failure) - Boolean(a.failure),
};

function matches(entry) {
  const text = find("search").value.trim().toLowerCase();
  const state = find("state").value;
  return (!text || [entry.name, ...entry.labels].some((each) => each.toLowerCase().includes(text)))
    && (!find("class").value || entry.label === find("class").value)
    && (!find("method").value || entry.methods.includes(find("method").value))
    && (!state || (state === "failed" ? entry.failure : state === "caveat" ? caveatsOf(entry).length : caveatsOf(entry).includes(Number(state))));
}

function arrange() {
  shown = entries.filter(matches).sort((a, b) => ORDERS[find("sort").value](a, b) || a.place - b.place);
  find("gallery").replaceChildren(...shown.map((entry) => entry.card));
  for (const entry of shown.filter((each) => each.image)) {
    const mark = entry.card.querySelector(".mark"), caveats = caveatsOf(entry).map(word);
    [mark.hidden, mark.title] = [!caveats.length, caveats.join("\n")];
  }
  find("nothing").hidden = shown.length > 0;
  const failed = shown.filter((entry) => entry.failure).length;
  const images = shown.length - failed;
  const of = shown.length < entries.length ? ` of ${entries.length - report.failures.length}` : "";
  find("count").textContent = `${images}${of} ${images === 1 && !of ? "image" : "images"}${failed ? `, ${failed} failed` : ""}`;
}

function redraw() {
  for (const entry of near) drawCard(entry);
  if (viewed) drawViewed();
}

// Controls: those of the viewer are the same, twice

function tellSettings(map) {
  const opacity = map ? opacityOf(map) : settings.opacity ?? 0.75;
  for (const end of ["", "-2"]) {
    find(`opacity${end}`).value = Math.round(100 * opacity);
    find(`opacity-told${end}`).textContent = percent(Math.round(100 * opacity) / 100);
    find(`threshold${end}`).value = Math.round(100 * settings.threshold);
    find(`threshold-told${end}`).textContent = percent(settings.threshold);
    find(`colormap${end}`).value = settings.colormap;
    find(`scale${end}`).value = settings.scale;
  }
}

function change(name, value) {
  settings[name] = value;
  tellSettings(viewed ? viewedMap() : firstMap());
  redraw();
}

const firstMap = () => report.images.flatMap((image) => image.maps).find((map) => mapName(map) === settings.map);

for (const end of ["", "-2"]) {
  find(`colormap${end}`).append(make("option", { value: "" }, "as made"), ...Object.keys(report.colormaps).map((name) => make("option", { value: name }, name)));
  find(`opacity${end}`).addEventListener("input", (event) => change("opacity", event.target.value / 100));
  find(`threshold${end}`).addEventListener("input", (event) => change("threshold", event.target.value / 100));
  find(`colormap${end}`).addEventListener("change", (event) => change("colormap", event.target.value));
  find(`scale${end}`).addEventListener("change", (event) => change("scale", event.target.value));
}

function fill(id, all, words) {
  find(id).append(make("option", { value: "" }, all), ...words.map(([value, text]) => make("option", { value }, text)));
}

const counted = (words) => [...words.reduce((counts, each) => counts.set(each, (counts.get(each) ?? 0) + 1), new Map())];
const names = [...new Set(report.images.flatMap((image) => image.maps.map(mapName)))];
find("map").append(...names.map((name) => make("option", { value: name }, name)), make("option", { value: "" }, "none: the originals"));
const newest = report.newest.filter((each) => each !== null).map((each, place) => (place ? each : word(each))).join(" · ");
settings.map = newest;
fill("class", "all classes", counted(entries.map((entry) => entry.label).filter(Boolean)).sort(([a], [b]) => a.localeCompare(b)).map(([label, count]) => [label, `${label} (${count})`]));
fill("method", "all methods", counted(entries.flatMap((entry) => entry.methods)).map(([name, count]) => [name, `${name} (${count})`]));
const reasons = new Set(report.images.flatMap((image) => image.maps.flatMap((map) => map.caveats ?? [])));
fill("state", "all images", [["caveat", "with a caveat"], ...[...reasons].map((each) => [each, word(each).split(":")[0]]), ["failed", `failed (${report.failures.length})`]]);

find("map").addEventListener("change", (event) => {
  change("map", event.target.value);
  arrange(); // caveats are those of the map
});
for (const id of ["class", "method", "state", "sort"]) find(id).addEventListener("change", arrange);
find("search").addEventListener("input", arrange);
const reset = () => {
  find("search").value = "";
  find("controls").reset();
  Object.assign(settings, { map: newest, opacity: null, threshold: 0, colormap: "", scale: "image" });
  find("map").value = settings.map;
  tellSettings(firstMap());
  arrange();
  redraw();
};
find("controls").addEventListener("reset", (event) => event.isTrusted && setTimeout(reset));
find("controls").addEventListener("submit", (event) => event.preventDefault());
find("again").addEventListener("click", reset);

function remembered(name, value) {
  try { // a browser may keep nothing for pages from disk
    if (value !== undefined) localStorage.setItem(`vitviz-${name}`, value);
    return localStorage.getItem(`vitviz-${name}`);
  } catch { return null; }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function changeTheme() {
  const dark = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  setTheme(dark === "dark" ? "light" : "dark");
  remembered("theme", document.documentElement.dataset.theme);
}

if (remembered("theme")) setTheme(remembered("theme"));
find("theme").addEventListener("click", changeTheme);
