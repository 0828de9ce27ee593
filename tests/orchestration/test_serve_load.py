"""`latentzoom serve` under load, killed, and given what breaks decoders. `pytest -s` prints rates."""

from __future__ import annotations

import asyncio
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import pytest
import requests
import skimage.data
from PIL import Image

pytestmark = pytest.mark.slow
USERS, SECONDS = 50, 20.0


def start(folder: Path, *words: str) -> tuple[subprocess.Popen[str], str]:
    """The command itself → its process and its address."""
    command = [sys.executable, "-m", "orchestration.cli", "serve", "--port", "0", "--keep", str(folder), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line.startswith("http://127.0.0.1:"), line
    return process, line.rstrip("/")


def photo() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()).save(stream, "PNG")
    return stream.getvalue()


def test_fifty_users_pan_at_once_in_bounded_memory(tmp_path):
    process, url = start(tmp_path / "shelf", "--memory", "0.25")
    try:
        tiles, seconds, resident = asyncio.run(pan(url, psutil.Process(process.pid)))
        median, high = (np.percentile(seconds, part) * 1e3 for part in (50, 95))
        print(f"{tiles / SECONDS:.0f} tiles/s, median {median:.0f} ms, 95th percentile {high:.0f} ms")
        print(f"at most {max(resident) >> 20} MiB")
        half = len(resident) // 2
        assert max(resident[half:]) < max(resident[:half]) + (128 << 20)  # it does not go on growing
        metrics = dict(line.rsplit(" ", 1) for line in requests.get(f"{url}/metrics", timeout=60).text.splitlines()
                       if not line.startswith("#"))  # fmt: skip
        assert float(metrics["latentzoom_serve_memory_bytes"]) <= 1.25 * (1 << 28)
    finally:
        process.terminate()
        assert process.wait(60) in (0, -signal.SIGTERM)


async def pan(url: str, server: psutil.Process) -> tuple[int, list[float], list[int]]:
    """Each user has a picture of his own, goes on to a tile beside the last, and looks for a moment."""
    seconds: list[float] = []
    resident: list[int] = []
    end = time.monotonic() + SECONDS

    async def user(session: aiohttp.ClientSession, number: int) -> None:
        draw = random.Random(number)
        async with session.post(f"{url}/pictures", data=photo(), params={"name": f"{number}.png"}) as answer:
            assert answer.status == 201, await answer.text()
            ident = (await answer.json())["id"]
        level = draw.choice((11, 12, 14))
        side = 2 << (level - 9)
        x, y = draw.randrange(side), draw.randrange(side)
        while time.monotonic() < end:
            x, y = ((each + draw.choice((-1, 0, 1))) % side for each in (x, y))
            started = time.perf_counter()
            async with session.get(f"{url}/pictures/{ident}/tiles/{level}/{x}_{y}") as answer:
                data = await answer.read()
                assert answer.status == 200, data
            seconds.append(time.perf_counter() - started)
            resident.append(server.memory_info().rss)
            await asyncio.sleep(draw.uniform(0.5, 1.5))

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await asyncio.gather(*(user(session, number) for number in range(USERS)))
    return len(seconds), seconds, resident


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
