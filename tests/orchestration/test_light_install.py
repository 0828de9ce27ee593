"""A plain `pip install latentzoom` generates and upscales; every other command says which extra it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_commands import answers
from PIL import Image
from tiny_bundle import make_bundle

from orchestration.cli import VERBS

TESTS = Path(__file__).resolve().parent
HIDE = """
from distributions import declared, hide_all_but
hide_all_but(declared())
"""


def plain_answers(lines: list[list[str]], folder: Path) -> list[tuple[int, str, str]]:
    """(exit status, what was printed, what was said) of each command line, with the plain installation's packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parents[1]), str(TESTS)])}
    found = answers(lines, before=HIDE, folder=folder, environment=environment)
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
