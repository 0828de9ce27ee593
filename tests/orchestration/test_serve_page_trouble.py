"""The page of `latentzoom serve` in a real browser, where things come fast, slowly, late, or not at all."""

# ruff: noqa: F811

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from urllib.parse import parse_qs, urlsplit

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
from serve_browser import BROWSER, DROP, Page, opened, page, served  # noqa: F401

from orchestration.serve.scenes import Scene
from pipeline.errors import UserError

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
    page.spread(1 / 4, 40)
    page.wait(lambda: page.bounds()[2] < before[2] / 1.5)


def test_wheel_pinch_and_drag_at_the_divider(page: Page):
    page.drop(PHOTO)
    page.settled()
    stage = page.get("stage")
    before = page.bounds()
    origin = ScrollOrigin.from_element(stage)
    for _ in range(3):
        ActionChains(page.driver).scroll_from_origin(origin, 0, -240).perform()
    page.wait(lambda: page.bounds()[2] < before[2] / 1.8)
    page.settled()
    before = page.bounds()
    page.spread(1 / 2, 8)
    page.wait(lambda: page.bounds()[2] < before[2] / 1.5)
    page.settled()
    assert page.get("divider").get_attribute("aria-valuenow") == "50"
    before = page.bounds()
    box = stage.rect
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for kind, x in (("touchStart", 0), *(("touchMove", 30 * step) for step in range(1, 6)), ("touchEnd", None)):
        points = [] if x is None else [{"x": middle[0] + x, "y": middle[1]}]
        page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait(lambda: int(page.get("divider").get_attribute("aria-valuenow")) > 55)
    page.settled()
    assert page.bounds() == before


def test_quick_switches_of_the_left_and_of_the_model(served: Running, page: Page, monkeypatch: pytest.MonkeyPatch):
    page.driver.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": True})
    tile = served.server.tile

    async def slow(scene, level, x, y, look, is_wanted):
        if look == "bicubic" or (look == "ours" and "faithful" in scene.loaded.name):
            await asyncio.sleep(3)
        return await tile(scene, level, x, y, look, is_wanted)

    Select(page.get("shrink")).select_by_value("4")
    page.drop(skimage.data.coffee())
    Select(page.get("model")).select_by_value("starter:sharp")
    page.wait(lambda: page.get("said").text == "photo.png, 150 × 100")
    Select(page.get("beside")).select_by_value("original")
    page.wait(lambda: _looks(page) == [["original", ""], ["ours", "sharp"]])
    page.settled()
    monkeypatch.setattr(served.server, "tile", slow)
    for ident, there_and_back in (
        ("beside", ["bicubic", "original"]),
        ("model", ["starter:faithful", "starter:sharp"]),
    ):
        Select(page.get(ident)).select_by_value(there_and_back[0])
        page.wait(lambda: page.driver.execute_script(LAYERS) == 3)
        Select(page.get(ident)).select_by_value(there_and_back[1])
        page.wait(lambda: _looks(page) == [["original", ""], ["ours", "sharp"]])
        # before the layer is even there
        page.driver.execute_script(
            """const list = document.getElementById(arguments[0]);
            for (const value of arguments[1]) { list.value = value; list.onchange(); }""",
            ident,
            there_and_back,
        )
        page.wait(lambda: _looks(page) == [["original", ""], ["ours", "sharp"]])
        page.settled()
    page.driver.execute_script(
        """for (const [ident, value] of [["beside", "bicubic"], ["model", "starter:faithful"]]) {
            const list = document.getElementById(ident); list.value = value; list.onchange(); }"""
    )
    page.wait(lambda: _looks(page) == [["bicubic", ""], ["ours", "faithful"]])


def _looks(page: Page) -> list[list[str]]:
    """Look and model of each layer, from below."""
    script = """return latentzoomViewer.world._items.map((item) => {
        const words = new URL(item.source.getTileUrl(0, 0, 0), location.href).searchParams;
        const look = words.get("look");
        return [look, look === "ours" ? words.get("model").split(":")[1] : ""]; })"""
    return list(page.driver.execute_script(script))


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


def test_a_refused_file_and_a_slow_one_leave_what_shows(served: Running, page: Page, monkeypatch: pytest.MonkeyPatch):
    limits = served.server.limits

    def refuse(name: str) -> None:
        served.server.limits = dataclasses.replace(limits, picture_pixels=100)
        try:
            page.begin_drop(PHOTO[:50], name)
            page.wait(lambda: "error" in page.get("said").get_attribute("class"))
            assert "pixels" in page.get("said").text
        finally:
            served.server.limits = limits

    refuse("refused.png")
    assert page.driver.execute_script(LAYERS) == 0 and page.get("drop").is_displayed()
    add_file, go = served.server.shelf.add_file, threading.Event()

    def slow(*args, **values):
        go.wait(60)
        return add_file(*args, **values)

    monkeypatch.setattr(served.server.shelf, "add_file", slow)
    page.begin_drop(PHOTO, "photo.png")
    page.wait(lambda: page.driver.execute_script(LAYERS) == 1)
    page.settled()
    assert not page.get("zoom").is_enabled()
    whole = page.bounds()
    ActionChains(page.driver).move_to_element_with_offset(page.get("stage"), -100, 20).click_and_hold().move_by_offset(
        60, 0
    ).release().perform()
    page.wait(lambda: page.bounds()[0] != whole[0])
    page.settled()
    before = page.bounds()
    go.set()
    page.wait(lambda: page.get("said").text.startswith("photo.png, "))
    page.settled()
    assert page.bounds() == pytest.approx(before, abs=1e-6)

    page.set("zoom", "9")
    page.settled()
    before, address = page.bounds(), page.driver.current_url
    for name, data in (("note.png", "aGVsbG8="), ("refused.png", "")):
        if data:
            page.driver.execute_script(DROP, name, data)
            page.wait(lambda: "no known image format" in page.get("said").text)
        else:
            refuse(name)
        assert page.driver.execute_script(LAYERS) == 2
        assert page.get("divider").is_displayed() and page.get("save").is_enabled()
        page.settled()
        assert page.bounds() == pytest.approx(before, abs=1e-6)
        assert page.driver.current_url == address
    assert page.driver.execute_script("return latentzoomViewer.world._items.map((i) => i.opacity)") == [1, 1]

    go.clear()  # a wrong file while the picture before it waits for its latent, which it gets all the same
    made = Scene._made
    monkeypatch.setattr(served.server.shelf, "add_file", add_file)
    monkeypatch.setattr(Scene, "_made", lambda scene: go.wait(60) and made(scene))
    page.begin_drop(PHOTO[:, ::-1], "next.png")
    page.wait(lambda: page.driver.current_url != address)
    page.settled()
    refuse("refused.png")
    go.set()
    page.wait(lambda: page.get("divider").is_displayed())
    assert page.driver.execute_script(LAYERS) == 2 and "pixels" in page.get("said").text
    page.driver.get_log("browser")  # the refusals themselves are in the browser's log


def test_shrunk_otherwise_loaded_again_and_at_its_end(served: Running, page: Page):
    page.driver.get(f"{served.url}/?token=secret&other=1")
    page.wait(lambda: len(Select(page.get("model")).options) == 3)
    page.drop(PHOTO)
    first = page.driver.current_url
    Select(page.get("shrink")).select_by_value("4")
    page.wait(lambda: page.get("said").text == "photo.png, 50 × 35")
    second = page.driver.current_url
    assert first != second and all(set(parse_qs(urlsplit(address).query)) == {"picture"} for address in (first, second))
    page.driver.refresh()
    page.wait(lambda: page.get("said").text == "photo.png, 50 × 35")
    assert page.driver.current_url == second and page.get("shrink").get_property("value") == "4"
    Select(page.get("shrink")).select_by_value("2")
    assert "next picture" in page.get("said").text
    Select(page.get("shrink")).select_by_value("1")
    page.drop(np.tile(PHOTO[:32], (1, 25, 1)))
    page.set("zoom", "256")
    page.settled()
    assert page.get("zoom").get_property("value") == "128"
    assert page.get("said").text == "× 128 is the most that can be shown of this picture"
    middle = ScrollOrigin.from_element(page.get("stage"))
    for deeper in (
        page.get("in").click,
        lambda: ActionChains(page.driver).scroll_from_origin(middle, 0, -240).perform(),
    ):
        page.get("out").click()
        page.settled()
        page.driver.execute_script("document.getElementById('said').textContent = ''")
        for _ in range(4):
            deeper()
        page.wait(lambda: page.get("said").text.startswith("× 128 is the most"))
        page.settled()
        assert abs(float(page.get("zoom").get_property("value")) - 128) < 0.5


def test_a_model_that_cannot_be_loaded(served: Running, page: Page, monkeypatch: pytest.MonkeyPatch):
    page.drop(PHOTO)
    get = served.server.catalogue.get

    def refuse(address: str = ""):
        if "sharp" in address:
            raise UserError("its weights are damaged")
        return get(address)

    monkeypatch.setattr(served.server.catalogue, "get", refuse)
    Select(page.get("model")).select_by_value("starter:sharp")
    page.wait(lambda: page.get("said").text == "its weights are damaged")
    assert page.get("model").get_property("value") == "starter:faithful"
    page.get("save").click()
    page.wait(lambda: page.get("said").text.startswith("saved "))
    page.driver.get_log("browser")  # the refusal itself is in the browser's log


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
            page.wait(lambda: page.get("said").text.startswith("making the latent"))
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
            page.get("tab-generate").click()
            assert page.get("said").text.startswith("none of these models can generate; ")
            page.get("tab-enlarge").click()
            assert page.get("said").text == ""
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
