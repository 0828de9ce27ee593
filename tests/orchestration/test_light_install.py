"""A plain `pip install latentzoom` generates and upscales; every other command says which extra it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_commands import answers
from PIL import Image
from small_pictures import make_pictures
from tiny_bundle import make_bundle

from orchestration.cli import VERBS

TESTS = Path(__file__).resolve().parent
HIDE = """
from distributions import declared, hide_all_but, included
hide_all_but(requirement for extra in {{"", *included({extra!r})}} for requirement in declared(extra))
"""


def plain_answers(lines: list[list[str]], folder: Path, extra: str = "") -> list[tuple[int, str, str]]:
    """(exit status, what was printed, what was said) of each command line, with the packages of the plain installation
    and of an extra."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parents[1]), str(TESTS)])}
    found = answers(lines, before=HIDE.format(extra=extra), folder=folder, environment=environment)
    return [(status or 0, printed, said) for status, printed, said, _ in found]


def test_the_plain_installation_generates_and_upscales(tmp_path):
    Image.effect_noise((20, 16), 60).convert("RGB").save(tmp_path / "small.png")
    make_bundle(tmp_path / "model")
    made = plain_answers(
        [
            ["upscale", "small.png", "large.png", "--scale", "2.5"],
            ["upscale", "small.png", "large.tif", "--scale", "2"],
            ["generate", "--model", "model", "--size", "24x40", "--steps", "2", "--out", "new.png"],
            ["--version"],
            *[[verb, "--help"] for verb in VERBS],
        ],
        tmp_path,
    )
    for line in made:
        assert line[0] == 0, line
    with Image.open(tmp_path / "large.png") as large, Image.open(tmp_path / "new.png") as new:
        assert (large.size, new.size) == ((50, 40), (40, 24))


CLUSTER, TRAIN = "latentzoom[cluster]", "latentzoom[train]"


def test_what_lacks_an_extra_says_which(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.effect_noise((40, 40), 60).convert("RGB").save(tmp_path / f"photos/{number}.png")
    make_bundle(tmp_path / "model")
    asked = {
        "preprocess folder photos shards --size 32": TRAIN,
        "train decoder --preset debug --data shards --run-dir run": TRAIN,
        "evaluate --model model --data photos --task generation --sizes 32": TRAIN,
        "register model faces --tracking-uri http://127.0.0.1:9": TRAIN,
        "promote faces --tracking-uri http://127.0.0.1:9": TRAIN,
        "lineage models:/faces@champion --tracking-uri http://127.0.0.1:9": TRAIN,
        "upscale --model models:/faces@champion photos/0.png a.png --scale 2 --tracking-uri http://127.0.0.1:9": TRAIN,
        "serve": "latentzoom[serve]",
        "submit upscale photos/0.png large.png --scale 2 --address http://127.0.0.1:8265": CLUSTER,
        "jobs --address http://127.0.0.1:8265": CLUSTER,
        "stop raysubmit_1 --address http://127.0.0.1:8265": CLUSTER,
        "upscale s3://bucket/a.png large.png --scale 2": "latentzoom[remote]",
        "upscale https://example.com/a.png large.png --scale 2": "latentzoom[remote]",
    }
    wrong = [
        (line, answer)
        for line, answer in zip(asked, plain_answers([line.split() for line in asked], tmp_path))
        if answer[0] != 2 or f"pip install '{asked[line]}'" not in answer[2].splitlines()[-1] or "Trace" in answer[2]
    ]
    assert wrong == []


EVALUATED = "--task reconstruction --sizes 32 --num 2 --device cpu --out report"
JOB = "--preset debug --source folder --source-url photos --preprocess val_fraction=0.4 --local --device cpu"
ENOUGH = [
    ("train", "preprocess folder photos shards --size 32", 0),
    ("train", "train autoencoder --preset debug --data shards --run-dir run --local --dry-run", 0),
    ("train", f"evaluate --model model --data photos {EVALUATED}", 0),
    ("cluster", "jobs --address http://127.0.0.1:9", 2),
]
"""An extra, a command line that needs no package of another one, its exit status: 2 where the network refuses it."""
ENOUGH_IN_LONG = [
    ("remote", "upscale http://127.0.0.1:9/a.png large.png --scale 2", 2),
    ("serve", "serve --host 192.0.2.1 --model model --device cpu", 2),
    ("train", f"pipeline {JOB} --workdir work --until pixels", 0),
    ("export", "export model --to onnx --out onnx", 0),
    ("export", "import onnx onnx --out back", 0),
]
REFUSED = ("cannot reach", "cannot listen", "no Ray head answers")


@pytest.mark.parametrize("asked", [ENOUGH, pytest.param(ENOUGH_IN_LONG, marks=pytest.mark.slow)])
def test_an_extra_is_enough_for_what_needs_it(tmp_path, asked):
    make_pictures(tmp_path / "photos", 3)
    make_bundle(tmp_path / "model")
    for extra in dict.fromkeys(extra for extra, *_ in asked):
        lines = [(line, status) for name, line, status in asked if name == extra]
        for (line, status), answer in zip(lines, plain_answers([line.split() for line, _ in lines], tmp_path, extra)):
            assert answer[0] == status, (extra, line, answer)
            assert not status or any(words in answer[2] for words in REFUSED), (extra, line, answer)


@pytest.mark.parametrize("name", ["view", "load"])
def test_python_says_it_too(tmp_path, name):
    program = """
import sys
from distributions import declared, hide_all_but
hide_all_but(declared())
from pipeline import LatentZoom
from pipeline.errors import UserError
model = LatentZoom.starter()
try:
    model.view("x.png") if sys.argv[1] == "view" else LatentZoom.load("s3://bucket/model")
except UserError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parents[1]), str(TESTS)])}
    done = subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True, env=environment)
    assert "pip install 'latentzoom[" in done.stdout, done.stdout + done.stderr
