"""The documentation's marked commands, run as written at small size; the sizing guide's tables, computed again."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_docs import DOCS, RUN_ORDER, commands

from orchestration import cli
from orchestration.registry import versions as registry
from orchestration.registry.promotion import Rule


@pytest.mark.slow
def test_the_commands_marked_as_run_work_as_written(tmp_path, monkeypatch, cache):
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for page in RUN_ORDER:
        if page == "verbs/rollback":
            promote_a_second_version()
        for command in commands(DOCS / f"{page}.md"):
            if command.mark == "console run":
                assert cli.main(command.words) == 0, command.line
    champion = registry.get_version("tiny", registry.CHAMPION)
    assert champion is not None and champion.version == "1"  # given back
    with Image.open(next(Path("made-square").glob("*.png"))) as made:
        assert made.size == (64, 64)
    with Image.open("enlarged.png") as enlarged:
        assert enlarged.size == (100, 100)


def lay_out(root: Path) -> None:
    """What the pages assume: photographs with a held-out folder, and somebody's autoencoder."""
    from diffusers import AutoencoderKL

    for number in range(40):
        coarse = np.random.default_rng(number).integers(0, 255, (5, 5, 3), dtype=np.uint8)
        folder = root / "photos" / ("val" if number < 8 else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((40, 40), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=3, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(root / "vae")  # fmt: skip


def promote_a_second_version() -> None:
    """Version 2 of `tiny`, by a report that is better than the champion's, becomes the champion."""
    report = json.loads(Path("evaluation/report.json").read_text())
    better = [{**figure, "value": -9.0, "low": -9.1, "high": -8.9} for figure in report["figures"]]
    registry.register("runs/align/bundle", "tiny", report={**report, "figures": better})
    rule = Rule(guard="none")
    assert registry.promote("tiny", rule=rule).promote
    champion = registry.get_version("tiny", registry.CHAMPION)
    assert champion is not None and champion.version == "2"


@pytest.mark.slow
def test_the_tables_of_the_sizing_guide_are_what_plan_prints(capsys):
    text = (DOCS / "sizing.md").read_text()
    pairs = re.findall(r"```console cluster\n(latentzoom plan[^\n]*)\n```\n```text plan\n(.*?)\n```", text, re.DOTALL)
    assert len(pairs) == 4
    for line, table in pairs:
        assert cli.main(shlex.split(line)[1:]) == 0
        assert capsys.readouterr().out.strip() == table
