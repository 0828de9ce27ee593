"""Every stage's step, sampling and decoding on a device that is not the CPU: see second_device.py. In a process of its
own, for a second device cannot be taken away again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_shop import Shop

CASES = {
    "autoencoder": ["perceptual_weight=0.1", "lpips_weights=random", "adversarial_weight=0.1", "adversarial_start=0"],
    "joint": [],
    "decoder": ["perceptual_weight=0.1", "lpips_weights=random"],
    "denoiser": ["sample_latents=true"],
    "align": [],
    "direct": [],
    "planted": [],
}
"""Name of a case → settings of its stage."""


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_made_on_another_device(shop: Shop, tmp_path: Path, case: str) -> None:
    program = Path(__file__).with_name("on_second_device.py")
    command = [sys.executable, str(program), case, shop.data, shop.pixels, shop.bundle, str(tmp_path), *CASES[case]]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert run.stdout.strip().endswith("all in place")
