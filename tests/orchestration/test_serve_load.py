"""`latentzoom serve` under load, killed, and given what breaks decoders. `pytest -s` prints rates."""

from __future__ import annotations

import asyncio
import io
import os
import random
import signal

import numpy as np
import psutil
import pytest
import requests
import skimage.data
from PIL import Image
from serve_load import photo, rounds, start, watch

pytestmark = pytest.mark.slow
USERS, SECONDS = 50, 10.0


def test_fifty_users_pan_at_once_in_bounded_memory(tmp_path):
    process, url = start(tmp_path / "shelf", "--memory", "0.25")
    server = psutil.Process(process.pid)
    try:
        for name, taken in asyncio.run(rounds(url, server, USERS, SECONDS)).items():
            print(f"{name:6} {taken}")
            assert len(taken.seconds) >= USERS
        resident = asyncio.run(watch(url, server, USERS, 3 * SECONDS / 60, SECONDS))
        assert resident[-1] < resident[0] + (128 << 20)  # it does not go on growing
        metrics = dict(line.rsplit(" ", 1) for line in requests.get(f"{url}/metrics", timeout=60).text.splitlines()
                       if not line.startswith("#"))  # fmt: skip
        assert float(metrics["latentzoom_serve_memory_bytes"]) <= 1.25 * (1 << 28)
        assert float(metrics["process_resident_memory_bytes"]) > float(metrics["latentzoom_serve_memory_bytes"])
    finally:
        process.terminate()
        assert process.wait(60) in (0, -signal.SIGTERM)


def test_killed_and_started_again_nothing_is_lost(tmp_path):
    process, url = start(tmp_path / "shelf")
    ident = requests.post(f"{url}/pictures", data=photo(), timeout=60).json()["id"]
    tile = requests.get(f"{url}/pictures/{ident}/tiles/13/9_9", timeout=60).content
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process, url = start(tmp_path / "shelf")
    try:
        again = requests.get(f"{url}/pictures/{ident}/tiles/13/9_9", timeout=60)
        assert again.status_code == 200 and again.content == tile
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_hostile_uploads_have_clear_answers(tmp_path):
    process, url = start(tmp_path / "shelf")
    try:
        for name, data in hostile():
            answer = requests.post(f"{url}/pictures", data=data, params={"name": name}, timeout=60)
            assert answer.status_code in (201, 422), (name, answer.text)
            if answer.status_code == 422:
                assert 10 < len(answer.json()["error"]) < 300 and "\n" not in answer.json()["error"], name
            else:
                told = answer.json()
                tile = requests.get(f"{url}/pictures/{told['id']}/tiles/{told['own_level'] + 1}/0_0", timeout=60)
                assert tile.status_code == 200, (name, tile.text)
        assert requests.get(f"{url}/health", timeout=60).json()["is_ready"]
    finally:
        process.terminate()
        process.wait(60)


def hostile() -> list[tuple[str, bytes]]:
    """Pictures of every mode and format, cut and bent at seeded places, bombs, and what is none."""
    draw = random.Random(0)
    found = [
        ("text.png", b"hello"),
        ("html.jpg", b"<html>" * 50),
        ("../../etc/passwd", photo()),
        ("\u202egnp.exe", photo()),
    ]
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "YCbCr"):
        image = Image.fromarray(skimage.data.astronaut()[:40, :50])
        if mode in ("I;16", "F"):
            image = Image.fromarray(np.arange(2000, dtype=np.uint16 if mode == "I;16" else np.float32).reshape(40, 50))
        for form in ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"):
            stream = io.BytesIO()
            try:
                (image if mode in ("I;16", "F") else image.convert(mode)).save(stream, form)
            except (OSError, ValueError, KeyError):
                continue
            data = stream.getvalue()
            found.append((f"{mode}.{form.lower()}", data))
            found.append((f"cut-{mode}.{form.lower()}", data[: draw.randrange(1, len(data))]))
            bent = bytearray(data)
            for _ in range(8):
                bent[draw.randrange(len(bent))] = draw.randrange(256)
            found.append((f"bent-{mode}.{form.lower()}", bytes(bent)))
    header = bytearray(photo())
    header[16:24] = (200_000).to_bytes(4, "big") * 2  # a bomb: 40 gigapixels
    return [*found, ("bomb.png", bytes(header))]
