// The page of `latentzoom serve`. Two layers in one OpenSeadragon viewer: what stands left of the divider below, ours
// above, cut off at the divider. Tiles are asked for as one zooms; see orchestration/serve/app.py for the interface.

const $ = (id) => document.getElementById(id);
const state = { picture: null, model: "", below: null, ours: null, preview: null, divider: 0.5, saving: null, tab: "enlarge" };

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
  tileRetryMax: 5,
  tileRetryDelay: 800,
  subPixelRoundingForTransparency: OpenSeadragon.SUBPIXEL_ROUNDING_OCCURRENCES.ALWAYS,
});
window.latentzoomViewer = viewer; // for those who script the page

// --- small things --------------------------------------------------------------------------------------------------

function say(text, isError = false) {
  $("said").textContent = text;
  $("said").classList.toggle("error", isError);
}

async function ask(path, options = {}) {
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  let told = `${answer.status} ${answer.statusText}`;
  try {
    const body = await answer.json();
    told = body.error ?? body.detail?.map?.((one) => one.msg).join("; ") ?? told;
  } catch { /* no JSON */ }
  throw new Error(told);
}

const query = (values) => new URLSearchParams(Object.entries(values).filter(([, value]) => value !== "")).toString();

function tilesOf(picture, look) {
  return {
    width: picture.full_width,
    height: picture.full_height,
    tileSize: picture.tile_size,
    minLevel: 0,
    maxLevel: picture.top_level,
    getTileUrl: (level, x, y) =>
      `pictures/${picture.id}/tiles/${level}/${x}_${y}?${query({ look, model: picture.is_generated ? "" : state.model })}`,
  };
}

function add(tileSource, options = {}) {
  return new Promise((resolve, reject) =>
    viewer.addTiledImage({ tileSource, ...options, success: (e) => resolve(e.item), error: (e) => reject(new Error(e.message)) }));
}

// --- what is shown -------------------------------------------------------------------------------------------------

async function show(picture, keepsPlace = false) {
  const bounds = keepsPlace && state.picture ? viewer.viewport.getBounds() : null;
  state.picture = picture;
  const before = [state.below, state.ours, state.preview];
  state.below = picture.is_generated ? null : await add(tilesOf(picture, $("beside").value));
  state.ours = await add(tilesOf(picture, "ours"));
  state.preview = null;
  for (const old of before) if (old) viewer.world.removeItem(old);
  $("drop").hidden = true;
  $("divider").hidden = picture.is_generated;
  $("save").disabled = false;
  if (bounds) viewer.viewport.fitBounds(bounds, true);
  else viewer.viewport.goHome(true);
  sizes("scale");
  place();
  say(`${picture.name}, ${picture.width} × ${picture.height}`);
}

function place() {
  // The divider's place on the screen, as a cut through the upper layer.
  $("divider").style.left = `${100 * state.divider}%`;
  $("divider").setAttribute("aria-valuenow", Math.round(100 * state.divider));
  if (!state.ours) return;
  if (!state.below) { state.ours.setClip(null); return; }
  const x = state.divider * $("stage").clientWidth;
  const point = state.ours.viewerElementToImageCoordinates(new OpenSeadragon.Point(x, 0));
  const { full_width: width, full_height: height } = state.picture;
  const left = Math.min(Math.max(point.x, 0), width);
  state.ours.setClip(new OpenSeadragon.Rect(left, 0, Math.max(width - left, 0.001), height));
}

function currentZoom() {
  // Screen pixels for each pixel of the picture.
  const full = state.ours.viewportToImageZoom(viewer.viewport.getZoom(true));
  return full * state.picture.full_width / state.picture.width;
}

function zoomTo(zoom) {
  if (!state.ours || !(zoom > 0)) return;
  const full = zoom * state.picture.width / state.picture.full_width;
  viewer.viewport.zoomTo(state.ours.imageToViewportZoom(full));
}

viewer.addHandler("update-viewport", place);
viewer.addHandler("resize", () => setTimeout(place));
viewer.addHandler("animation", () => {
  if (state.ours && document.activeElement !== $("zoom")) $("zoom").value = Number(currentZoom().toPrecision(3));
});
viewer.addHandler("canvas-key", (event) => {
  const { key } = event.originalEvent; // the sign, wherever a keyboard has it
  const factor = { "+": 1.5, "-": 1 / 1.5 }[key];
  if (factor) viewer.viewport.zoomBy(factor);
  if (factor || "rRfFjJkK".includes(key)) event.preventDefaultAction = true; // no turning and no mirroring
});
viewer.addHandler("tile-load-failed", (event) => { if (event.tiledImage === state.ours) say("a tile could not be drawn; moving the picture tries again", true); });

// --- pictures in ---------------------------------------------------------------------------------------------------

async function open(file) {
  say(`opening ${file.name} …`);
  const url = URL.createObjectURL(file);
  try {
    try { // at once, as the browser shows it
      const preview = await add({ type: "image", url, buildPyramid: false });
      for (const old of [state.below, state.ours, state.preview]) if (old) viewer.world.removeItem(old);
      [state.below, state.ours, state.preview] = [null, null, preview];
      $("drop").hidden = true;
      viewer.viewport.goHome(true);
    } catch { /* a format that the browser does not know: the server's tiles show it */ }
    const values = { name: file.name, model: state.model, shrink: $("shrink").value };
    const answer = await ask(`pictures?${query(values)}`, { method: "POST", body: file });
    await given(await answer.json());
  } catch (error) {
    say(error.message, true);
  } finally {
    URL.revokeObjectURL(url);
  }
}

async function given(picture) {
  const original = $("beside").querySelector("[value=original]");
  original.disabled = picture.shrink === 1;
  if (original.disabled) $("beside").value = "bicubic";
  nameLeft();
  await show(picture);
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
$("sample").onchange = async () => {
  const name = $("sample").value;
  $("sample").value = "";
  if (!name) return;
  say(`opening ${name} …`);
  try {
    const answer = await ask(`samples/${name}?${query({ model: state.model, shrink: $("shrink").value })}`, { method: "POST" });
    await given(await answer.json());
  } catch (error) { say(error.message, true); }
};
$("beside").onchange = () => { nameLeft(); if (state.picture) show(state.picture, true); };

// --- models --------------------------------------------------------------------------------------------------------

async function listModels() {
  const { default: first, models } = await (await ask("models")).json();
  state.models = models;
  state.model = models.some((one) => one.address === state.model) ? state.model : first;
  $("model").replaceChildren(...models.map((one) => new Option(one.title, one.address, false, one.address === state.model)));
  tellFigures();
}

function tellFigures() {
  const figures = Object.entries(state.models.find((one) => one.address === state.model)?.figures ?? {});
  $("figures").textContent = figures.slice(0, 4).map(([name, value]) => `${name} ${Number(value.toPrecision(4))}`).join(" · ");
}

$("model").onchange = async () => {
  state.model = $("model").value;
  tellFigures();
  if (!state.picture || state.picture.is_generated) return;
  try { await show(state.picture, true); } catch (error) { say(error.message, true); }
};

// --- divider -------------------------------------------------------------------------------------------------------

function divide(value) { state.divider = Math.min(Math.max(value, 0), 1); place(); viewer.forceRedraw(); }

$("divider").addEventListener("pointerdown", (event) => {
  $("divider").setPointerCapture(event.pointerId);
  $("divider").onpointermove = (move) => {
    const box = $("stage").getBoundingClientRect();
    divide((move.clientX - box.left) / box.width);
  };
});
$("divider").addEventListener("pointerup", () => { $("divider").onpointermove = null; });
$("divider").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -0.02, ArrowDown: -0.02, ArrowRight: 0.02, ArrowUp: 0.02, PageDown: -0.1, PageUp: 0.1, Home: -1, End: 1 }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  divide(state.divider + step);
});

// --- zoom ----------------------------------------------------------------------------------------------------------

$("in").onclick = () => viewer.viewport.zoomBy(1.5);
$("out").onclick = () => viewer.viewport.zoomBy(1 / 1.5);
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
  const box = state.ours.viewportToImageRectangle(viewer.viewport.getBounds(true));
  const { full_width, full_height } = state.picture;
  const clamp = (value, most) => Math.min(Math.max(Math.round(value), 0), most);
  const edges = [
    clamp(box.y / full_height * height, height), clamp(box.x / full_width * width, width),
    clamp((box.y + box.height) / full_height * height, height), clamp((box.x + box.width) / full_width * width, width),
  ];
  return edges[0] < edges[2] && edges[1] < edges[3] ? edges.join(",") : null;
}

$("save").onclick = async () => {
  const height = Number($("height").value), width = Number($("width").value);
  const window = $("part").value === "view" ? shownWindow(height, width) : "";
  if (window === null) { say("nothing of the picture shows", true); return; }
  const job = crypto.randomUUID?.() ?? String(Math.random()).slice(2);
  const stop = new AbortController();
  $("progress").removeAttribute("value");
  $("progress").hidden = $("cancel").hidden = false;
  $("save").disabled = true;
  $("cancel").onclick = () => { fetch(`jobs/${job}`, { method: "DELETE" }); stop.abort(); };
  const poll = setInterval(async () => {
    const answer = await fetch(`jobs/${job}`).catch(() => null);
    if (!answer?.ok) return;
    const { done, pixels } = await answer.json();
    $("progress").value = done / pixels;
  }, 500);
  try {
    const values = { size: `${height}x${width}`, window, format: $("format").value, model: state.picture.is_generated ? "" : state.model, job };
    say("drawing …");
    const answer = await ask(`pictures/${state.picture.id}/render?${query(values)}`, { signal: stop.signal });
    const blob = await answer.blob();
    const name = /filename="?([^";]+)/.exec(answer.headers.get("content-disposition") ?? "")?.[1] ?? `picture.${$("format").value}`;
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: decodeURIComponent(name) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    say(`saved ${link.download}`);
  } catch (error) {
    if (error.name === "AbortError") say("stopped"); else say(error.message, true);
  } finally {
    clearInterval(poll);
    $("progress").hidden = $("cancel").hidden = true;
    $("save").disabled = false;
  }
};

// --- generate ------------------------------------------------------------------------------------------------------

$("generate").onsubmit = async (event) => {
  event.preventDefault();
  const first = Number($("seed").value);
  const seeds = Array.from({ length: Number($("num").value) }, (_, i) => first + i);
  const wanted = { seeds, latent_size: $("latent").value.trim(), steps: Number($("steps").value), model: state.model };
  say("sampling …");
  try {
    const answer = await ask("generate", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(wanted) });
    const pictures = await answer.json();
    $("gallery").replaceChildren(...pictures.map(thumbnail));
    await show(pictures[0]);
  } catch (error) { say(error.message, true); }
};

function thumbnail(picture) {
  const image = Object.assign(new Image(), { alt: picture.name, src: `pictures/${picture.id}/tiles/${Math.min(picture.own_level, 8)}/0_0` });
  const button = document.createElement("button");
  button.type = "button";
  button.title = picture.name;
  button.append(image);
  button.onclick = () => show(picture).catch((error) => say(error.message, true));
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
    if (ident) await given(await (await ask(`pictures/${ident}`)).json());
  } catch (error) { say(error.message, true); }
}
choose("enlarge");
start();
