"""What a server keeps, so that a picture is the same tomorrow, and what it lets go of once it is out of date."""

from __future__ import annotations

import json
import os
import shutil
import time

import numpy as np
import pytest
import requests
import skimage.data
from serving_server import png, running, wait
from test_serve import pixels
from tiny_bundle import make_bundle

from orchestration.registry import versions as registry
from orchestration.serve.desk import Busy
from orchestration.serve.jobs import MAX_KEPT, Jobs
from orchestration.serve.shelf import Shelf
from orchestration.tracking import store as tracking
from pipeline import LatentZoom

PHOTO = skimage.data.coffee()[100:161, 200:290]


def test_a_generated_picture_is_the_same_after_a_restart(tmp_path, monkeypatch):
    """Sampled anew, alone or with others, it would differ in the last bits, under the same ETag."""
    bundle, shown = make_bundle(tmp_path / "bundle"), []
    for number in range(2):
        with running(tmp_path / "shelf", bundle) as served:
            if number == 0:
                wanted = {"seeds": [0, 1, 2], "latent_size": "16x24", "steps": 2}
                told = requests.post(f"{served.url}/generate", json=wanted, timeout=60).json()
            shown.append([pixels(served.get(f"/pictures/{one['id']}/render", scale=4)) for one in told])
            assert served.server.shelf.num_bytes() > 3 * 16 * 24 * 4
        monkeypatch.setattr(LatentZoom, "sample_latents", None)
    assert np.array_equal(*shown)
    for file in (tmp_path / "shelf").glob("*/latent-*"):
        file.write_bytes(b"damaged")
    monkeypatch.undo()
    with running(tmp_path / "shelf", bundle) as served:
        again = [pixels(served.get(f"/pictures/{one['id']}/render", scale=4)) for one in told]
    assert np.abs(np.array(again).astype(int) - shown[0]).max() <= 2


def test_the_first_latent_that_is_kept_stays(tmp_path):
    shelf = Shelf(tmp_path, max_bytes=100, seconds=60.0)
    entry = shelf.add_recipe({"seed": 1}, "seed 1", (8, 8), "m")
    for data in (b"one", b"two"):
        shelf.keep_latent(entry, "m 1", data)
    assert shelf.latent(entry, "m 1") == b"one" and shelf.latent(entry, "m 2") is None and shelf.num_bytes() == 3
    shelf.keep_latent(entry, "m 2", bytes(98))  # no room
    assert shelf.latent(entry, "m 2") is None
    assert not [file for file in (tmp_path / entry.id).iterdir() if file.name.startswith(".part")]


def test_tiles_of_weights_that_were_replaced_are_not_a_browsers_any_more(tmp_path):
    tags = []
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
        bundle = make_bundle(tmp_path / "bundle", seed=seed)
        with running(tmp_path / "shelf", bundle) as served:
            if seed == 1:
                ident = served.give(png(PHOTO))["id"]
            address = f"/pictures/{ident}/tiles/9/0_0"
            answer = served.get(address, model=bundle)
            assert "no-cache" in answer.headers["Cache-Control"] and "max-age" not in answer.headers["Cache-Control"]
            tags.append(answer.headers["ETag"])
            known = requests.get(f"{served.url}{address}", headers={"If-None-Match": tags[0]}, timeout=60)
            assert known.status_code == (304 if seed == 1 else 200)
    assert tags[0] != tags[1]


def test_a_newly_promoted_model_is_listed_and_draws(tmp_path, monkeypatch):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("LATENTZOOM_CACHE", str(tmp_path / "cache"))
    for seed in (1, 2):
        registry.register(make_bundle(tmp_path / f"bundle{seed}", seed=seed), "faces", tracking_uri=store)
    address = "models:/faces@champion"
    tracking.client(store).set_registered_model_alias("faces", registry.CHAMPION, "1")
    with running(tmp_path / "shelf", address, store=store) as served:
        ident = served.give(png(PHOTO))["id"]
        before = served.get(f"/pictures/{ident}/tiles/9/0_0")
        assert "models:/faces/1 " in served.get("/health").json()["model"]
        tracking.client(store).set_registered_model_alias("faces", registry.CHAMPION, "2")
        titles = [model["title"] for model in served.get("/models").json()["models"]]
        assert "faces, version 2" in titles and "models:/faces/2 " in served.get("/health").json()["model"]
        after = served.get(f"/pictures/{ident}/tiles/9/0_0")
        assert before.headers["ETag"] != after.headers["ETag"] and before.content != after.content


def test_renderings_of_a_machine_that_is_gone_are_removed(tmp_path):
    jobs = Jobs(tmp_path, max_bytes=1 << 20)
    for number in range(MAX_KEPT):
        job = jobs.begin(f"{number}", 5, "a.png")
        jobs.end(f"{number}")
        state = json.loads((job.folder / "state.json").read_text())
        state["owner"]["host"] = "pod-1"
        (job.folder / "state.json").write_text(json.dumps(state))
    jobs.sweep()
    with pytest.raises(Busy):
        jobs.begin("new", 5, "a.png")  # it may draw them still
    for file in tmp_path.glob("*/state.json"):
        os.utime(file, (file.stat().st_mtime - 3600,) * 2)
    here = Jobs(tmp_path, max_bytes=1 << 20)
    assert not list(tmp_path.iterdir())
    file = here.begin("new", 5, "a.png").folder / "state.json"
    os.utime(file, (1, 1))
    here.sweep()  # tells others that it is at work
    assert file.stat().st_mtime > 1e9


def test_a_rendering_that_is_fetched_in_parts_stays_until_it_is_whole(tmp_path):
    with running(tmp_path) as served:
        ident = served.give(png(PHOTO))["id"]
        job = requests.post(f"{served.url}/pictures/{ident}/renderings", params={"look": "bicubic"}, timeout=60).json()
        address = f"{served.url}/jobs/{job['job']}"
        while not requests.get(address, timeout=60).json()["is_finished"]:
            pass
        part = requests.get(f"{address}/file", headers={"Range": "bytes=0-99"}, timeout=60)
        assert part.status_code == 206 and len(part.content) == 100
        time.sleep(0.5)  # what is removed goes after its answer
        assert requests.get(f"{address}/file", timeout=60).content[:100] == part.content
        wait(lambda: requests.get(address, timeout=60).status_code == 404)  # once it has been sent


def test_smaller_than_it_is_what_is_saved_is_what_shows(tmp_path):
    with running(tmp_path) as served:
        told = served.give(png(PHOTO[:60]))
        height, width = told["height"] // 2, told["width"] // 2
        tile = pixels(served.get(f"/pictures/{told['id']}/tiles/{told['own_level'] - 1}/0_0"))
        saved = pixels(served.get(f"/pictures/{told['id']}/render", size=f"{height}x{width}"))
        assert tile.shape == (height, width, 3) and np.array_equal(tile, saved)
        itself = served.get(f"/pictures/{told['id']}/render", size=f"{height}x{width}", look="bicubic")
        assert np.array_equal(saved, pixels(itself))  # and not drawn anew


def test_a_latent_that_the_model_refuses_is_no_picture(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    with running(tmp_path / "shelf", bundle) as served:
        answer = requests.post(f"{served.url}/generate", json={"seeds": [1], "latent_size": "7x5"}, timeout=60)
        assert answer.status_code == 422 and "7x5 is not allowed; give multiples of 2" in answer.json()["error"]


def test_two_models_of_one_name_in_a_notebook_stay_two(tmp_path):
    from orchestration.serve.notebook import view

    one, other = (LatentZoom.load(make_bundle(tmp_path / f"{seed}", seed=seed)) for seed in (1, 2))
    shown = []
    for model in (one, other, one):
        base, _, ident = view(model, PHOTO, 400).address.partition("/?picture=")
        shown.append((base, ident))
    drawn = [pixels(requests.get(f"{base}/pictures/{ident}/render?scale=2", timeout=60)) for base, ident in shown]
    assert np.array_equal(drawn[0], drawn[2]) and not np.array_equal(drawn[0], drawn[1])
