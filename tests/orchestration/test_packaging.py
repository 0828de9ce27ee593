"""sdist and wheel: each holds all that runs, and what is installed from them works in an environment without this
checkout and with nothing but what the distribution requires."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from distributions import ROOT, closure, declared, tops
from PIL import Image

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True
    )


def build(kind: str, source: Path, to: Path) -> Path:
    done = run(sys.executable, "-c", BUILD, f"build_{kind}", to, cwd=source)
    assert done.returncode == 0, done.stderr
    (made,) = to.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return made


def checkout(to: Path) -> Path:
    """The files of the working tree that git knows or would add, without what builds leave in it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes((ROOT / name).read_bytes())
    return to


def environment_with(wheel: Path, to: Path) -> Path:
    """A virtual environment with the wheel and, as links, the installed packages that it requires: no others."""
    venv.create(to, with_pip=False, symlinks=True)
    (site,) = to.glob("lib/python*/site-packages")
    for distribution in closure(declared()).values():
        for name in set(tops(distribution)):
            if not (site / name).exists():
                (site / name).symlink_to(distribution.locate_file(name))
    pip = [sys.executable, "-m", "pip", "--python", to / "bin/python", "--disable-pip-version-check"]
    for command in (["install", "-q", "--no-deps", "--no-index", wheel], ["check"]):
        done = run(*pip, *command, cwd=to)
        assert done.returncode == 0, done.stdout + done.stderr
    return to / "bin"


@pytest.mark.slow
def test_what_is_built_runs_where_nothing_else_is_installed(tmp_path):
    source = checkout(tmp_path / "checkout")
    sdist = build("sdist", source, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = build("wheel", unpacked, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    rooms = ("pipeline", "preprocess", "training", "orchestration")
    expected = {p.relative_to(source).as_posix() for room in rooms for p in (source / room).rglob("*") if p.is_file()}
    assert expected - packed == set()
    assert {name.split("/")[0] for name in packed} == {*rooms, f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}

    binaries = environment_with(wheel, tmp_path / "environment")
    Image.effect_noise((20, 16), 60).convert("RGB").save(tmp_path / "small.png")
    done = run(binaries / "latentzoom", "upscale", "small.png", "large.png", "--scale", "2.5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "large.png") as large:
        assert large.size == (50, 40)
    said = run(binaries / "latentzoom", "serve", cwd=tmp_path)
    assert said.returncode == 2 and "pip install 'latentzoom[serve]'" in said.stderr and said.stderr.count("\n") == 1
    program = "import pipeline, sys; print(pipeline.__file__, 'torch' in sys.modules)"
    where = run(binaries / "python", "-c", program, cwd=tmp_path)
    assert where.stdout.split()[0].startswith(str(tmp_path / "environment")) and where.stdout.split()[1] == "False"
