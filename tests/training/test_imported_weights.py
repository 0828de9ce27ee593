"""A denoiser that was trained elsewhere keeps the scale and the schedule of its weights, and its output, through the
stages that do not train it anew."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_inputs import SCALE_RATIO, Shop
from torch import Tensor

from pipeline import storage
from pipeline.bundle import load_bundle, save_bundle
from pipeline.config import ScheduleConfig
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from preprocess.shards.manifest import load_manifest
from training.config import override
from training.presets import debug
from training.run import TrainResult, train

ELSEWHERE = ScheduleConfig(beta_start=1e-4, beta_end=0.015, prediction="v")
SAME = ["model.schedule.beta_start=1e-4", "model.schedule.beta_end=0.015", "model.schedule.prediction=v"]


@pytest.fixture(scope="module")
def imported(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundle of another preset and other data: neither its scale nor its schedule is what ours would make."""
    bundle = load_bundle(shop.bundle)
    bundle.config = dataclasses.replace(bundle.config, schedule=ELSEWHERE)
    assert bundle.config.scale_factor == SCALE_RATIO * load_manifest(shop.data).scale_factor
    url = str(tmp_path_factory.mktemp("imported") / "bundle")
    save_bundle(url, bundle)
    return url


def run(stage: str, shop: Shop, bundle: str, run_dir: Path, *settings: str, **options: Any) -> TrainResult:
    preset = override(debug(), list(settings))
    return train(stage, preset, data=shop.data, bundle=bundle, run_dir=str(run_dir), device="cpu", **options)


def samples(bundle: str) -> tuple[Tensor, Tensor]:
    """Latents and pictures of a bundle."""
    model = LatentZoom.load(bundle)
    latent = model.sample_latents(num=2, seed=3, num_steps=5, eta=1.0)
    return latent, model.decode(latent, (19, 40))


@pytest.mark.parametrize("settings", [[], ["align.precision=bf16", "align.channels_last=true", "align.grid_every=1"]])
def test_align_of_no_steps_changes_nothing(shop: Shop, imported: str, tmp_path: Path, settings: list[str]) -> None:
    result = run("align", shop, imported, tmp_path / "run", *SAME, "align.steps=0", *settings)
    assert result.steps == 0
    for before, after in zip(samples(imported), samples(result.bundle)):
        assert torch.equal(before, after)
    assert run("align", shop, imported, tmp_path / "run", *SAME, *settings, "align.steps=1").steps == 1  # it goes on


def test_the_decoder_stage_carries_the_denoiser_over_as_it_was(shop: Shop, imported: str, tmp_path: Path) -> None:
    """The preset's own schedule is another one: this stage does not use it."""
    trained = load_bundle(run("decoder", shop, imported, tmp_path / "decoder", "decoder.steps=2").bundle)
    before = load_bundle(imported)
    assert (trained.config.scale_factor, trained.config.schedule) == (before.config.scale_factor, ELSEWHERE)
    latents = samples(imported)[0], samples(str(tmp_path / "decoder/bundle"))[0]
    assert torch.equal(*latents)
    assert before.decoder is not None and trained.decoder is not None
    weights = [bundle.decoder.head.out.weight for bundle in (before, trained) if bundle.decoder is not None]
    assert not torch.equal(*weights)


def test_align_trains_with_the_denoiser_s_scale(shop: Shop, imported: str, tmp_path: Path) -> None:
    """Import, `decoder`, `align`: what the denoiser is shown is scaled as its weights know it."""
    import training.stages.align as loop

    decoder = run("decoder", shop, imported, tmp_path / "decoder", "decoder.steps=1", *SAME)
    seen: list[Tensor] = []
    original = loop.scaled_latents

    def watching(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        seen.append(original(*arguments)[0])
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "scaled_latents", watching)
        settings = ["align.steps=2", "align.sample_latents=true"]
        align = run("align", shop, decoder.bundle, tmp_path / "align", *SAME, *settings)
    after = load_bundle(align.bundle)
    assert after.config.scale_factor == load_bundle(imported).config.scale_factor
    assert float(torch.cat(seen).std()) == pytest.approx(SCALE_RATIO, rel=0.1)  # the data's own scale would give 1


def test_a_denoiser_trained_anew_has_the_data_s_scale_and_the_preset_s_schedule(
    shop: Shop, imported: str, tmp_path: Path
) -> None:
    config = load_bundle(run("denoiser", shop, imported, tmp_path, "denoiser.steps=1").bundle).config
    assert config.scale_factor == load_manifest(shop.data).scale_factor and config.schedule == debug().model.schedule


def test_settings_without_effect_are_the_bundle_s(shop: Shop, imported: str, tmp_path: Path) -> None:
    """A checkpoint's file may name levels in another order, and levels that do not exist: the network is the same, and
    so is the autoencoder that the data were encoded by."""
    settings = ["model.autoencoder.attention_levels=[7]", "model.denoiser.attention_factors=[16,2]"]
    result = run("align", shop, imported, tmp_path, *SAME, *settings, "align.steps=1")
    before, after = load_bundle(imported), load_bundle(result.bundle)
    assert after.autoencoder.identity() == before.autoencoder.identity()
    assert after.config == before.config


@pytest.mark.parametrize(
    ("stage", "settings", "named"),
    [
        ("align", [], ["schedule.beta_start = 0.0001 in the bundle and 0.0015 in the preset", "schedule.prediction"]),
        ("align", [*SAME, "model.denoiser.num_res_blocks=2"], ["denoiser.num_res_blocks = 1 in the bundle and 2"]),
        ("align", [*SAME, "model.decoder.mlp_width=20"], ["bundle's decoder has other settings", "decoder.mlp_width"]),
        (
            "decoder",
            ["model.autoencoder.kind=vq", "model.denoiser.num_heads=2"],
            ["autoencoder.kind = 'kl' in the bundle and 'vq'", "denoiser.num_heads"],
        ),
        ("decoder", ["model.task=sr", "model.lr_size=8"], ["task = 'generation' in the bundle and 'sr' in the preset"]),
    ],
)
def test_a_preset_and_a_bundle_that_disagree(
    stage: str, settings: list[str], named: list[str], shop: Shop, imported: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        run(stage, shop, imported, tmp_path / "run", *settings)
    assert all(words in str(error.value) for words in named) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def no_steps(data: str, bundle: str, run_dir: str, settings: str) -> None:
    """What the test below starts: a process group of one, and a stage of no steps in it for each list of settings."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    for number, names in enumerate(json.loads(settings)):
        preset = override(debug(), [*SAME, "align.steps=0", *names])
        folder = f"{run_dir}/{number}"
        train("align", preset, data=data, bundle=bundle, run_dir=folder, use_deepspeed=True, device="cpu")


@pytest.mark.slow
def test_align_of_no_steps_changes_nothing_under_deepspeed(shop: Shop, imported: str, tmp_path: Path) -> None:
    """DeepSpeed rounds weights to half precision before it copies them as its float32 masters."""
    kinds = [[f"align.zero_stage={zero}", f"align.precision={p}"] for zero in range(4) for p in ("bf16", "fp32")]
    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, shop.data, imported, str(tmp_path), json.dumps(kinds)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **here})
    assert done.returncode == 0, done.stderr
    before = storage.sha256_file(f"{imported}/denoiser.safetensors")
    after = [storage.sha256_file(f"{tmp_path}/{i}/bundle/denoiser.safetensors") for i in range(len(kinds))]
    assert [kind for kind, digest in zip(kinds, after) if digest != before] == []
    for one, other in zip(samples(imported), samples(f"{tmp_path}/0/bundle")):
        assert torch.equal(one, other)


if __name__ == "__main__":
    no_steps(*sys.argv[1:])
