"""The page of `latentzoom serve` in a real browser, where things come fast, slowly, late, or not at all."""

# ruff: noqa: F811

from __future__ import annotations

import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
import skimage.data
from serving_server import Running, running
from tiny_bundle import make_bundle

pytest.importorskip("selenium")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select
from serve_browser import BROWSER, Page, opened, page, served  # noqa: F401

pytestmark = BROWSER
PHOTO = skimage.data.coffee()[60:200, 100:300]
LAYERS = "return latentzoomViewer.world.getItemCount()"


def test_another_viewer_by_the_deep_zoom_descriptor(served: Running, page: Page):
    page.drop(PHOTO)
    ident = page.tiles()[0].partition("/pictures/")[2].partition("/")[0]
    page.driver.execute_script(
        """const element = Object.assign(document.createElement("div"), { style: "width:600px;height:400px" });
        document.body.append(element);
        window.other = OpenSeadragon({ element, tileSources: arguments[0], drawer: "canvas",
          showNavigationControl: false, maxZoomPixelRatio: 1 });
        other.addHandler("open", () => other.viewport.zoomTo(other.viewport.getMaxZoom(), undefined, true));
        window.failed = [];
        const fail = (event) => failed.push(event.message);
        for (const kind of ["open-failed", "tile-load-failed"]) other.addHandler(kind, fail);""",
        f"/pictures/{ident}.dzi",
    )
    page.wait(
        lambda: page.driver.execute_script(
            """const item = other.world.getItemAt(0);
            return item && item.getFullyLoaded() && other.viewport.getZoom(true) > 80"""
        )
    )
    size = "const s = other.world.getItemAt(0).getContentSize(); return [s.x, s.y]"
    assert page.driver.execute_script(size) == [200 * 256, 140 * 256]
    names = "return performance.getEntriesByType('resource').map((e) => e.name).filter((n) => n.includes('_files/'))"
    deepest = [name for name in page.driver.execute_script(names) if f"{ident}_files/16/" in name]
    assert deepest and page.driver.execute_script("return failed") == []


def test_wheel_drag_and_pinch(page: Page):
    page.drop(PHOTO)
    page.settled()
    stage = page.get("stage")
    x, y, width = page.bounds()
    origin = ScrollOrigin.from_element(stage, -300, 0)
    for _ in range(3):
        ActionChains(page.driver).scroll_from_origin(origin, 0, -240).perform()
    page.wait(lambda: page.bounds()[2] < width / 1.8)
    page.settled()
    before = page.bounds()
    ActionChains(page.driver).move_to_element_with_offset(stage, 200, 50).click_and_hold().move_by_offset(
        -120, -40
    ).release().perform()
    page.wait(lambda: page.bounds()[0] > before[0] + 0.01)
    page.settled()
    before = page.bounds()
    box = stage.rect
    middle = box["x"] + box["width"] / 4, box["y"] + box["height"] / 2
    for kind, reach in (("touchStart", 40), *(("touchMove", 40 + 12 * step) for step in range(1, 9)), ("touchEnd", 0)):
        points = [{"x": middle[0] + sign * reach, "y": middle[1], "id": sign + 1} for sign in (-1, 1)] if reach else []
        page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait(lambda: page.bounds()[2] < before[2] / 1.5)


def test_two_drops_quickly_after_each_other(served: Running, page: Page):
    rest = np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), dtype=np.uint8)  # takes long to send and to read
    page.begin_drop(rest, "first.png")
    page.begin_drop(PHOTO, "second.png")
    page.wait(lambda: page.get("said").text.startswith("second.png, "))
    time.sleep(2)
    page.settled()
    assert page.get("said").text == "second.png, 200 × 140"
    page.wait(lambda: page.driver.execute_script(LAYERS) == 2)
    page.set("scale", "1")
    assert page.get("width").get_property("value") == "200"


def test_a_format_that_browsers_do_not_know_and_a_name_with_spaces(page: Page):
    page.drop(PHOTO, name="mein Foto é.tif", form="TIFF")
    page.settled()
    page.set("scale", "1")
    page.get("save").click()
    page.wait(lambda: page.get("said").text == "saved mein Foto é-200x140.png")
    page.wait(lambda: list(page.downloads.glob("mein Foto é-200x140.png")))


def test_a_latent_that_takes_long_shows_its_progress_over_bicubic(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", task="sr")
    with running(tmp_path / "shelf", "starter:faithful", bundle) as served:
        model = served.server.catalogue.get(bundle).model
        run, go = model._run_denoiser, threading.Semaphore(0)

        def stepwise(*inputs):
            go.acquire(timeout=60)
            return run(*inputs)

        page = opened(served.url, tmp_path)
        try:
            page.wait(lambda: len(Select(page.get("model")).options) == 3)
            page.drop(PHOTO[:16, :16])  # one tile of the latent: an evaluation a step
            page.settled()
            page.set("zoom", "30")
            page.settled()
            place = page.bounds()
            model._run_denoiser = stepwise
            Select(page.get("model")).select_by_value(bundle)
            page.wait(lambda: page.get("ready").is_displayed())
            assert page.driver.execute_script(LAYERS) == 2  # what was there stays
            for _ in range(10):
                go.release()
            page.wait(lambda: 0.3 < float(page.get("ready").get_property("value")) < 1)
            page.get("home").click()  # tiles below go on meanwhile
            page.settled()
            page.set("zoom", "30")
            for _ in range(200):
                go.release()
            page.wait(lambda: page.get("said").text.startswith("photo.png, "))
            page.settled()
            assert not page.get("ready").is_displayed() and page.driver.execute_script(LAYERS) == 2
            assert page.bounds()[2] == pytest.approx(place[2], rel=1e-3)
            assert page.errors() == []
        finally:
            page.driver.quit()


def test_a_server_that_ends_while_a_page_is_open(tmp_path):
    with running(tmp_path / "shelf") as served:
        port = urlsplit(served.url).port
        page = opened(served.url, tmp_path)
        try:
            page.wait(lambda: len(Select(page.get("model")).options) == 2)
            page.drop(PHOTO)
            page.settled()
        except BaseException:
            page.driver.quit()
            raise
    try:
        page.set("zoom", "64")
        page.wait(lambda: "does not answer" in page.get("said").text)
        assert "error" in page.get("said").get_attribute("class")
        with running(tmp_path / "shelf", port=port) as served:
            page.wait(lambda: page.get("said").text == "", 90)
            page.settled()
            missing = """const w = latentzoomViewer.world; return w._items.flatMap((i) =>
                i._lastDrawn.map((d) => d.tile).filter((t) => !t.exists || !t.loaded)).length"""
            page.wait(lambda: page.driver.execute_script(missing) == 0)
            ident = page.tiles()[0].partition("/pictures/")[2].partition("/")[0]
            assert any("/tiles/14/" in address and f"/{ident}/" in address for address in page.tiles())
            served.server.shelf.remove(ident)  # as when it expires
            served.server.scenes.forget(ident)
            page.set("zoom", "5")
            page.get("viewer").find_element(By.CSS_SELECTOR, ".openseadragon-canvas").send_keys("+")
            page.set("zoom", "120")
            page.wait(lambda: "it expired, was removed" in page.get("said").text)
    finally:
        page.driver.quit()


def test_the_picture_has_a_name_and_a_role_for_screen_readers(page: Page):
    node = page.driver.execute_script("return latentzoomViewer.canvas.getAttribute('role')")
    assert node == "application"
    page.driver.execute_cdp_cmd("Accessibility.enable", {})
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = {node["name"]["value"] for node in tree if node.get("name") and not node.get("ignored")}
    assert any(name.startswith("The picture. Drag to move") for name in named)
