"""The page's server on Ray Serve: a real head, a job that starts it, two replicas that share their pictures."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
import requests
import skimage.data
from PIL import Image
from ray_head import Head, free_ports, ray_head

from orchestration.cli import main
from orchestration.serve.on_ray import Replicas, build
from orchestration.serve.settings import Settings
from pipeline import LatentZoom
from pipeline.errors import UserError


def test_what_replicas_need_is_said_before_they_start(monkeypatch):
    monkeypatch.delenv("LATENTZOOM_SERVE_TOKEN", raising=False)
    with pytest.raises(UserError, match="2 replicas need --keep FOLDER"):
        Replicas(max_num=2).check(Settings())
    with pytest.raises(UserError, match="LEAST:MOST"):
        Replicas(min_num=3, max_num=2).check(Settings(keep="/shared"))
    with pytest.raises(UserError, match="^args model: not known; there are .*models"):
        build({"model": "starter:sharp"})
    with pytest.raises(UserError, match="needs a token"):
        build({"models": ["starter:sharp"]})


@pytest.mark.slow
def test_replicas_serve_what_one_process_does(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("LATENTZOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LATENTZOOM_SERVE_TOKEN", "right")  # of the cluster, which is about to start
    with ray_head(num_cpus=3) as head:
        url = _start(head, monkeypatch, tmp_path, capfd)
        headers = {"Authorization": "Bearer right"}
        assert requests.get(f"{url}/models", timeout=60).status_code == 401
        photo = skimage.data.coffee()[100:220, 200:390]
        stream = io.BytesIO()
        Image.fromarray(photo).save(stream, "PNG")
        told = requests.post(f"{url}/pictures", data=stream.getvalue(), headers=headers, timeout=120)
        assert told.status_code == 201, told.text
        ours = np.asarray(LatentZoom.starter().upscale(Image.fromarray(photo), 4))
        for number in range(12):  # whichever replica answers
            x, y = number % 3, number // 3 % 2
            path = f"{url}/pictures/{told.json()['id']}/tiles/10/{x}_{y}"
            answer = requests.get(path, headers=headers, timeout=120)
            tile = np.asarray(Image.open(io.BytesIO(answer.content)))
            part = ours[y * 256 : y * 256 + 256, x * 256 : x * 256 + 256]
            assert np.abs(tile.astype(int) - part).max() <= 1
        assert requests.get(f"{url}/", headers=headers, timeout=60).text.startswith("<!doctype html>")


def _start(head: Head, monkeypatch, tmp_path, capfd) -> str:
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    (port,) = free_ports(1)
    words = ["--host", "127.0.0.1", "--port", str(port), "--replicas", "2", "--keep", str(tmp_path / "shelf")]
    assert main(["serve", "--address", head.address, "--cpus-per-replica", "0.5", *words]) == 0
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    said = capfd.readouterr().out
    assert f"{url}/\n" in said and "right" not in said
    while requests.get(f"{url}/health", timeout=60).status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.5)
    return url
