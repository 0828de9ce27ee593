"""`latentzoom serve` where things go wrong: clients that leave, pages of others, full folders, stores that are away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
import skimage.data
from serving_server import Running, png, running, wait
from tiny_bundle import make_bundle

from orchestration.serve import shelf as shelves
from orchestration.serve.app import Limits
from orchestration.serve.catalogue import Catalogue
from orchestration.serve.desk import Busy, Desk
from orchestration.serve.shelf import Full, Shelf
from pipeline.errors import UserError
from pipeline.reading import read_picture

PHOTO = skimage.data.coffee()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with running(tmp_path_factory.mktemp("shelf")) as served:
        yield served


def test_pages_of_others_change_nothing(served: Running):
    small = png(PHOTO[:20, :20])
    own = {"Origin": served.url}
    for headers in (
        {"Origin": "null"},  # a sandboxed frame of any page
        {"Origin": "http://["},
        {"Origin": "http://localhost:1"},  # another server of this machine
        {"Origin": "https://evil.example"},
        {**own, "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        for method, path in (("POST", "/pictures"), ("DELETE", "/jobs/x"), ("POST", "/generate")):
            answer = requests.request(method, f"{served.url}{path}", data=small, headers=headers, timeout=60)
            assert answer.status_code == 403 and "this server" in answer.json()["error"], headers
    headers = {**own, "Sec-Fetch-Site": "same-origin"}
    assert requests.post(f"{served.url}/pictures", data=small, headers=headers, timeout=60).status_code == 201


def test_a_token_keeps_the_picture_of_the_address_and_refuses_other_pages(tmp_path):
    with running(tmp_path, token="right") as served, requests.Session() as browser:
        page = browser.get(f"{served.url}/?picture=abc&token=right", timeout=60)
        assert page.url == f"{served.url}/?picture=abc"
        foreign = {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:1"}  # cookies know no ports
        assert browser.post(f"{served.url}/pictures", data=b"x", headers=foreign, timeout=60).status_code == 403
        set_cookie = page.history[0].headers["Set-Cookie"]
        assert "HttpOnly" in set_cookie and "SameSite=lax" in set_cookie and "Secure" not in set_cookie
        secure = requests.get(
            f"{served.url}/?token=right", headers={"X-Forwarded-Proto": "https"}, allow_redirects=False, timeout=60
        )
        assert "Secure" in secure.headers["Set-Cookie"]


def test_every_mistake_is_one_sentence_under_error(served: Running):
    ident = served.give(png(PHOTO[:20, :20]))["id"]
    for path, status in (
        ("/nothing", 404),
        ("/..%2f..%2fapp.py", 404),
        (f"/pictures/{ident}/tiles/a/0_0", 422),
        (f"/pictures/{ident}/render?scale=nan", 422),
        (f"/pictures/{ident}/render?format=exe", 422),
    ):
        answer = served.get(path)
        assert answer.status_code == status and len(answer.json()["error"]) > 5, path
    answer = requests.post(f"{served.url}/generate", data="{", headers={"Content-Type": "application/json"}, timeout=60)
    assert answer.status_code == 422 and "JSON" in answer.json()["error"]


def test_etags_as_caches_send_them(served: Running):
    ident = served.give(png(PHOTO[:20, :20]))["id"]
    url = f"{served.url}/pictures/{ident}/tiles/6/0_0"
    etag = requests.get(url, timeout=60).headers["ETag"]
    for header, status in ((etag, 304), (f"W/{etag}", 304), (f'"other", {etag}', 304), ("*", 304), ('"other"', 200)):
        assert requests.get(url, headers={"If-None-Match": header}, timeout=60).status_code == status, header


def test_a_rendering_stops_when_its_client_leaves(served: Running):
    ident = served.give(png(PHOTO))["id"]
    served.get(f"/pictures/{ident}/tiles/10/0_0")
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as client:
        client.sendall(f"GET /pictures/{ident}/render?scale=25 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        wait(lambda: served.server.renderers.busy == 1, 30.0)
        # Tiles are drawn beside it, and another rendering does not take its name.
        name = next(iter(served.server.jobs))
        assert served.get(f"/pictures/{ident}/tiles/12/3_3").status_code == 200
        answer = served.get(f"/pictures/{ident}/render", job=name)
        assert answer.status_code == 422 and "under way already" in answer.json()["error"]
    wait(lambda: not served.server.jobs, 30.0)
    wait(lambda: served.server.renderers.busy == 0, 30.0)


def test_a_thread_that_works_on_after_its_time_is_not_free():
    async def main() -> None:
        desk, release = Desk(1, queue=5, seconds=0.2), threading.Event()
        try:
            with pytest.raises(Busy, match="more than 0.2 s"):
                await desk.do(release.wait)
            assert desk.busy == 1
            with pytest.raises(Busy):  # the next waits for it in the queue, where it can be counted
                await desk.do(lambda: None)
            assert (desk.busy, desk.waiting) == (1, 0)
            release.set()
            while desk.busy:
                await asyncio.sleep(0.01)

            async def unwanted() -> bool:
                return False

            with pytest.raises(UserError, match="nobody waits"):
                await desk.do(lambda: None, unwanted)
            assert desk.busy == 0 and await desk.do(lambda: 7) == 7
        finally:
            release.set()
            desk.close()

    asyncio.run(main())


def test_memory_is_bounded_without_a_tile_too(tmp_path):
    with running(tmp_path, limits=Limits(memory_bytes=2 << 20)) as served:
        for number in range(6):
            served.give(png(PHOTO + number))
        wait(lambda: served.server.samplers.busy == 0, 30.0)
        assert len(served.server.scenes._scenes) <= 2


def test_reduced_sizes_are_not_kept_without_end(served: Running):
    ident = served.give(png(PHOTO))["id"]
    for side in range(20, 60):
        assert served.get(f"/pictures/{ident}/render", size=f"{side}x{side}", look="bicubic").status_code == 200
    scene = served.server.scenes.get(ident)
    assert len(scene._source._small) <= 16


def test_a_picture_is_read_once_for_all_who_ask(tmp_path, monkeypatch):
    count = []

    def counted(*args):
        count.append(args)
        time.sleep(0.2)
        return read_picture(*args)

    with running(tmp_path) as served:
        ident = served.give(png(PHOTO))["id"]
        served.server.scenes.forget(ident)
        monkeypatch.setattr("orchestration.serve.scenes.read_picture", counted)
        asking = [threading.Thread(target=served.server.scenes.get, args=(ident,)) for _ in range(5)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        assert len(count) == 1


def test_a_latent_that_cannot_be_made_is_said_and_its_progress_told(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", task="sr")
    with running(tmp_path / "shelf", bundle) as served:
        model = served.server.catalogue.get().model
        run, go = model._run_denoiser, threading.Semaphore(0)

        def stepwise(*inputs):
            go.acquire()
            return run(*inputs)

        model._run_denoiser = stepwise
        ident = served.give(png(PHOTO[:16, :16]))["id"]
        told = served.get(f"/pictures/{ident}").json()
        assert not told["is_ready"]
        for _ in range(10):
            go.release()
        wait(lambda: served.get(f"/pictures/{ident}").json()["progress"] > 0.4, 30.0)
        assert not served.get(f"/pictures/{ident}").json()["is_ready"]
        model._run_denoiser = run
        for _ in range(50):
            go.release()
        wait(lambda: served.get(f"/pictures/{ident}").json()["is_ready"], 30.0)

        def broken(*inputs):
            raise UserError("the denoiser is ill")

        model._run_denoiser = broken
        ident = served.give(png(PHOTO[:16, 20:36]))["id"]
        wait(lambda: served.get(f"/pictures/{ident}").json()["problem"], 30.0)
        assert served.get(f"/pictures/{ident}").json()["problem"] == "the denoiser is ill"
        assert served.get(f"/pictures/{ident}/tiles/6/0_0").json()["error"] == "the denoiser is ill"
        model._run_denoiser = run  # it is no picture's end
        assert served.get(f"/pictures/{ident}/tiles/6/0_0").status_code == 200
        assert not served.server._making


def test_a_shelf_beside_others(tmp_path, monkeypatch):
    mine, other = (Shelf(tmp_path, max_bytes=1000, seconds=3600.0) for _ in range(2))
    (tmp_path / ".part-theirs").mkdir()  # the other server is writing
    assert mine.sweep() == [] and (tmp_path / ".part-theirs").exists()
    os.utime(tmp_path / ".part-theirs", (1, 1))
    assert mine.sweep() == [".part-theirs"]
    entry = other.add_file(bytes(900), "x", (1, 1))
    assert mine.num_bytes() == 0  # until it looks, which it does every minute and before it refuses
    mine.sweep()
    assert mine.num_bytes() == 900
    with pytest.raises(Full, match="keeps at most"):
        mine.add_file(bytes(200), "y", (1, 1))
    mine.remove(entry.id)
    assert mine.num_bytes() == 0
    monkeypatch.setattr(shelves, "MAX_ENTRIES", 2)
    for number in range(2):
        entry = mine.add_recipe({"seed": number}, "s", (1, 1), "m")
    with pytest.raises(Full, match="2 pictures"):
        mine.add_recipe({"seed": 3}, "s", (1, 1), "m")

    def refused(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    assert mine.get(entry.id) == entry  # what is there can be seen
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(UserError, match="cannot write in .*: Read-only file system; give another --keep"):
        Shelf(tmp_path, max_bytes=1, seconds=1.0)


def test_a_full_disk_is_said(served: Running, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    answer = requests.post(f"{served.url}/pictures", data=png(PHOTO[:20, :20]), timeout=60)
    assert answer.status_code == 507 and answer.json()["error"] == (
        "the picture cannot be kept here: No space left on device"
    )


def test_a_store_that_is_away_hides_its_models_only(tmp_path):
    listed, problem = Catalogue([], store=f"sqlite:///{tmp_path}/none/mlflow.db").listed()
    assert [one.address for one in listed] == ["starter:faithful", "starter:sharp"] and problem


def test_openapi_says_what_goes_in_and_comes_out(served: Running):
    paths = served.get("/openapi.json").json()["paths"]
    body = paths["/pictures"]["post"]["requestBody"]
    assert body["required"] and body["content"]["application/octet-stream"]["schema"]["format"] == "binary"
    tile = paths["/pictures/{ident}/tiles/{level}/{column}_{row}"]["get"]["responses"]
    assert list(tile["200"]["content"]) == ["image/png"]
    for status in ("404", "422", "503"):
        assert tile[status]["content"]["application/json"]["schema"]["$ref"].endswith("/Mistake")
    assert paths["/pictures"]["post"]["responses"]["201"]["content"]["application/json"]["schema"]["$ref"]


@pytest.mark.slow
def test_ctrl_c_ends_a_long_rendering(tmp_path):
    command = [sys.executable, "-m", "orchestration.cli", "serve", "--port", "0", "--keep", str(tmp_path / "shelf")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip().rstrip("/")
        ident = requests.post(f"{url}/pictures", data=png(PHOTO), timeout=60).json()["id"]
        requests.get(f"{url}/pictures/{ident}/tiles/10/0_0", timeout=60)
        asking = threading.Thread(target=lambda: _quietly(f"{url}/pictures/{ident}/render?scale=25"))
        asking.start()
        wait(lambda: "latentzoom_serve_rendering 1.0" in requests.get(f"{url}/metrics", timeout=60).text, 30.0)
        time.sleep(1)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0 and time.monotonic() - started < 30
        asking.join()
        assert "Traceback" not in process.stderr.read()


def _quietly(url: str) -> None:
    with contextlib.suppress(requests.RequestException):
        requests.get(url, timeout=120)
