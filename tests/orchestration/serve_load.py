"""`latentzoom serve` under load: fifty users who pan at once, each in a photograph of his own.

    python tests/orchestration/serve_load.py [--users 50] [--seconds 60] [--memory 2] [--minutes 0]

Three rounds of `--seconds`, each told apart: *cold*, from the first picture given on, features being made where each
user goes; *warm*, the same walks one level deeper, so that the features of the places are in memory and no tile was
drawn before; *again*, the tiles of the second round once more. Then, with `--minutes`, cold and warm walks in other
pictures for so long, the server's resident memory each minute beside what it reports. The server has every core, and
shares them with this program.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import skimage.data
from PIL import Image

REST_S = 8.0
"""What was freed is given back within five seconds."""


def start(folder: Path, *words: str) -> tuple[subprocess.Popen[str], str]:
    """The command itself → its process and its address."""
    command = [sys.executable, "-m", "orchestration.cli", "serve", "--port", "0", "--keep", str(folder), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line.startswith("http://127.0.0.1:"), line
    return process, line.rstrip("/")


def photo(number: int = 0) -> bytes:
    """512 x 512 pixels, another picture for each number."""
    stream = io.BytesIO()
    Image.fromarray(np.roll(skimage.data.astronaut(), 7 * number, axis=1)).save(stream, "PNG")
    return stream.getvalue()


@dataclass
class Round:
    """seconds: of every tile. cpu_seconds: of the server. features: blocks of features made."""

    seconds: list[float] = field(default_factory=list)
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    features: float = 0.0

    def __str__(self) -> str:
        median, high, most = (np.percentile(self.seconds, part) * 1e3 for part in (50, 95, 100))
        num = len(self.seconds)
        return (
            f"{num / self.wall_seconds:5.1f} tiles/s, median {median:5.0f} ms, 95th percentile {high:5.0f} ms, "
            f"most {most:5.0f} ms; {self.cpu_seconds / num * 1e3:5.1f} ms of processor time a tile, "
            f"{self.features:.0f} blocks of features made"
        )


class User:
    """Goes on to a tile beside the last, and looks for half a second to one and a half."""

    def __init__(self, number: int, ident: str) -> None:
        self.ident, self.draw = ident, random.Random(number)
        self.level = self.draw.choice((11, 12, 14))  # 4, 8 and 32 times as large
        side = 2 << (self.level - 9)
        x, y = self.draw.randrange(side), self.draw.randrange(side)
        self.path = [(x, y)]  # no tile twice: a browser keeps what it has
        for _ in range(400):
            x, y = (min(max(each + self.draw.choice((-1, 0, 1)), 0), side - 1) for each in (x, y))
            if (x, y) not in self.path:
                self.path.append((x, y))

    async def go(self, session: aiohttp.ClientSession, url: str, end: float, deeper: int, taken: Round) -> int:
        """Until `end` → tiles seen."""
        await asyncio.sleep(self.draw.uniform(0, 1))
        num = 0
        for x, y in self.path:
            if time.monotonic() > end:
                break
            inside = [self.draw.randrange(1 << deeper) for _ in "xy"] if deeper else [0, 0]
            x, y = (x << deeper) + inside[0], (y << deeper) + inside[1]
            started = time.perf_counter()
            path = f"{url}/pictures/{self.ident}/tiles/{self.level + deeper}/{x}_{y}"
            async with session.get(path) as answer:
                data = await answer.read()
                assert answer.status == 200, data
            taken.seconds.append(time.perf_counter() - started)
            num += 1
            await asyncio.sleep(self.draw.uniform(0.5, 1.5))
        return num


async def metric(session: aiohttp.ClientSession, url: str, name: str) -> float:
    async with session.get(f"{url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"latentzoom_serve_{name} "))


async def users_of(session: aiohttp.ClientSession, url: str, num: int, first: int = 0) -> list[User]:
    async def one(number: int) -> User:
        async with session.post(f"{url}/pictures", data=photo(number), params={"name": f"{number}.png"}) as answer:
            assert answer.status == 201, await answer.text()
            return User(number, (await answer.json())["id"])

    return list(await asyncio.gather(*(one(first + number) for number in range(num))))


async def one_round(
    session: aiohttp.ClientSession, url: str, server: psutil.Process, users: list[User], seconds: float, deeper: int
) -> Round:
    """All users at once, from the beginning of their paths; who saw fewer tiles than before ends there."""
    taken = Round()
    cpu, before = sum(server.cpu_times()[:2]), await metric(session, url, "features_total")
    started = time.monotonic()
    seen = await asyncio.gather(*(user.go(session, url, started + seconds, deeper, taken) for user in users))
    for user, num in zip(users, seen):
        user.path = user.path[:num]
    taken.wall_seconds = time.monotonic() - started
    taken.cpu_seconds = sum(server.cpu_times()[:2]) - cpu
    taken.features = await metric(session, url, "features_total") - before
    return taken


def session_of() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None))


async def rounds(url: str, server: psutil.Process, num_users: int, seconds: float) -> dict[str, Round]:
    async with session_of() as session:
        users = await users_of(session, url, num_users)
        made = {"cold": await one_round(session, url, server, users, seconds, 0)}
        for user in users:
            user.draw = random.Random(user.ident)
        states = [user.draw.getstate() for user in users]
        made["warm"] = await one_round(session, url, server, users, seconds, 1)
        for user, state in zip(users, states):
            user.draw.setstate(state)
        made["again"] = await one_round(session, url, server, users, seconds, 1)
        return made


async def watch(url: str, server: psutil.Process, num_users: int, minutes: float, every: float = 60.0) -> list[int]:
    """Walks in new pictures, `every` seconds each → resident bytes after each, when nobody asks and what was freed has
    been given back; printed beside the most there was meanwhile, and what is reported."""
    resident = []
    async with session_of() as session:
        for minute in range(round(minutes * 60 / every)):
            users = await users_of(session, url, num_users, first=1000 * (minute + 1))
            during = asyncio.create_task(residents(server, 2 * every))
            taken = await one_round(session, url, server, users, every, minute % 2)
            during.cancel()
            most = max(await during)
            resident.append(min(await residents(server, REST_S)))
            reported = await metric(session, url, "memory_bytes")
            print(f"{(minute + 1) * every / 60:4.1f} min: resident {resident[-1] >> 20} MiB, at most {most >> 20} MiB "
                  f"under way, reported {int(reported) >> 20} MiB; {taken}", flush=True)  # fmt: skip
    return resident


async def residents(server: psutil.Process, seconds: float) -> list[int]:
    """Resident bytes four times a second, for so long or until it is cancelled."""
    found = []
    with contextlib.suppress(asyncio.CancelledError):
        for _ in range(round(4 * seconds)):
            found.append(server.memory_info().rss)
            await asyncio.sleep(0.25)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--memory", default="2")
    parser.add_argument("--minutes", type=float, default=0.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process, url = start(Path(folder), "--memory", given.memory)
        server = psutil.Process(process.pid)
        try:
            print(f"at the start: resident {server.memory_info().rss >> 20} MiB")
            for name, taken in asyncio.run(rounds(url, server, given.users, given.seconds)).items():
                print(f"{name:6} {taken}")
            print(f"resident {server.memory_info().rss >> 20} MiB", flush=True)
            asyncio.run(watch(url, server, given.users, given.minutes))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


if __name__ == "__main__":
    main()
