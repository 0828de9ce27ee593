"""The work behind `latentzoom serve`: who is served next, what is kept and let go of, what several servers share."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import io
import json
import os
import shutil
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
import skimage.data
import torch
from PIL import Image
from serving_server import Running, png, running, wait

from orchestration.serve import catalogue as catalogues
from orchestration.serve import jobs as job_module
from orchestration.serve.app import Limits
from orchestration.serve.batching import StepBatches
from orchestration.serve.desk import Desk, Unwanted
from orchestration.serve.jobs import Jobs
from orchestration.serve.scenes import Scene
from orchestration.serve.tiles import SentTiles, encoded
from pipeline.errors import UserError
from pipeline.feature_cache import FeatureCache

PHOTO = skimage.data.coffee()[:150, :200]
"""Four blocks of features for the starter."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with running(tmp_path_factory.mktemp("shelf")) as served:
        yield served


def test_each_is_served_in_turn_however_much_one_asks_for():
    async def main() -> list[str]:
        desk, release, served = Desk(1, queue=20, seconds=60.0), threading.Event(), []
        first = asyncio.create_task(desk.do(release.wait))
        await asyncio.sleep(0)
        names = ["a1", "a2", "a3", "b1", "c1", "b2"]
        asked = [asyncio.create_task(desk.do(lambda name=name: served.append(name), whose=name[0])) for name in names]
        await asyncio.sleep(0)
        assert desk.waiting == 6
        asked[1].cancel()  # its turn goes to the next
        release.set()
        await asyncio.gather(first, *asked, return_exceptions=True)
        assert desk.is_idle
        late = asyncio.create_task(desk.do(lambda: time.sleep(0.2)))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(desk.do(lambda: served.append("never")))
        await asyncio.sleep(0)
        desk.stop()
        with pytest.raises(Unwanted, match="the server ends"):
            await waiting
        await late
        with pytest.raises(Unwanted, match="the server ends"):
            await desk.do(lambda: None)
        desk.close()
        return served

    assert asyncio.run(main()) == ["a1", "b1", "c1", "b2", "a3"]


def test_features_are_made_once_each_and_different_ones_at_the_same_time():
    cache, both, made = FeatureCache(3 * 40), threading.Barrier(2, timeout=30), []

    def make(number: int) -> torch.Tensor:
        both.wait()  # passes only where two are made at once
        made.append(number)
        return torch.full((10,), float(number))

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(cache.get, (n, 0, 1, 1), lambda n=n: make(n)) for n in (1, 2, 1, 2)]
        assert [int(one.result()[0]) for one in asked] == [1, 2, 1, 2]
    assert sorted(made) == [1, 2] and cache.num_bytes == 80

    def broken() -> torch.Tensor:
        raise UserError("no memory")

    with pytest.raises(UserError, match="no memory"):
        cache.get((3, 0, 1, 1), broken)
    cache.get((1, 0, 1, 1), broken)  # is there; used last
    for number in (3, 4):
        cache.get((number, 0, 1, 1), lambda: torch.zeros(10))
    assert cache.num_bytes == 120 and (2, 0, 1, 1) not in cache and (1, 0, 1, 1) in cache
    cache.get((0, 0, 1, 1), lambda: torch.zeros(10), comes_in_rows=True)
    assert (1, 0, 1, 1) not in cache  # nothing lies before it: the one used longest ago goes
    cache.get((9, 0, 1, 1), lambda: torch.zeros(10), comes_in_rows=True)
    assert (0, 0, 1, 1) not in cache  # the first


def test_a_tile_does_not_wait_for_features_of_others(served: Running, monkeypatch):
    ident = served.give(png(PHOTO))["id"]
    scene = served.server.scenes.get(ident)
    wait(lambda: scene.is_ready)
    assert len(scene.missing(8, 0, 0)) == 4 and len(scene.missing(11, 0, 0)) == 1
    served.get(f"/pictures/{ident}/tiles/11/0_0")
    make, begun, go = scene.make, threading.Event(), threading.Event()

    def slow(tile):
        begun.set()
        assert go.wait(60)
        make(tile)

    monkeypatch.setattr(scene, "make", slow)
    with ThreadPoolExecutor(3) as pool:
        try:
            cold = [pool.submit(served.get, f"/pictures/{ident}/tiles/11/5_4") for _ in range(2)]
            assert begun.wait(60)
            assert served.get(f"/pictures/{ident}/tiles/11/1_0").status_code == 200  # of the same picture
            assert served.get("/metrics").status_code == 200
            assert not any(one.done() for one in cold)
        finally:
            go.set()
        assert all(one.result().status_code == 200 for one in cold)


def test_features_are_made_ahead_while_nobody_asks(tmp_path):
    with running(tmp_path) as served:
        scene = served.server.scenes.get(served.give(png(PHOTO))["id"])
        wait(lambda: scene.is_ready and not scene.missing(8, 0, 0))
        assert "latentzoom_serve_features_total 4.0" in served.get("/metrics").text
        scene._cache_bytes = scene.drawing().feature_bytes
        assert scene.ahead(3) == []
    with running(tmp_path / "b", limits=Limits(memory_bytes=1 << 20)) as served:  # no room for what nobody asked for
        scene = served.server.scenes.get(served.give(png(PHOTO))["id"])
        wait(lambda: scene.is_ready)
        assert served.server.scenes.ahead(3) == []


def test_what_lies_nearest_comes_first(served: Running):
    ident = served.give(png(np.tile(PHOTO, (4, 4, 1))))["id"]  # 600 x 800
    scene = served.server.scenes.get(ident)
    wait(lambda: scene.is_ready)
    scene.missing(12, 11, 8)  # pixel 549, 734
    first = scene.ahead(1)
    assert first in ([], [(472, 672, 600, 800)])
    served.server.scenes.forget(ident)


def test_a_tile_is_drawn_once_and_sent_again_from_memory(served: Running, monkeypatch):
    drawn = []
    tile = Scene.tile

    def counted(self, *place):
        drawn.append(place)
        return tile(self, *place)

    monkeypatch.setattr(Scene, "tile", counted)
    ident = served.give(png(PHOTO[::-1].copy()))["id"]
    first, again = (served.get(f"/pictures/{ident}/tiles/11/1_1") for _ in range(2))
    assert first.content == again.content and len(drawn) == 1
    served.get(f"/pictures/{ident}/tiles/11/1_1", look="bicubic")
    served.get(f"/pictures/{ident}/tiles/11/1_1", model="starter:sharp")
    assert len(drawn) == 3
    sent = SentTiles(10)
    for number in range(4):
        sent.put(number, b"1234")
    sent.put(3, b"12")
    assert sent.num_bytes == 6 and sent.get(1) is None and sent.get(3) == b"12"


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_tiles_are_what_was_drawn(channels):
    pixels = np.random.default_rng(channels).integers(0, 255, (7, 9, channels), np.uint8)
    pixels[3:] = pixels[3]
    decoded = np.asarray(Image.open(io.BytesIO(encoded(pixels))))
    assert np.array_equal(np.atleast_3d(decoded), pixels)


def test_any_server_of_a_folder_knows_a_rendering_and_stops_it(tmp_path):
    with running(tmp_path) as one, running(tmp_path) as other:
        ident = one.give(png(PHOTO))["id"]
        asked = {"scale": 60, "look": "bicubic"}
        answer = requests.post(f"{one.url}/pictures/{ident}/renderings", params=asked, timeout=60)
        assert answer.status_code == 202, answer.text
        job, file = answer.json()["job"], answer.json()["file"]
        assert file == "picture-12000x9000.png"
        wait(lambda: other.get(f"/jobs/{job}").json()["done"] > 0)
        early = other.get(f"/jobs/{job}/file")
        assert early.status_code == 422 and "under way still" in early.json()["error"]
        assert requests.delete(f"{other.url}/jobs/{job}", timeout=60).status_code == 204
        wait(lambda: one.get(f"/jobs/{job}").status_code == 404)
        wait(lambda: not len(one.server.jobs) and one.server.renderers.is_idle)
        asked = {"size": "30x40", "format": "tif"}
        job = requests.post(f"{one.url}/pictures/{ident}/renderings", params=asked, timeout=60).json()["job"]
        wait(lambda: other.get(f"/jobs/{job}").json()["is_finished"])
        fetched = other.get(f"/jobs/{job}/file")
        assert np.asarray(Image.open(io.BytesIO(fetched.content))).shape == (30, 40, 3)
        assert "picture-40x30.tif" in fetched.headers["content-disposition"]
        wait(lambda: one.get(f"/jobs/{job}").status_code == 404)  # once
        wait(lambda: not list((tmp_path / ".jobs").iterdir()))  # the answer comes a moment before
        other.server.shelf.sweep()
        assert other.get(f"/pictures/{ident}").status_code == 200
        broken = requests.post(f"{one.url}/pictures/{ident}/renderings", params={"size": "0x1"}, timeout=60)
        assert broken.status_code == 422 and "is not allowed" in broken.json()["error"]


def test_who_asks_while_a_rendering_is_removed_keeps_nothing_of_it(tmp_path, monkeypatch):
    import orchestration.serve.jobs as module

    jobs, rmtree = module.Jobs(tmp_path / ".jobs", max_bytes=1 << 20), shutil.rmtree
    job = jobs.begin("one", 10, "a.png")
    (job.folder / "asked").unlink()
    assert jobs.progress("one").done == 0 and not (job.folder / "asked").exists()
    late = ["stop"]

    def raced(folder, **options):
        rmtree(folder, **options)
        if late:  # written between the removal of what is in the folder and that of the folder
            folder.mkdir()
            (folder / late.pop()).touch()

    monkeypatch.setattr(module.shutil, "rmtree", raced)
    jobs.remove("one")
    assert not list((tmp_path / ".jobs").iterdir())


def test_a_rendering_that_nobody_asks_about_ends(tmp_path, monkeypatch):
    with running(tmp_path) as served:
        ident = served.give(png(PHOTO))["id"]
        monkeypatch.setattr(job_module, "ALONE", 0.2)
        monkeypatch.setattr(job_module, "TELL", 0.0)
        asked = {"scale": 60, "look": "bicubic"}
        requests.post(f"{served.url}/pictures/{ident}/renderings", params=asked, timeout=60)
        assert len(served.server.jobs) == 1
        wait(lambda: not len(served.server.jobs))
        wait(lambda: not list((tmp_path / ".jobs").iterdir()))


def test_what_killed_servers_left_is_removed(tmp_path):
    jobs = Jobs(tmp_path / ".jobs", max_bytes=100)
    names = ["running", "killed", "elsewhere", "finished", "old"]
    for name in names:
        jobs.begin(name, 5, "a.png")
    folders = {name: jobs._place(name) for name in names}

    def rewrite(name: str, **owner) -> None:
        state = json.loads((folders[name] / "state.json").read_text())
        state["owner"].update(owner)
        (folders[name] / "state.json").write_text(json.dumps(state))

    rewrite("killed", started=1.0)  # another process with this number
    rewrite("elsewhere", host="other", pid=1)
    for name in ("finished", "old"):
        jobs._here[name].finish()
        rewrite(name, started=1.0)  # it can be fetched still
    os.utime(folders["old"], (1, 1))
    again = Jobs(tmp_path / ".jobs", max_bytes=100)
    assert {name for name in names if folders[name].exists()} == {"running", "elsewhere", "finished"}
    assert again.progress("finished").is_finished
    with pytest.raises(UserError, match="under way already"):
        again.begin("running", 5, "a.png")
    (folders["finished"] / "rendering.png").write_bytes(bytes(101))
    with pytest.raises(UserError, match="wait to be fetched"):
        again.begin("new", 5, "a.png")


def test_models_are_let_go_of(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogues, "MAX_LOADED", 1)
    with running(tmp_path) as served:
        ident = served.give(png(PHOTO[:40, :50]))["id"]
        served.get(f"/pictures/{ident}/tiles/6/0_0")
        old = weakref.ref(served.server.catalogue.get().model)
        assert served.get(f"/pictures/{ident}/tiles/6/0_0", model="starter:sharp").status_code == 200
        assert served.server.catalogue.num_loaded == 1

        def is_gone() -> bool:
            gc.collect()
            return old() is None

        wait(is_gone)  # nothing holds it
        assert served.get(f"/pictures/{ident}/tiles/7/0_0").status_code == 200  # and it comes again


def test_batches_that_are_closed_end_their_thread_and_go_on_alone():
    batches = StepBatches(lambda z_t, t: z_t + 1)
    assert torch.equal(batches(torch.zeros(1, 1), torch.zeros(1)), torch.ones(1, 1))
    batches.close()
    wait(lambda: not any(t.name == "latentzoom-denoise" and t._target.__self__ is batches
                         for t in threading.enumerate() if hasattr(t, "_target")))  # fmt: skip
    assert torch.equal(batches(torch.zeros(1, 1), torch.zeros(1)), torch.ones(1, 1))


def test_limits_are_plain(tmp_path):
    limits = Limits()
    with running(tmp_path, limits=dataclasses.replace(limits, memory_bytes=1 << 24)) as served:
        assert served.server.sent.max_bytes + served.server.scenes.max_bytes == 1 << 24
