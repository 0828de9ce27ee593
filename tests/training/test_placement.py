"""Every stage's step, sampling and decoding on a device that is not the CPU: see second_device.py. Between two reports
no step waits for it. Each in a process of its own, for a second device cannot be taken away again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from direct_settings import WITH_ENCODER
from stage_inputs import Shop

PERCEPTUAL = ["perceptual_weight=0.1", "lpips_weights=random"]
CASES = {
    "autoencoder": [*PERCEPTUAL, "adversarial_weight=0.1", "adversarial_start=0"],
    "autoencoder, implicit decoder": ["decoder=implicit"],
    "autoencoder, vq": ["model.autoencoder.kind=vq", "model.autoencoder.num_embeddings=16"],
    "decoder": [*PERCEPTUAL, "min_size=16"],
    "decoder, light": ["model.decoder.kind=light"],
    "decoder, direct": [*(word.removeprefix("decoder.") for word in WITH_ENCODER), "conditions=drawn"],
    "denoiser": ["sample_latents=true"],
    "align": ["context_cells=1", "crop_cells=4"],
    "distill": ["model.task=sr", "model.lr_size=8", "teacher_steps=3"],
    "use": [],
    "planted": [],
}
"""Name of a case → settings of its stage."""
QUICK = ("decoder, light", "denoiser", "planted", "use")


@pytest.mark.parametrize(
    "case",
    [case if case in QUICK else pytest.param(case, marks=[pytest.mark.slow, pytest.mark.more]) for case in CASES],
)
def test_nothing_is_made_on_another_device_and_no_step_waits(
    shop: Shop, sr_shop: Shop, tmp_path: Path, case: str
) -> None:
    shop = sr_shop if case == "distill" else shop
    program = Path(__file__).with_name("on_second_device.py")
    places = [shop.data, shop.pixels, shop.bundle, str(tmp_path)]
    command = [sys.executable, str(program), case.split(",")[0], *places, *CASES[case]]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert run.stdout.strip().endswith("all in place")
