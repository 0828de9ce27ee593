"""Chromium, driven headless, with the page of a running server in it."""

from __future__ import annotations

import base64
import io
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from serving_server import Running, running
from tiny_bundle import make_bundle

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"),
]
DROP = """
const [name, base64] = arguments;
const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], name, { type: "image/png" }));
document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
"""


class Page:
    """The browser, with words for what the tests do."""

    def __init__(self, driver: webdriver.Chrome, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads

    def get(self, ident: str):
        return self.driver.find_element(By.ID, ident)

    def wait(self, until: Callable[[], object], seconds: float = 60) -> object:
        end = time.monotonic() + seconds
        while not (found := until()):
            assert time.monotonic() < end, self.get("said").text
            time.sleep(0.05)
        return found

    def drop(self, array: np.ndarray, name: str = "photo.png", form: str = "PNG") -> None:
        self.begin_drop(array, name, form)
        self.wait(lambda: self.get("said").text.startswith(f"{name}, "))

    def begin_drop(self, array: np.ndarray, name: str, form: str = "PNG") -> None:
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, form)
        self.driver.execute_script(DROP, name, base64.b64encode(stream.getvalue()).decode())

    def set(self, ident: str, value: str) -> None:
        field = self.get(ident)
        field.click()
        field.send_keys(Keys.CONTROL, "a", Keys.NULL, value, Keys.TAB)

    def settled(self) -> None:
        """Nothing moves, and no tile is awaited any more."""
        still = "const v = latentzoomViewer.viewport; return Math.abs(v.getZoom(true) / v.getZoom(false) - 1) < 1e-6"
        self.wait(lambda: self.driver.execute_script(still))
        world = "latentzoomViewer.world"
        loaded = f"return {world}.getItemCount() > 0 && {world}._items.every((item) => item.getFullyLoaded())"
        self.wait(lambda: self.driver.execute_script(loaded))

    def tiles(self) -> list[str]:
        """Addresses of the tiles that were asked for."""
        script = (
            "return performance.getEntriesByType('resource').map((e) => e.name).filter((n) => n.includes('/tiles/'))"
        )
        return list(self.driver.execute_script(script))

    def spread(self, across: float, reach: float) -> None:
        """Two fingers, each `reach` pixels from a point at this part of the stage's width, go apart."""
        box = self.get("stage").rect
        x, y = box["x"] + box["width"] * across, box["y"] + box["height"] / 2
        moves = [("touchMove", reach + 12 * step) for step in range(1, 9)]
        for kind, away in (("touchStart", reach), *moves, ("touchEnd", 0)):
            points = [{"x": x + sign * away, "y": y, "id": sign + 1} for sign in (-1, 1)] if away else []
            self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def clip(self) -> float:
        """Where the upper layer begins, as a part of the picture's width."""
        top = "latentzoomViewer.world.getItemAt(latentzoomViewer.world.getItemCount() - 1)"
        return float(self.driver.execute_script(f"return {top}.getClip().x / {top}.getContentSize().x"))

    def bounds(self) -> list[float]:
        return list(
            self.driver.execute_script(
                "const b = latentzoomViewer.viewport.getBounds(true); return [b.x, b.y, b.width]"
            )
        )

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Running]:
    bundle = make_bundle(tmp_path_factory.mktemp("bundle"))
    with running(tmp_path_factory.mktemp("shelf"), "starter:faithful", "starter:sharp", bundle) as served:
        yield served


@pytest.fixture
def page(served: Running, tmp_path: Path) -> Iterator[Page]:
    page = opened(served.url, tmp_path)
    try:
        page.wait(lambda: len(Select(page.get("model")).options) == 3)
        yield page
        assert page.errors() == []
        hosts = """return performance.getEntriesByType("resource").map((e) => e.name)
            .filter((name) => !name.startsWith(location.origin) && !name.startsWith("blob:"))"""
        assert page.driver.execute_script(hosts) == []
    finally:
        page.driver.quit()


def opened(url: str, downloads: Path) -> Page:
    """The page in a browser of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,800",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    driver.get(url)
    return Page(driver, downloads)
