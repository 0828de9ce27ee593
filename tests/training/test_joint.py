"""The joint first stage: encoder and implicit decoder by one loss, and the chain that follows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from direct_settings import with_conditions
from PIL import Image
from stage_inputs import Shop
from test_direct_training import losses

from pipeline import storage
from pipeline.bundle import load_bundle
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from preprocess.shards.loader import ShardLoader
from training.config import override
from training.estimate import dry_run
from training.noise import Draws
from training.presets import debug
from training.reconstruction import joint_first_stage
from training.run import TrainResult, train
from training.targets import draw_target

JOINT = ["model.task=sr", "model.lr_size=8", "autoencoder.decoder=implicit", "autoencoder.crop=14"]


def run(stage: str, data: str, run_dir: Path, *settings: str, bundle: str | None = None) -> TrainResult:
    preset = override(debug(), [*JOINT, *settings])
    return train(stage, preset, data=data, run_dir=str(run_dir), bundle=bundle, device="cpu")


def files(result: TrainResult) -> list[str]:
    return [storage.sha256_file(f"{result.bundle}/{part}.safetensors") for part in ("autoencoder", "decoder")]


def expected_terms(data: str, kl_weight: float) -> tuple[float, float]:
    """L1 and loss of the first step by hand: the same network and first batch, moments → a sample of the posterior →
    the picture at the drawn size, whole → the drawn window of it against the resized photograph's."""
    preset = override(debug(), JOINT)
    torch.manual_seed(preset.autoencoder.seed)
    network = joint_first_stage(preset.model).eval()
    target = draw_target(preset.autoencoder, preset.model, 1)
    with ShardLoader(data, batch_size=4, latents=False) as loader, torch.no_grad():
        batch = next(iter(loader))
        assert batch.pixels is not None
        image = batch.pixels.double() / 127.5 - 1
        autoencoder, decoder = network.autoencoder.double(), network.decoder.double()
        mean, log_variance = autoencoder.quant_conv(autoencoder.encoder(image)).chunk(2, dim=1)
        noise = Draws(range(4), "cpu", 0, "posterior", 1).normal((3, 8, 8))
        latent = mean + log_variance.exp().sqrt() * noise
        y0, x0, y1, x1 = target.window
        made = decoder(latent, target.size)[:, :, y0:y1, x0:x1]
        truth = torch.nn.functional.interpolate(image, target.size, mode="bicubic", antialias=True)[:, :, y0:y1, x0:x1]
        l1 = float((made - truth).abs().mean())
        kl = float(0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean())
    return l1, l1 + kl_weight / (3 * 32 * 32) * kl  # LDM's loss sums errors over the values of an image


@pytest.mark.parametrize("kl_weight", [0.0, 3.0])
def test_the_loss_is_l1_of_the_rendered_posterior_sample(shop: Shop, tmp_path: Path, kl_weight: float) -> None:
    settings = ["autoencoder.steps=1", f"autoencoder.kl_weight={kl_weight}"]
    result = run("autoencoder", shop.pixels, tmp_path / "run", *settings)
    l1, loss = expected_terms(shop.pixels, kl_weight)
    assert result.metrics["l1"] == pytest.approx(l1, rel=1e-4)
    assert result.last_loss == pytest.approx(loss, rel=1e-4) and (loss == l1 or loss > 1.01 * l1)


def test_encoder_and_decoder_learn_and_there_is_no_other_decoder(shop: Shop, tmp_path: Path) -> None:
    settings = ["autoencoder.steps=40", "autoencoder.lr=5e-3", "autoencoder.grid_every=40", "autoencoder.log_every=10"]
    result = run("autoencoder", shop.pixels, tmp_path / "run", *settings)
    assert result.last_loss < 0.95 * result.first_loss and len(list((tmp_path / "run/grids").iterdir())) == 2
    bundle = load_bundle(result.bundle)
    assert not bundle.autoencoder.has_decoder and bundle.decoder is not None and bundle.denoiser is None
    assert not [name for name in bundle.autoencoder.state_dict() if name.startswith(("decoder.", "post_quant_conv."))]
    with pytest.raises(UserError, match="without its convolutional decoder"):
        bundle.autoencoder.decode(torch.zeros(1, 3, 8, 8))
    torch.manual_seed(0)
    start = joint_first_stage(override(debug(), JOINT).model)
    for trained, before in ((bundle.autoencoder, start.autoencoder), (bundle.decoder, start.decoder)):
        same = [n for n, p in trained.named_parameters() if torch.equal(p, before.get_parameter(n))]
        assert not [name for name in same if name.endswith("weight") and "norm" not in name]


def test_accumulated_gradients_give_the_same_training(shop: Shop, tmp_path: Path) -> None:
    for micro in (0, 1):
        run("autoencoder", shop.pixels, tmp_path / str(micro), f"autoencoder.micro_batch={micro}")
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "0"), rel=1e-4)


def test_a_run_that_fails_between_checkpoints_ends_like_an_uninterrupted_one(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import training.stages.joint as loop

    settings = [f"autoencoder.{s}" for s in ("steps=9", "checkpoint_every=3", "schedule=cosine", "min_size=10")]
    whole = run("autoencoder", shop.pixels, tmp_path / "whole", *settings)
    calls, original = [], loop.per_sample

    def failing(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, "per_sample", failing)
    with pytest.raises(KeyboardInterrupt):
        run("autoencoder", shop.pixels, tmp_path / "cut", *settings)
    again = run("autoencoder", shop.pixels, tmp_path / "cut", *settings)
    assert again.resumed_from == 6 and again.sample_order == whole.sample_order
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and files(again) == files(whole)
    with pytest.raises(UserError, match="different model; choose another run folder"):  # the decoder is trained here
        run("autoencoder", shop.pixels, tmp_path / "cut", *settings, "model.decoder.mlp_width=24")


def test_its_bundle_goes_through_the_rest_of_the_chain(shop: Shop, tmp_path: Path) -> None:
    """preprocess → denoiser → align, a few steps each, and a picture at the end."""
    width = ["model.autoencoder.norm_groups=1", "model.decoder.norm_groups=1"]  # what the linear start has room in
    first = run("autoencoder", shop.pixels, tmp_path / "first", "autoencoder.start=linear", *width)
    assert first.metrics["psnr"] > 15
    pictures = Path(shop.pixels).parent / "pictures"
    data = with_conditions(pictures, tmp_path / "data", first.bundle, 8, cells="image")
    denoiser = run("denoiser", data, tmp_path / "denoiser", "denoiser.grid_every=4", *width, bundle=first.bundle)
    align = run("align", data, tmp_path / "align", "align.grid_every=4", *width, bundle=denoiser.bundle)
    before, after = load_bundle(first.bundle), load_bundle(align.bundle)
    assert after.meta["stages"].keys() == {"autoencoder", "denoiser", "align"} and not after.autoencoder.has_decoder
    assert after.autoencoder.identity() == before.autoencoder.identity()
    assert before.decoder is not None and after.decoder is not None
    for name, tensor in before.decoder.state_dict().items():
        assert torch.equal(tensor, after.decoder.state_dict()[name])
    assert LatentZoom(after).upscale(Image.new("RGB", (9, 7)), 2.3, num_steps=2).size == (21, 16)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["model.autoencoder.kind=vq"], "'implicit' is for the kind 'kl', whose posterior is sampled; .* 'vq'"),
        (["autoencoder.min_size=40"], r"target sizes 40\.\.32 are empty"),
        (["autoencoder.max_size=4", "autoencoder.min_size=6"], "max_size = 4"),
        (["autoencoder.decoder=both"], "autoencoder.decoder"),
    ],
)
def test_errors_before_training(settings: list[str], named: str, shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named) as error:
        run("autoencoder", shop.pixels, tmp_path / "run", *settings)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_dry_run_knows_the_joint_stage() -> None:
    """Its parameters are those of the encoder and of the implicit decoder."""
    num = sum(p.numel() for p in joint_first_stage(override(debug(), JOINT).model).parameters())
    assert f"{num:,}" in dry_run("autoencoder", override(debug(), JOINT), 1, "cpu").replace("\u202f", ",")


@pytest.mark.parametrize(
    "settings",
    [
        ["model.task=direct", "model.decoder.inputs=condition"],
        ["model.task=sr", "model.lr_size=8", "model.decoder.inputs=both"],
    ],
)
def test_a_decoder_that_renders_conditions_is_not_trained_jointly(settings: list[str]) -> None:
    """It would never have seen one."""
    with pytest.raises(UserError, match="is of one that renders conditions; use autoencoder.decoder=convolutional"):
        override(debug(), [*settings, "autoencoder.decoder=implicit"])
