// The page of `latentzoom serve`. Two layers in one OpenSeadragon viewer: what stands left of the divider below, ours
// above, cut off at the divider. Tiles are asked for as one zooms; see orchestration/serve/app.py for the interface.

const $ = (id) => document.getElementById(id);
const state = { picture: null, models: [], model: "", below: null, ours: null, preview: null, reopen: null, isPlaced: false,
  isSaving: false, divider: 0.5, tab: "enlarge" };

const viewer = OpenSeadragon({
  element: $("viewer"),
  drawer: "canvas",
  showNavigationControl: false,
  animationTime: 0.25,
  springStiffness: 12,
  maxZoomPixelRatio: 1,
  minZoomImageRatio: 0.5,
  visibilityRatio: 0.2,
  zoomPerScroll: 1.35,
  gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
  imageLoaderLimit: 6,
  maxImageCacheCount: 800,
  timeout: 120000,
  tileRetryMax: 2,
  tileRetryDelay: 800,
  subPixelRoundingForTransparency: OpenSeadragon.SUBPIXEL_ROUNDING_OCCURRENCES.ALWAYS,
});
window.latentzoomViewer = viewer; // for those who script the page
viewer.canvas.setAttribute("role", "application"); // it has keys of its own
viewer.canvas.setAttribute("aria-label", $("viewer").dataset.label);

// --- small things --------------------------------------------------------------------------------------------------

function say(text, isError = false) {
  $("said").textContent = text;
  $("said").classList.toggle("error", isError);
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function ask(path, options = {}, tries = 5) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; is it running?");
  }
  if (answer.ok) return answer;
  if (answer.status === 503 && tries > 1) { // much to do: its turn comes
    await pause(1000 * (Number(answer.headers.get("Retry-After")) || 1));
    return ask(path, options, tries - 1);
  }
  let told = `${answer.status} ${answer.statusText}`;
  try { told = (await answer.json()).error ?? told; } catch { /* no JSON */ }
  throw Object.assign(new Error(told), { status: answer.status });
}

// What is asked for last counts: each thing that shows another picture, or the same in another way, takes a turn, and
// what comes later for an older one is let go.
class Late extends Error {}
let turn = 0;
let upload = null;
let opening = null; // while another picture is asked for: a function that asks for it again

function begin(reopen = null) {
  upload?.abort();
  upload = new AbortController();
  takeBack();
  opening = reopen;
  $("ready").hidden = true;
  return ++turn;
}
function check(mine) { if (mine !== turn) throw new Late(); }
function fail(error, mine) {
  if (mine !== turn || error instanceof Late || error.name === "AbortError") return;
  $("ready").hidden = true;
  if (opening) { // the picture that showed before goes on
    takeBack();
    opening = null;
    again(true);
  } else if (state.ours && !state.picture.is_generated) setModel(state.ours.model); // which still draws
  say(error.message, true);
}

const query = (values) => new URLSearchParams(Object.entries(values).filter(([, value]) => value !== "")).toString();

const modelOf = (picture) => picture.is_generated ? "" : state.model;

function tilesOf(picture, look) {
  const model = look === "ours" ? modelOf(picture) : picture.model; // the same tiles beside every model
  return {
    width: picture.full_width,
    height: picture.full_height,
    tileSize: picture.tile_size,
    minLevel: 0,
    maxLevel: picture.top_level,
    getTileUrl: (level, x, y) =>
      `pictures/${picture.id}/tiles/${level}/${x}_${y}?${query({ look, model })}`,
  };
}

async function add(tileSource, mine, options = {}) {
  const item = await new Promise((resolve, reject) => viewer.addTiledImage({
    tileSource, ...options, success: (e) => resolve(e.item), error: (e) => reject(new Error(e.message)) }));
  if (mine !== turn) { drop([item]); throw new Late(); }
  return item;
}

// --- what is shown -------------------------------------------------------------------------------------------------

const leaving = new Set(); // layers that show until what takes their place is there

function drop(items) {
  for (const item of items) {
    leaving.delete(item);
    if (viewer.world.getIndexOfItem(item) >= 0) viewer.world.removeItem(item);
    if (item.previewUrl) URL.revokeObjectURL(item.previewUrl);
    drop(item.replaces ?? []);
  }
}

function replace(items, by) {
  by.replaces = items; // and what those were to replace goes with them
  for (const item of items) leaving.add(item);
  const isThere = ({ fullyLoaded }) => {
    if (!fullyLoaded) return;
    by.removeHandler("fully-loaded-change", isThere);
    drop(items);
  };
  by.addHandler("fully-loaded-change", isThere);
}

function clear() {
  drop([state.below, state.ours, state.preview, ...leaving].filter(Boolean));
  Object.assign(state, { picture: null, below: null, ours: null, preview: null, reopen: null, isPlaced: false });
  history.replaceState(null, "", location.pathname);
  tellControls();
}

function tellControls() {
  $("divider").hidden = !state.below || !state.ours;
  $("drop").hidden = Boolean(state.picture || state.preview);
  $("save").disabled = !state.picture || state.isSaving;
  $("zoom").disabled = !state.picture;
}

// While the preview of another picture shows, the one that showed before is kept: the server may refuse the other.
let kept = null;

function showPreview(preview) {
  drop([...leaving]);
  const { picture, below, ours, preview: former, reopen, isPlaced } = state;
  const layers = [below, ours, former].filter(Boolean);
  kept = { before: { picture, below, ours, preview: former, reopen, isPlaced }, layers, bounds: viewer.viewport.getBounds() };
  for (const item of layers) item.setOpacity(0);
  Object.assign(state, { picture: null, below: null, ours: null, reopen: null, preview, isPlaced: true });
  viewer.viewport.fitBounds(preview.getBounds(), true);
  tellControls();
}

function takeBack() {
  if (!kept) return;
  drop([state.preview]);
  const { before, layers, bounds } = kept;
  kept = null;
  Object.assign(state, before);
  for (const item of layers) item.setOpacity(1);
  if (state.picture) viewer.viewport.fitBounds(bounds, true);
  tellControls();
  place();
  tellZoom();
}

function arrived(mine, reopen = null) {
  // The server has the picture that was asked for: what showed before goes, but for the new one's preview.
  check(mine);
  opening = null;
  if (kept) drop(kept.layers);
  else clear();
  kept = null;
  state.reopen = reopen;
}

async function show(picture, mine, isQuiet = false) {
  const isOther = state.picture?.id !== picture.id;
  state.picture = picture;
  tellControls();
  $("zoom").max = mostZoom();
  if (isOther) sizes("scale");
  history.replaceState(null, "", `?${query({ picture: picture.id })}`); // reloaded, the page shows it again
  const look = $("beside").value, model = modelOf(picture);
  if (!picture.is_generated && state.below?.look !== look) {
    const below = Object.assign(await add(tilesOf(picture, look), mine, { index: 0 }), { look });
    fit(below);
    replace([state.below, state.preview].filter(Boolean), below);
    [state.below, state.preview] = [below, null];
  }
  if (state.ours?.model !== model) {
    await ready(picture, mine);
    const ours = Object.assign(await add(tilesOf(picture, "ours"), mine), { isOurs: true, model });
    fit(ours);
    if (state.ours) replace([state.ours], ours);
    state.ours = ours;
  }
  tellControls();
  place();
  tellZoom();
  if (!isQuiet) say(`${picture.name}, ${picture.width} × ${picture.height}`);
}

function fit(item) {
  // The whole of a picture at first; then its viewer chooses the place.
  if (!state.isPlaced) viewer.viewport.fitBounds(item.getBounds(), true);
  state.isPlaced = true;
}

async function ready(picture, mine) {
  // Until the latent is there, tiles would wait for it, and take the few connections that a browser has to a host.
  let told = { is_ready: false, problem: "", progress: 0 };
  const began = performance.now();
  for (let wait = 60; ; wait = Math.min(1.2 * wait, 1000)) {
    try {
      told = await (await ask(`pictures/${picture.id}?${query({ model: modelOf(picture) })}`)).json();
    } catch (error) {
      check(mine);
      if (error.status) throw error;
      say(`${error.message} Trying again …`, true);
    }
    check(mine);
    if (told.problem) throw new Error(told.problem);
    $("ready").hidden = told.is_ready;
    if (told.is_ready) return;
    $("ready").value = told.progress;
    if (performance.now() - began > 400 && !$("said").classList.contains("error")) say("making the latent …");
    await pause(wait);
    check(mine);
  }
}

function place() {
  // The divider's place on the screen, as a cut through the upper layer.
  $("divider").style.left = `${100 * state.divider}%`;
  $("divider").setAttribute("aria-valuenow", Math.round(100 * state.divider));
  if (!state.ours || !state.below) return;
  const x = state.divider * $("stage").clientWidth;
  const point = state.ours.viewerElementToImageCoordinates(new OpenSeadragon.Point(x, 0));
  const { full_width: width, full_height: height } = state.picture;
  const left = Math.min(Math.max(point.x, 0), width);
  const clip = new OpenSeadragon.Rect(left, 0, Math.max(width - left, 0.001), height);
  for (let i = 0; i < viewer.world.getItemCount(); i++) {
    const item = viewer.world.getItemAt(i);
    if (item.isOurs) item.setClip(clip);
  }
}

function currentZoom(isCurrent = true) {
  // Screen pixels for each pixel of the picture, which is one viewport unit wide.
  return viewer.viewport.getZoom(isCurrent) * viewer.viewport.getContainerSize().x / state.picture.width;
}

// Beyond this, the browser would stretch what was drawn.
const mostZoom = () => state.picture.full_width / state.picture.width;

function isMost(zoom) {
  if (zoom > mostZoom() * 1.001) say(`× ${mostZoom()} is the most that can be shown of this picture`);
  return zoom >= mostZoom();
}

function zoomTo(zoom) {
  if (!state.picture) return;
  if (zoom > 0) {
    if (isMost(zoom)) zoom = mostZoom();
    viewer.viewport.zoomTo(zoom * state.picture.width / viewer.viewport.getContainerSize().x);
    viewer.viewport.applyConstraints();
  }
  $("zoom").value = Number(currentZoom(false).toPrecision(3));
}

function zoomBy(factor) {
  if (state.picture) zoomTo(factor * currentZoom(false));
  else viewer.viewport.zoomBy(factor).applyConstraints();
}

function tellZoom() {
  if (state.picture && document.activeElement !== $("zoom")) $("zoom").value = Number(currentZoom().toPrecision(3));
}

viewer.addHandler("update-viewport", place);
viewer.addHandler("resize", () => setTimeout(place));
viewer.addHandler("animation", tellZoom);
viewer.addHandler("canvas-scroll", ({ scroll }) => {
  if (state.picture && scroll > 0) isMost(viewer.zoomPerScroll * currentZoom(false));
});
viewer.addHandler("canvas-key", (event) => {
  const { key } = event.originalEvent; // the sign, wherever a keyboard has it
  const factor = { "+": 1.5, "-": 1 / 1.5 }[key];
  if (factor) zoomBy(factor);
  if (factor || "rRfFjJkK".includes(key)) event.preventDefaultAction = true; // no turning and no mirroring
});

// Tiles that could not be had are asked for again once the server answers, after it was started again for one.
const lost = [];
let isTrying = false;
viewer.addHandler("tile-load-failed", (event) => { lost.push(event); tryAgain(); });
async function tryAgain() {
  if (isTrying) return;
  isTrying = true;
  try {
    for (let wait = 1000; state.picture; wait = Math.min(2 * wait, 15000)) {
      await pause(wait);
      const { picture } = state;
      if (!picture) break;
      try {
        await ask(`pictures/${picture.id}.dzi`, { cache: "no-store" });
      } catch (error) {
        say(error.status ? error.message : `${error.message} Trying again …`, true);
        if (error.status === 404) break; // it expired
        continue;
      }
      for (const { tile, tiledImage } of lost) {
        if (viewer.world.getIndexOfItem(tiledImage) < 0) continue;
        tile.exists = true;
        tiledImage._needsUpdate = true; // as when the viewport moves
      }
      viewer.forceRedraw();
      if ($("said").classList.contains("error")) say("");
      break;
    }
  } finally {
    lost.length = 0;
    isTrying = false;
  }
}
// A picture that a page shows does not expire.
setInterval(() => { if (state.picture) fetch(`pictures/${state.picture.id}.dzi`, { cache: "no-store" }).catch(() => null); }, 600000);

// --- pictures in ---------------------------------------------------------------------------------------------------

async function open(file) {
  const reopen = () => open(file);
  const mine = begin(reopen);
  say(`opening ${file.name} …`);
  const url = URL.createObjectURL(file);
  try {
    try { // at once, as the browser shows it
      await Object.assign(new Image(), { src: url }).decode(); // fails without a word in the console
      check(mine);
      const preview = await add({ type: "image", url, buildPyramid: false }, mine);
      showPreview(Object.assign(preview, { previewUrl: url }));
    } catch (error) { // or a format that the browser does not know: the server's tiles show it
      URL.revokeObjectURL(url);
      if (error instanceof Late) throw error;
    }
    const values = { name: file.name, model: state.model, shrink: $("shrink").value };
    const answer = await ask(`pictures?${query(values)}`, { method: "POST", body: file, signal: upload.signal });
    await given(await answer.json(), mine, reopen);
  } catch (error) { fail(error, mine); }
}

async function given(picture, mine, reopen = null) {
  arrived(mine, reopen);
  if ($("shrink").querySelector(`[value="${picture.shrink}"]`)) $("shrink").value = picture.shrink;
  const original = $("beside").querySelector("[value=original]");
  original.disabled = picture.shrink === 1;
  if (original.disabled) $("beside").value = "bicubic";
  nameLeft();
  await show(picture, mine);
}

function nameLeft() {
  const name = $("beside").selectedOptions[0].textContent;
  $("left-name").textContent = name;
  $("divider").setAttribute("aria-label", `Divider: ${name} on its left, ours on its right`);
}

$("choose").onclick = () => $("file").click();
$("drop").onclick = () => { if (state.tab === "enlarge") $("file").click(); };
$("file").onchange = () => { if ($("file").files[0]) open($("file").files[0]); $("file").value = ""; };
for (const kind of ["dragenter", "dragover"])
  document.addEventListener(kind, (event) => { event.preventDefault(); $("stage").classList.add("over"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("stage").classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("stage").classList.remove("over");
  const file = event.dataTransfer.files[0];
  if (file) open(file); else say("drop a picture file, please", true);
});
document.addEventListener("paste", (event) => { const file = event.clipboardData.files[0]; if (file) open(file); });
$("sample").onchange = () => {
  const name = $("sample").value;
  $("sample").value = "";
  if (name) openSample(name);
};
async function openSample(name) {
  const reopen = () => openSample(name);
  const mine = begin(reopen);
  say(`opening ${name} …`);
  try {
    const values = { model: state.model, shrink: $("shrink").value };
    const answer = await ask(`samples/${name}?${query(values)}`, { method: "POST", signal: upload.signal });
    await given(await answer.json(), mine, reopen);
  } catch (error) { fail(error, mine); }
}
$("shrink").onchange = () => {
  const reopen = opening ?? state.reopen;
  if (reopen) reopen();
  else if (state.picture) say("this counts for the next picture; open this one again to have it shrunk so");
};
async function again(isQuiet = false) {
  if (!state.picture || state.picture.is_generated || opening) return; // what is asked for comes as is chosen now
  const mine = begin();
  try { await show(state.picture, mine, isQuiet); } catch (error) { fail(error, mine); }
}
$("beside").onchange = () => { nameLeft(); again(); };

// --- models --------------------------------------------------------------------------------------------------------

async function listModels() {
  const { default: first, models, problem } = await (await ask("models")).json();
  if (problem) say(problem, true);
  state.models = models;
  state.model = models.some((one) => one.address === state.model) ? state.model : first;
  $("model").replaceChildren(...models.map((one) => new Option(one.title, one.address, false, one.address === state.model)));
  tellFigures();
  tellTasks();
}

// A model whose task is not known yet may generate.
const generates = (address) => !["direct", "sr"].includes(state.models.find((one) => one.address === address)?.task);

let toldOfTask = "";
function tellTasks() {
  // In the tab for it, only what can generate.
  const isGenerating = state.tab === "generate";
  for (const option of $("model").options) option.disabled = isGenerating && !generates(option.value);
  const cannot = isGenerating && !generates(state.model);
  $("generate").querySelector("button").disabled = cannot;
  const former = toldOfTask;
  toldOfTask = !cannot ? "" : state.models.some((one) => generates(one.address))
    ? "this model only enlarges; choose one that generates"
    : "none of these models can generate; start the server with --model and one that can";
  if (toldOfTask) say(toldOfTask, true);
  else if (former && $("said").textContent === former) say("");
}

function tellFigures() {
  const figures = Object.entries(state.models.find((one) => one.address === state.model)?.figures ?? {});
  $("figures").textContent = figures.slice(0, 4).map(([name, value]) => `${name} ${Number(value.toPrecision(4))}`).join(" · ");
}

function setModel(address) {
  $("model").value = state.model = address;
  tellFigures();
  tellTasks();
}

$("model").onchange = () => {
  setModel($("model").value);
  again();
};

// --- divider -------------------------------------------------------------------------------------------------------

function divide(value) { state.divider = Math.min(Math.max(value, 0), 1); place(); viewer.forceRedraw(); }

// The viewer gets all that the pointer does, since the wheel and two fingers are for it also at the divider.
let isDividing = false;
const isAtDivider = (x) => !$("divider").hidden &&
  Math.abs(x - state.divider * $("stage").clientWidth) <= $("divider").clientWidth / 2;
viewer.addHandler("canvas-press", ({ position }) => { isDividing = isAtDivider(position.x); });
viewer.addHandler("canvas-pinch", () => { isDividing = false; });
viewer.addHandler("canvas-drag", (event) => {
  if (!isDividing) return;
  event.preventDefaultAction = true;
  divide(event.position.x / $("stage").clientWidth);
});
viewer.addHandler("canvas-drag-end", (event) => { if (isDividing) event.preventDefaultAction = true; });
viewer.addHandler("canvas-release", () => { if (isDividing) $("divider").focus(); });
$("stage").addEventListener("pointermove", (event) => {
  const x = event.clientX - $("stage").getBoundingClientRect().left;
  viewer.canvas.style.cursor = isAtDivider(x) ? "ew-resize" : "";
});
$("divider").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -0.02, ArrowDown: -0.02, ArrowRight: 0.02, ArrowUp: 0.02, PageDown: -0.1, PageUp: 0.1, Home: -1, End: 1 }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  divide(state.divider + step);
});

// --- zoom ----------------------------------------------------------------------------------------------------------

$("in").onclick = () => zoomBy(1.5);
$("out").onclick = () => zoomBy(1 / 1.5);
$("home").onclick = () => viewer.viewport.goHome();
$("zoom").onchange = () => zoomTo(Number($("zoom").value));

// --- save ----------------------------------------------------------------------------------------------------------

function sizes(from) {
  if (!state.picture) return;
  const { width, height } = state.picture;
  let scale = Number($("scale").value);
  if (from === "width") scale = Number($("width").value) / width;
  if (from === "height") scale = Number($("height").value) / height;
  if (!(scale > 0)) return;
  if (from !== "scale") $("scale").value = Number(scale.toPrecision(5));
  if (from !== "width") $("width").value = Math.max(1, Math.round(width * scale));
  if (from !== "height") $("height").value = Math.max(1, Math.round(height * scale));
}
for (const name of ["scale", "width", "height"]) $(name).oninput = () => sizes(name);

function shownWindow(height, width) {
  const box = viewer.viewport.getBounds(true); // in widths of the picture
  const across = width, down = height * state.picture.width / state.picture.height;
  const clamp = (value, most) => Math.min(Math.max(Math.round(value), 0), most);
  const edges = [
    clamp(box.y * down, height), clamp(box.x * across, width),
    clamp((box.y + box.height) * down, height), clamp((box.x + box.width) * across, width),
  ];
  return edges[0] < edges[2] && edges[1] < edges[3] ? edges.join(",") : null;
}

$("save").onclick = async () => {
  const height = Number($("height").value), width = Number($("width").value);
  if (![height, width].every((side) => Number.isInteger(side) && side > 0)) {
    say("width and height are whole numbers of at least 1", true);
    return;
  }
  const window = $("part").value === "view" ? shownWindow(height, width) : "";
  if (window === null) { say("nothing of the picture shows", true); return; }
  const stop = new AbortController();
  $("progress").removeAttribute("value");
  $("progress").hidden = $("cancel").hidden = false;
  state.isSaving = true; // one at a time, whatever is shown meanwhile
  tellControls();
  $("cancel").onclick = () => stop.abort();
  try {
    const values = { size: `${height}x${width}`, window, format: $("format").value, model: modelOf(state.picture) };
    say("drawing …");
    const path = `pictures/${state.picture.id}/renderings?${query(values)}`;
    const { job, file } = await (await ask(path, { method: "POST", signal: stop.signal })).json();
    const drop = () => fetch(`jobs/${job}`, { method: "DELETE", keepalive: true }).catch(() => null);
    addEventListener("pagehide", drop);
    stop.signal.addEventListener("abort", drop);
    try { await drawn(job, stop.signal); } finally { removeEventListener("pagehide", drop); }
    stop.signal.removeEventListener("abort", drop);
    // The browser fetches the file itself, straight to the disk: no page holds gigabytes.
    Object.assign(document.createElement("a"), { href: `jobs/${job}/file`, download: file }).click();
    say(`saved ${file}`);
  } catch (error) {
    if (error.name === "AbortError") say("stopped"); else say(error.message, true);
  } finally {
    $("progress").hidden = $("cancel").hidden = true;
    state.isSaving = false;
    tellControls();
  }
};

async function drawn(job, signal) {
  for (let misses = 0; ;) {
    await pause(300);
    signal.throwIfAborted();
    let told;
    try {
      told = await (await ask(`jobs/${job}`, { signal })).json();
      misses = 0;
    } catch (error) {
      if (error.status === 404) throw new Error("the server has this rendering no longer, as when it was started again; save again");
      if (error.name === "AbortError" || error.status || ++misses > 20) throw error;
      continue; // the server may be away for a moment
    }
    if (told.problem) throw new Error(told.problem);
    if (told.is_finished) return;
    $("progress").value = told.done / told.pixels;
  }
}

// --- generate ------------------------------------------------------------------------------------------------------

$("generate").onsubmit = async (event) => {
  event.preventDefault();
  const first = Number($("seed").value);
  const seeds = Array.from({ length: Number($("num").value) }, (_, i) => first + i);
  const mine = begin(() => null);
  const wanted = { seeds, latent_size: $("latent").value.trim(), steps: Number($("steps").value), model: state.model };
  say("sampling …");
  try {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(wanted), signal: upload.signal };
    const pictures = await (await ask("generate", options)).json();
    check(mine);
    $("gallery").replaceChildren(...pictures.map(thumbnail));
    await choosePicture(pictures[0], mine);
  } catch (error) { fail(error, mine); }
};

async function choosePicture(picture, mine = begin()) {
  try {
    arrived(mine);
    await show(picture, mine);
    for (const image of $("gallery").querySelectorAll("img")) image.src = image.dataset.src; // sampled together
  } catch (error) { fail(error, mine); }
}

function thumbnail(picture) {
  const image = Object.assign(new Image(), { alt: picture.name });
  image.dataset.src = `pictures/${picture.id}/tiles/${Math.min(picture.own_level, 8)}/0_0`;
  const button = document.createElement("button");
  button.type = "button";
  button.title = picture.name;
  button.append(image);
  button.onclick = () => choosePicture(picture);
  return button;
}

// --- tabs, theme, start --------------------------------------------------------------------------------------------

function choose(tab) {
  state.tab = tab;
  for (const name of ["enlarge", "generate"]) {
    $(name).hidden = name !== tab;
    $(`tab-${name}`).setAttribute("aria-selected", String(name === tab));
    $(`tab-${name}`).tabIndex = name === tab ? 0 : -1;
  }
  const isGenerating = tab === "generate";
  $("drop").firstElementChild.textContent = isGenerating ? "Generated pictures show here" : "Drop a photograph here";
  $("drop").classList.toggle("opens", !isGenerating);
  tellTasks();
}
for (const name of ["enlarge", "generate"]) $(`tab-${name}`).onclick = () => choose(name);
document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
  if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  choose(state.tab === "enlarge" ? "generate" : "enlarge");
  $(`tab-${state.tab}`).focus();
});

const themes = matchMedia("(prefers-color-scheme: dark)");
function setTheme(theme) { if (theme) document.documentElement.dataset.theme = theme; }
try { setTheme(localStorage.getItem("theme")); } catch { /* no storage */ }
$("theme").onclick = () => {
  const isDark = (document.documentElement.dataset.theme ?? (themes.matches ? "dark" : "light")) === "dark";
  setTheme(isDark ? "light" : "dark");
  try { localStorage.setItem("theme", isDark ? "light" : "dark"); } catch { /* no storage */ }
};

async function start() {
  try {
    await listModels();
    const samples = await (await ask("samples")).json();
    $("sample").append(...samples.map((name) => new Option(name, name)));
    const ident = new URLSearchParams(location.search).get("picture"); // where `model.view` points
    if (!ident) return;
    const picture = await (await ask(`pictures/${ident}`)).json();
    if (state.models.some((one) => one.address === picture.model)) setModel(picture.model);
    const mine = begin();
    try { await given(picture, mine); } catch (error) { fail(error, mine); }
  } catch (error) { say(error.message, true); }
}
choose("enlarge");
start();
