"""The page with a photograph of twelve megapixels, dropped and pasted, and zoomed into by the wheel to x200: how long
each takes in a real browser, and screenshots to look at.

    python tests/orchestration/serve_look.py FOLDER

The server runs in this process, with two threads. Times are from the drop, in milliseconds: *below* is what lies under
the divider (the photograph, at once as the browser shows it, then the server's tiles), *ours* what lies right of it.
After a zoom: when the first of the tiles that it ends with was there, since its level was first asked for.
"""

from __future__ import annotations

import base64
import io
import sys
import time
from pathlib import Path

import skimage.data
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from serve_browser import Page, opened
from serving_server import running

WATCH = """
window.began = 0;
window.first = {};
for (const kind of ["tile-loaded", "tile-drawn"]) latentzoomViewer.addHandler(kind, (event) => {
  const name = `${event.tiledImage.isOurs ? "ours" : "below"} ${kind.slice(5)}`;
  first[name] ??= Math.round(performance.now() - began);
});
"""
LEVELS = """
const seen = {};
for (const entry of performance.getEntriesByType("resource")) {
  const level = entry.name.match(/tiles\\/(\\d+)\\/.*look=ours/)?.[1];
  if (!level || entry.startTime < began) continue;
  seen[level] ??= { asked: entry.startTime, there: entry.responseEnd };
  seen[level].there = Math.min(seen[level].there, entry.responseEnd);
}
const deepest = seen[Math.max(...Object.keys(seen))];
return deepest ? Math.round(deepest.there - deepest.asked) : -1;
"""
GIVE = """
const [name, base64, kind] = arguments;
const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], name, { type: "image/jpeg" }));
window.began = performance.now();
document.dispatchEvent(kind === "drop"
  ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
  : new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
"""


def twelve_megapixels() -> bytes:
    stream = io.BytesIO()
    photo = Image.fromarray(skimage.data.retina()).resize((4000, 3000), Image.Resampling.BICUBIC)
    photo.save(stream, "JPEG", quality=92)
    return stream.getvalue()


def give(page: Page, data: bytes, kind: str) -> None:
    page.wait(lambda: page.get("model").text)
    page.driver.execute_script(WATCH)
    page.driver.execute_script(GIVE, "photo.jpg", base64.b64encode(data).decode(), kind)
    page.wait(lambda: page.get("said").text.startswith("photo.jpg, "), 300)
    page.settled()
    print(kind, page.driver.execute_script("return first"), flush=True)


def look(page: Page, folder: Path) -> None:
    page.driver.save_screenshot(str(folder / "whole.png"))
    page.driver.execute_script("performance.setResourceTimingBufferSize(10000)")
    origin = ScrollOrigin.from_element(page.get("stage"), 180, 60)
    turns = 0
    while float(page.get("zoom").get_property("value")) < 200 and turns < 80:
        ActionChains(page.driver).scroll_from_origin(origin, 0, -120).perform()
        turns += 1
    _settle(page, f"the wheel, {turns} turns", folder / "wheel.png")
    for zoom in ("1", "4", "16", "200"):
        page.driver.execute_script("window.began = performance.now()")
        page.set("zoom", zoom)
        _settle(page, f"zoom x{zoom}", folder / f"zoom-{zoom}.png")


def _settle(page: Page, what: str, file: Path) -> None:
    started = time.perf_counter()
    page.settled()
    print(
        f"{what}: at x{page.get('zoom').get_property('value')}, all sharp {time.perf_counter() - started:.2f} s later, "
        f"the first {page.driver.execute_script(LEVELS)} ms after it was asked for"
    )
    page.driver.save_screenshot(str(file))


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    data = twelve_megapixels()
    with running(folder / "shelf") as served:
        for kind in ("drop", "drop", "paste"):
            page = opened(served.url, folder)
            try:
                give(page, data, kind)
                if kind == "paste":
                    look(page, folder)
                print("errors in the console:", page.errors())
            finally:
                page.driver.quit()


if __name__ == "__main__":
    main()
