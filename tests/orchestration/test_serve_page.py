"""The page of `latentzoom serve` in a real browser: dropped, zoomed, divided, saved, generated, on any screen."""

# ruff: noqa: F811

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import requests
import skimage.data
from PIL import Image
from serving_server import Running

pytest.importorskip("selenium")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from serve_browser import BROWSER, DROP, Page, page, served  # noqa: F401

pytestmark = BROWSER
PHOTO = skimage.data.coffee()[60:300, 100:460]


def test_a_dropped_picture_is_zoomed_into_without_seams(served: Running, page: Page):
    page.drop(PHOTO)
    page.settled()
    page.set("zoom", "64")
    page.settled()
    assert abs(float(page.get("zoom").get_property("value")) - 64) < 0.5
    deepest = [address for address in page.tiles() if "/tiles/15/" in address and "look=ours" in address]
    assert 4 <= len(deepest) < 40  # what shows, never the whole: that has 90 * 60 tiles at this level
    for address in deepest[:4]:
        x, y = (int(part) for part in address.partition("/tiles/15/")[2].partition("?")[0].split("_"))
        ident = address.partition("/pictures/")[2].partition("/")[0]
        tile = _pixels(served, f"/pictures/{ident}/tiles/15/{x}_{y}")
        window = f"{y * 256 - 100},{x * 256 - 100},{y * 256 + 300},{x * 256 + 300}"
        part = _pixels(served, f"/pictures/{ident}/render?scale=64&window={window}")
        assert np.array_equal(part[100:356, 100:356], tile)


def test_the_divider_by_mouse_and_by_keys(page: Page):
    page.drop(PHOTO)
    assert abs(page.clip() - 0.5) < 0.01
    ActionChains(page.driver).drag_and_drop_by_offset(page.get("divider"), 100, 0).perform()
    moved = page.clip()
    assert moved > 0.55 and int(page.get("divider").get_attribute("aria-valuenow")) > 55
    page.get("divider").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert page.clip() < moved
    assert "bicubic on its left" in page.get("divider").get_attribute("aria-label")


def test_against_the_original_of_a_shrunk_picture(page: Page):
    Select(page.get("shrink")).select_by_value("4")
    page.drop(skimage.data.coffee())
    assert page.get("said").text == "photo.png, 150 × 100"
    Select(page.get("beside")).select_by_value("original")
    page.wait(lambda: any("look=original" in address for address in page.tiles()))
    page.settled()


def test_saving_the_whole_and_what_shows(served: Running, page: Page):
    page.drop(PHOTO[:100, :120])
    page.set("width", "301")
    assert page.get("height").get_property("value") == "251"
    page.get("save").click()
    page.wait(lambda: list(page.downloads.glob("photo-301x251.png")))
    page.wait(lambda: page.get("said").text == "saved photo-301x251.png")
    ident = page.tiles()[0].partition("/pictures/")[2].partition("/")[0]
    saved = np.asarray(Image.open(page.downloads / "photo-301x251.png"))
    assert np.array_equal(saved, _pixels(served, f"/pictures/{ident}/render?size=251x301"))
    page.set("zoom", "32")
    page.settled()
    Select(page.get("part")).select_by_value("view")
    Select(page.get("format")).select_by_visible_text("tif")
    page.set("scale", "8")
    page.get("save").click()
    page.wait(lambda: list(page.downloads.glob("*.tif")))
    with Image.open(next(page.downloads.glob("*.tif"))) as image:
        assert abs(image.width - 1200 / 32 * 8) < 12


def test_a_long_save_can_be_stopped(served: Running, page: Page):
    page.drop(PHOTO)
    page.set("scale", "50")
    page.get("save").click()
    page.wait(lambda: served.server.jobs)
    page.wait(lambda: page.get("cancel").is_displayed())
    Select(page.get("model")).select_by_value("starter:sharp")
    page.wait(lambda: page.get("said").text.startswith("photo.png, "))
    assert not page.get("save").is_enabled() and len(served.server.jobs) == 1  # one at a time
    page.get("cancel").click()
    page.wait(lambda: page.get("said").text == "stopped")
    page.wait(lambda: not served.server.jobs and not served.server.desk.busy)
    assert not list(page.downloads.iterdir())
    page.get("save").click()
    page.wait(lambda: served.server.jobs)
    requests.delete(f"{served.url}/jobs/{next(iter(served.server.jobs))}", timeout=60)  # as when it is gone
    page.wait(lambda: page.get("said").text.endswith("save again"))
    page.driver.get_log("browser")  # that it is gone is in the browser's log


def test_an_exact_size_stays_and_a_wrong_one_is_said(page: Page):
    page.drop(PHOTO)
    page.set("width", "40001")
    Select(page.get("model")).select_by_value("starter:sharp")
    page.settled()
    page.wait(lambda: any("sharp" in address for address in page.tiles()))
    assert page.get("width").get_property("value") == "40001"
    for part in ("view", "whole"):
        Select(page.get("part")).select_by_value(part)
        page.set("width", "0")
        page.get("save").click()
        assert page.get("said").text == "width and height are whole numbers of at least 1"


def test_switching_the_model_keeps_the_place(page: Page):
    page.drop(PHOTO)
    page.set("zoom", "16")
    page.settled()
    before = page.bounds()
    Select(page.get("model")).select_by_value("starter:sharp")
    page.wait(lambda: any("sharp" in address for address in page.tiles()))
    page.settled()
    assert page.bounds() == pytest.approx(before, abs=1e-6)


def test_a_gallery_of_generated_pictures(page: Page):
    assert page.get("drop").text == "Drop a photograph here"
    page.get("tab-generate").click()
    assert page.get("drop").text == "Generated pictures show here"
    assert page.get("said").text == "this model only enlarges; choose one that generates"
    assert [option.is_enabled() for option in Select(page.get("model")).options] == [False, False, True]
    Select(page.get("model")).select_by_index(2)
    assert page.get("said").text == ""
    page.set("num", "3")
    page.set("steps", "2")
    page.get("generate").find_element(By.XPATH, ".//button[text()='Generate']").click()
    page.wait(lambda: len(page.get("gallery").find_elements(By.TAG_NAME, "img")) == 3)
    page.settled()
    page.get("gallery").find_elements(By.TAG_NAME, "button")[2].click()
    page.wait(lambda: page.get("said").text.startswith("seed 2, "))
    assert not page.get("divider").is_displayed()
    page.set("latent", "8x16")
    page.get("generate").find_element(By.XPATH, ".//button[text()='Generate']").click()
    page.wait(lambda: page.get("said").text.startswith("seed 0, "))
    width, height = page.get("said").text.removeprefix("seed 0, ").split(" × ")
    assert int(width) == 2 * int(height)
    page.driver.execute_cdp_cmd(  # a phone held sideways
        "Emulation.setDeviceMetricsOverride", {"width": 844, "height": 390, "deviceScaleFactor": 2, "mobile": True}
    )
    assert page.get("stage").size["height"] >= 90
    lowest = "return document.getElementById('save').getBoundingClientRect().bottom"
    assert page.driver.execute_script(lowest) <= 390


def test_mistakes_are_said(page: Page):
    page.driver.execute_script(DROP, "note.png", "aGVsbG8=")
    page.wait(lambda: "no known image format" in page.get("said").text)
    assert "error" in page.get("said").get_attribute("class")
    page.driver.get_log("browser")  # the refusal itself is in the browser's log


def test_keys_dark_and_a_phone(page: Page):
    page.drop(PHOTO)
    page.get("viewer").find_element(By.CSS_SELECTOR, ".openseadragon-canvas").send_keys("+", "+")
    page.wait(lambda: page.bounds()[2] < 1)
    light = page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    dark = page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (light, dark) == ("rgb(250, 250, 250)", "rgb(22, 24, 28)")
    _check_contrasts(page)
    page.get("theme").click()
    _check_contrasts(page)
    assert page.driver.execute_script("return getComputedStyle(document.body).backgroundColor") == light
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    assert page.driver.execute_script("return document.scrollingElement.scrollWidth") <= 390
    assert page.get("stage").size["height"] > 300 and page.get("save").is_displayed()
    unnamed = """return [...document.querySelectorAll("button, input:not([hidden]), select, [role=slider]")]
        .filter((e) => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim() || e.title))
        .map((e) => e.id)"""
    assert page.driver.execute_script(unnamed) == []


def _check_contrasts(page: Page) -> None:
    colours = page.driver.execute_script(
        """const of = (element, name) => getComputedStyle(element)[name];
        const said = document.getElementById("said"), before = said.className;
        said.className = "error";
        const colours = [of(document.body, "backgroundColor"), of(said, "color"),
          ...[...document.querySelectorAll("input:not([hidden]), select, button")]
            .filter((control) => of(control, "borderTopStyle") === "solid").map((c) => of(c, "borderTopColor"))];
        said.className = before;
        return colours"""
    )
    paper, error, *borders = ([int(value) for value in re.findall(r"\d+", colour)[:3]] for colour in colours)
    assert _contrast(paper, error) >= 4.5
    assert len(borders) > 10 and all(_contrast(paper, border) >= 3 for border in borders)


def _contrast(one: list[int], other: list[int]) -> float:
    """Of two sRGB colours (WCAG 2.2)."""
    linear = (np.array([one, other]) / 255 + 0.055) / 1.055
    light = np.where(np.array([one, other]) <= 10, np.array([one, other]) / 255 / 12.92, linear**2.4)
    low, high = sorted(light @ [0.2126, 0.7152, 0.0722] + 0.05)
    return float(high / low)


def _pixels(served: Running, path: str) -> np.ndarray:
    answer = served.get(path)
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content)))
