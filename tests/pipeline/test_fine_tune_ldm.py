"""From a latent-diffusion checkpoint to an aligned, registered model: D_phi's beginning, and the recipe's commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_import_ldm import UNET, first_stage, stage_params, whole_checkpoint, whole_params, write

from orchestration import cli
from orchestration.registry import versions as registry
from pipeline.bundle import load_bundle
from pipeline.config import DecoderConfig
from pipeline.decoder import ImplicitDecoder
from pipeline.importing.latent_diffusion import import_checkpoint
from training.starts import trunk_from

AS_IMPORTED = {
    "autoencoder.latent_channels": 4,
    "autoencoder.base_width": 32,
    "autoencoder.width_mult": [1, 2, 2],
    "autoencoder.num_res_blocks": 2,
    "autoencoder.attention_levels": [1],
    "autoencoder.mid_attention": "true",
    "autoencoder.norm_groups": 32,
    "decoder.base_width": 32,
    "decoder.width_mult": [1, 2, 2],
    "decoder.num_res_blocks": 2,
    "decoder.attention_levels": [1],
    "decoder.mid_attention": "true",
    "decoder.norm_groups": 32,
    "denoiser.base_width": UNET["model_channels"],
    "denoiser.width_mult": UNET["channel_mult"],
    "denoiser.num_res_blocks": UNET["num_res_blocks"],
    "denoiser.attention_factors": UNET["attention_resolutions"],
    "denoiser.head_channels": UNET["num_head_channels"],
    "denoiser.norm_groups": 32,
}
"""Settings of the preset `debug` that make it the small checkpoint's model."""


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_d_phi_begins_as_the_published_decoder_without_its_up_sampling(kind: str, tmp_path: Path) -> None:
    """The independent network with its up-sampling layers removed has the same features."""
    reference = first_stage(kind)
    autoencoder = import_checkpoint(*write(tmp_path, stage_params(kind), reference.state_dict()), "ldm").autoencoder
    levels = autoencoder.config.attention_levels
    decoder = ImplicitDecoder(DecoderConfig(base_width=32, width_mult=(1, 2, 2), attention_levels=levels), 4).eval()
    trunk_from(decoder, autoencoder)
    for level in reference.decoder.up:
        if hasattr(level, "upsample"):
            del level.upsample
    latent = torch.randn(2, 4, 6, 9)
    with torch.no_grad():
        expected = reference.decoder.features(reference.post_quant_conv(latent))
        assert torch.allclose(decoder.features(latent), expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
def test_the_recipe_from_a_checkpoint_to_a_registered_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("LATENTZOOM_CACHE", str(tmp_path / "cache"))
    for number in range(12):
        coarse = np.random.default_rng(number).integers(0, 255, (5, 5, 3), dtype=np.uint8)
        folder = tmp_path / "photos" / ("val" if number < 4 else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((40, 40), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    checkpoint, config = write(tmp_path, whole_params(), whole_checkpoint())

    assert cli.main(["import", "ldm", checkpoint, "--model-config", config, "--out", "ldm", "--name", "rooms"]) == 0
    chain = ["pipeline", "--preset", "debug", "--source", "folder", "--source-url", "photos", "--workdir", "work"]
    chain += ["--name", "rooms", "--local", "--init", "ldm", "--stages", "decoder,align"]
    for name, value in AS_IMPORTED.items():
        chain += ["--set", f"model.{name}={value}"]
    chain += ["--set", "decoder.steps=2", "--set", "align.steps=2", "--set", "align.lr=1e-9"]
    chain += ["--preprocess", "val_folder=val", "--preprocess", "encode_threads=1"]
    chain += ["--evaluate", "num=4", "--evaluate", "num_steps=2", "--evaluate", "sizes=[16]"]
    assert cli.main(chain) == 0
    store = f"sqlite:///{tmp_path / 'work/mlflow.db'}"
    assert cli.main(["lineage", "models:/rooms@champion", "--tracking-uri", store]) == 0
    draw = ["generate", "--model", "models:/rooms@champion", "--tracking-uri", store, "--size", "24x40", "--steps", "2"]
    assert cli.main([*draw, "--out", "made"]) == 0
    assert len(list((tmp_path / "made").glob("*.png"))) == 1

    imported = load_bundle("ldm")
    champion = load_bundle(str(registry.resolve("models:/rooms@champion", tracking_uri=store)))
    assert champion.meta["imported_from"] == imported.meta["imported_from"]
    assert champion.meta["stages"].keys() == {"decoder", "align"}
    assert champion.autoencoder.identity() == imported.autoencoder.identity()
    assert champion.denoiser is not None and imported.denoiser is not None
    for name, tensor in imported.denoiser.state_dict().items():  # aligned from the published weights
        assert torch.allclose(champion.denoiser.state_dict()[name], tensor, atol=1e-6), name
