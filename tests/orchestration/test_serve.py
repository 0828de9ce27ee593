"""`latentzoom serve` over HTTP: tiles are crops of one whole rendering, limits hold, nothing is lost."""

from __future__ import annotations

import gc
import io
import json
import threading
import time
import weakref
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
import skimage.data
import torch
from PIL import Image
from serving_server import Running, png, running
from tiny_bundle import make_bundle

from orchestration.serve.app import Limits
from orchestration.serve.batching import StepBatches
from orchestration.serve.deep_zoom import Pyramid
from orchestration.serve.scenes import Scene
from orchestration.serve.shelf import Shelf
from pipeline import LatentZoom
from pipeline.errors import UserError


def pixels(answer: requests.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content)))


PHOTO = skimage.data.coffee()[100:220, 200:390]
"""120 x 190 pixels: several tiles of features for the starter."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with running(tmp_path_factory.mktemp("shelf")) as served:
        yield served


def test_the_pyramid_is_deep_zooms():
    pyramid = Pyramid((120, 190))
    assert (pyramid.own, pyramid.top, pyramid.full) == (8, 16, (120 * 256, 190 * 256))
    for level in range(pyramid.top + 1):  # as the convention defines it, from the largest level downwards
        factor = 2 ** (pyramid.top - level)
        assert pyramid.level_size(level) == (-(-120 * 256 // factor), -(-190 * 256 // factor))
    assert pyramid.window(9, 1, 0) == (0, 256, 240, 380)
    for level, x, y in ((17, 0, 0), (-1, 0, 0), (9, 2, 0), (9, -1, 0)):
        with pytest.raises(UserError, match="^there is no "):
            pyramid.window(level, x, y)
    assert Pyramid((3000, 1 << 20)).top == 20  # no larger than an output may be


def test_tiles_are_crops_of_one_whole_rendering(served: Running):
    ident = served.give(png(PHOTO), name="coffee.png")["id"]
    level, size = 10, (480, 760)
    whole = pixels(served.get(f"/pictures/{ident}/render", scale=4))
    assert whole.shape == (*size, 3)
    made = np.zeros_like(whole)
    for y in range(2):
        for x in range(3):
            tile = pixels(served.get(f"/pictures/{ident}/tiles/{level}/{x}_{y}"))
            made[y * 256 : y * 256 + tile.shape[0], x * 256 : x * 256 + tile.shape[1]] = tile
    assert np.array_equal(made, whole)
    ours = np.asarray(LatentZoom.starter().upscale(Image.fromarray(PHOTO), 4))
    assert np.abs(whole.astype(int) - ours).max() <= 1


def test_bicubic_and_original_stand_beside(served: Running):
    large = skimage.data.coffee()[:240, :400]
    told = served.give(png(large), name="x.png", shrink=2)
    assert (told["height"], told["width"], told["shrink"]) == (120, 200, 2)
    own, ident = told["own_level"], told["id"]
    small = Image.fromarray(large).resize((200, 120), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels(served.get(f"/pictures/{ident}/tiles/{own}/0_0", look="bicubic")), np.asarray(small))
    original = pixels(served.get(f"/pictures/{ident}/tiles/{own + 1}/1_0", look="original"))
    assert np.array_equal(original, large[:, 256:])
    bicubic = pixels(served.get(f"/pictures/{ident}/tiles/{own + 1}/0_0", look="bicubic"))
    theirs = np.asarray(small.resize((400, 240), Image.Resampling.BICUBIC))[:, :256]
    assert np.abs(bicubic.astype(int) - theirs).max() <= 2  # Pillow rounds between its two passes


def test_where_other_viewers_look(served: Running):
    ident = served.give(png(PHOTO))["id"]
    image = ElementTree.fromstring(served.get(f"/pictures/{ident}.dzi").text)
    size = image[0].attrib
    assert (image.attrib["TileSize"], image.attrib["Overlap"], image.attrib["Format"]) == ("256", "0", "png")
    assert (int(size["Height"]), int(size["Width"])) == (120 * 256, 190 * 256)
    answer = served.get(f"/pictures/{ident}_files/9/1_0.png")
    assert np.array_equal(pixels(answer), pixels(served.get(f"/pictures/{ident}/tiles/9/1_0")))
    again = requests.get(answer.url, headers={"If-None-Match": answer.headers["ETag"]}, timeout=60)
    assert again.status_code == 304 and not again.content
    assert (
        served.get(f"/pictures/{ident}_files/9/1_0.png", model="starter:sharp").headers["ETag"]
        != answer.headers["ETag"]
    )


def test_mistakes_get_one_sentence(served: Running):
    ident = served.give(png(PHOTO))["id"]
    for path, status, said in (
        ("/pictures/nobody", 404, "is no picture's id"),
        (f"/pictures/{'A' * 22}", 404, "expired, was removed, or was never here"),
        (f"/pictures/{ident}/tiles/99/0_0", 422, "there is no level 99"),
        (f"/pictures/{ident}/tiles/9/7_0", 422, "there is no tile 7_0 in level 9"),
        (
            f"/pictures/{ident}/tiles/9/0_0?model=s3://others/model",
            422,
            "this server offers no model 's3://others/model'",
        ),
        (f"/pictures/{ident}/render?size=90000x90000", 422, "is too large here"),
        (f"/pictures/{ident}/render?size=0x5", 422, "is not allowed"),
        (f"/pictures/{ident}/render?window=1,2", 422, "is not inside the output"),
        (f"/pictures/{ident}/tiles/9/0_0?look=original", 200, ""),  # of a picture that was not shrunk: itself
    ):
        answer = served.get(path)
        assert answer.status_code == status, (path, answer.text)
        assert not said or said in answer.json()["error"], answer.text
    for body, said in (
        (b"hello", "no known image format"),
        (b"", "has no body"),
        (png(PHOTO)[:3000], "cannot be read"),
    ):
        answer = requests.post(f"{served.url}/pictures", data=body, timeout=60)
        assert answer.status_code == 422 and said in answer.json()["error"]
    answer = requests.post(f"{served.url}/generate", json={"seeds": [1]}, timeout=60)
    assert answer.status_code == 422 and "is for super-resolution and draws nothing" in answer.json()["error"]


def test_renderings_in_every_format(served: Running):
    ident = served.give(png(PHOTO), name="my coffee.png")["id"]
    for form in ("png", "tif", "jpg", "webp", "avif"):
        answer = served.get(f"/pictures/{ident}/render", size="181x287", window="10,20,150,250", format=form)
        assert pixels(answer).shape == (140, 230, 3)
        assert "my%20coffee-230x140" in answer.headers["content-disposition"]


def test_other_names_do_not_reach_a_server_without_a_token(served: Running):
    answer = requests.get(f"{served.url}/models", headers={"Host": "evil.example"}, timeout=60)
    assert answer.status_code == 403 and "for its own machine" in answer.json()["error"]


def test_a_token_opens(tmp_path):
    with running(tmp_path, token="right") as served:
        assert served.get("/models").status_code == 401 and served.get("/health").status_code == 200
        assert served.get("/", token="wrong").status_code == 401
        bearer = requests.get(f"{served.url}/models", headers={"Authorization": "Bearer right"}, timeout=60)
        assert bearer.status_code == 200
        with requests.Session() as browser:
            page = browser.get(f"{served.url}/?token=right", timeout=60)
            assert page.status_code == 200 and "token" not in page.url  # it stays in no history
            assert browser.get(f"{served.url}/models", timeout=60).status_code == 200


def test_pictures_outlive_the_server_and_expire(tmp_path):
    with running(tmp_path) as served:
        ident = served.give(png(PHOTO))["id"]
        before = pixels(served.get(f"/pictures/{ident}/tiles/9/0_0"))
    with running(tmp_path) as served:
        assert np.array_equal(pixels(served.get(f"/pictures/{ident}/tiles/9/0_0")), before)
        assert requests.delete(f"{served.url}/pictures/{ident}", timeout=60).status_code == 204
        assert served.get(f"/pictures/{ident}").status_code == 404
        served.give(png(PHOTO))
    (tmp_path / ".part-half").mkdir()
    assert len(Shelf(tmp_path, max_bytes=1 << 30, seconds=-1.0).sweep()) == 0 and list(tmp_path.iterdir()) == []


def test_limits(tmp_path):
    limits = Limits(upload_bytes=5000, disk_bytes=6000)
    with running(tmp_path, limits=limits) as served:
        for body, status in ((bytes(5001), 413), (iter([bytes(3000)] * 2), 422), (bytes(1 << 20), 413)):
            answer = requests.post(f"{served.url}/pictures", data=body, timeout=60)
            assert answer.status_code == status and "the picture file is too large" in answer.json()["error"]
        small = png(PHOTO[:30, :40])
        served.give(small)
        while (answer := requests.post(f"{served.url}/pictures", data=small, timeout=60)).status_code == 201:
            pass
        assert "this server keeps at most" in answer.json()["error"]
        answer = requests.post(f"{served.url}/generate", data=iter([b"{}"]), timeout=60)
        assert answer.status_code == 411 and "Content-Length" in answer.json()["error"]
    with running(tmp_path / "b", limits=Limits(queue=0)) as served:
        answer = requests.post(f"{served.url}/pictures", data=small, timeout=60)
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"


def test_memory_is_bounded(tmp_path):
    with running(tmp_path, limits=Limits(memory_bytes=1 << 20)) as served:
        for number in range(4):
            ident = served.give(png(PHOTO + number))["id"]
            served.get(f"/pictures/{ident}/tiles/10/0_0")
        assert len(served.server.scenes._scenes) == 1


def test_a_picture_that_is_let_go_of_is_held_by_nothing(tmp_path):
    with running(tmp_path, limits=Limits(memory_bytes=1 << 20)) as served:
        scenes = weakref.WeakSet[Scene]()
        for number in range(4):
            ident = served.give(png(PHOTO + number))["id"]
            scenes.add(served.server.scenes.get(ident))
            for look in ("ours", "bicubic"):
                assert served.get(f"/pictures/{ident}/tiles/10/0_0", look=look).status_code == 200
        deadline = time.monotonic() + 30
        while len(scenes) > 1 and time.monotonic() < deadline:  # threads hold what they did last
            assert served.get(f"/pictures/{ident}/tiles/10/0_0", look="bicubic").status_code == 200
            gc.collect()
            time.sleep(0.1)
        assert len(scenes) == 1


def test_generated_pictures_are_those_of_the_model(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    with running(tmp_path / "shelf", bundle) as served:
        answer = requests.post(f"{served.url}/generate", json={"seeds": [3, 7], "steps": 2}, timeout=60)
        assert answer.status_code == 201, answer.text
        told = answer.json()
        expected = LatentZoom.load(bundle).generate(1, (told[1]["height"], told[1]["width"]), seed=7, num_steps=2)
        shown = pixels(served.get(f"/pictures/{told[1]['id']}/render"))
        assert np.abs(shown.astype(int) - np.asarray(expected[0])).max() <= 1
        deep = pixels(served.get(f"/pictures/{told[0]['id']}/tiles/{told[0]['own_level'] + 6}/3_3"))
        assert deep.shape == (256, 256, 3)
        wanted = {"seeds": [3], "steps": Limits().steps + 1}
        answer = requests.post(f"{served.url}/generate", json=wanted, timeout=60)
        assert answer.status_code == 422 and "steps = 201 is not allowed here" in answer.json()["error"]
    with running(tmp_path / "shelf", bundle) as served:  # made anew from its recipe
        assert np.array_equal(pixels(served.get(f"/pictures/{told[1]['id']}/render")), shown)


def test_many_at_once_get_what_one_gets(served: Running):
    ident = served.give(png(PHOTO[:, ::-1].copy()))["id"]
    paths = [f"/pictures/{ident}/tiles/11/{x}_{y}" for x in range(6) for y in range(4)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda path: pixels(served.get(path)), paths))
    assert all(np.array_equal(a, pixels(served.get(path))) for a, path in zip(together, paths))


def test_it_describes_itself(served: Running):
    described = served.get("/openapi.json").json()
    assert {"/pictures", "/pictures/{ident}/tiles/{level}/{column}_{row}", "/generate", "/models"} <= set(
        described["paths"]
    )
    assert json.dumps(described)
    counted = served.get("/metrics").text
    assert "latentzoom_serve_tiles_total" in counted and "latentzoom_serve_memory_bytes" in counted
    page = served.get("/")
    assert "<title>latentzoom</title>" in page.text and "http://" not in page.text and "https://" not in page.text
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]


def test_steps_of_several_requests_run_together():
    release, sizes = threading.Event(), []

    def run(z_t, t, condition=None):
        sizes.append(len(z_t))
        release.wait(10)
        return z_t * t[:, None, None, None] + (0 if condition is None else condition)

    batches = StepBatches(run, max_batch=4)
    noises = [torch.randn(num, 3, 8, 8, generator=torch.Generator().manual_seed(num)) for num in (1, 2, 1, 3)]
    times = [torch.full((len(noise),), 10 * i) for i, noise in enumerate(noises)]
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(batches, torch.zeros(1, 3, 8, 8), torch.zeros(1))
        while not sizes:
            time.sleep(0.001)
        made = []
        for noise, t in zip(noises, times):
            made.append(pool.submit(batches, noise, t, None))
            while len(batches._waiting) < len(made):
                time.sleep(0.001)
        conditioned = pool.submit(batches, noises[0], times[1][:1], noises[2])
        while len(batches._waiting) < 5:
            time.sleep(0.001)
        release.set()
        for noise, t, future in zip(noises, times, made):
            assert torch.equal(future.result(), noise * t[:, None, None, None])
        assert torch.equal(conditioned.result(), noises[0] * 10 + noises[2])
        first.result()
    assert sizes == [1, 4, 3, 1]  # alone; three that fit; what was too large for them; what takes a condition

    def broken(*inputs):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        StepBatches(broken)(noises[0], times[0])
