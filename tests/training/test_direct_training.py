"""Direct super-resolution is trained: from pixels, from cached conditions, resumed exactly, and refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from direct_settings import DIRECT, WITH_ENCODER, save_first_stage, with_conditions
from PIL import Image
from stage_inputs import Shop

from pipeline import storage
from pipeline.bundle import load_bundle, save_bundle
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from pipeline.plain_trunk import PlainFeatureDecoder
from preprocess.shards.loader import ShardLoader
from training.config import override
from training.engine import enable_activation_checkpointing
from training.estimate import dry_run
from training.presets import debug, get_preset
from training.run import TrainResult, train

CACHED = [*WITH_ENCODER, "decoder.conditions=cached", "decoder.crop=0"]


def run(data: str, run_dir: Path, *settings: str, bundle: str | None = None, stage: str = "decoder") -> TrainResult:
    return train(stage, override(debug(), list(settings)), data=data, run_dir=str(run_dir), bundle=bundle, device="cpu")


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    decoder = load_bundle(result.bundle).decoder
    assert decoder is not None
    return decoder.state_dict()


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle of a KL autoencoder with f = 4."""
    return save_first_stage(str(tmp_path_factory.mktemp("encoder")), override(debug(), WITH_ENCODER).model)


@pytest.fixture(scope="module")
def pictures(shop: Shop) -> Path:
    return Path(shop.pixels).parent / "pictures"


@pytest.fixture(scope="module")
def conditions(pictures: Path, encoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return with_conditions(pictures, tmp_path_factory.mktemp("conditions") / "data", encoder, 9, 16)


def test_from_pixels_to_a_model_that_upscales(shop: Shop, tmp_path: Path) -> None:
    """No bundle comes in; the grid shows the start and the end; the pictures are those of the weights."""
    settings = ["decoder.steps=60", "decoder.lr=5e-3", "decoder.grid_every=60", "decoder.log_every=20"]
    result = run(shop.pixels, tmp_path / "run", *DIRECT, *settings, "decoder.scattered=true")
    assert result.last_loss < 0.8 * result.first_loss and result.metrics["psnr"] > 8
    before, after = (np.asarray(Image.open(path)) for path in sorted((tmp_path / "run/grids").iterdir()))
    assert before.shape == after.shape == (6 * 34, 4 * 34, 3) and not np.array_equal(before, after)
    bundle = load_bundle(result.bundle)
    assert bundle.denoiser is None and bundle.config.task == "direct" and bundle.config.scale_factor == 1.0
    made = LatentZoom(bundle).upscale(Image.fromarray(after[:10, :13]), 2.3)
    assert made.size == (30, 23) and np.asarray(made).std() > 5


def test_accumulated_gradients_give_the_same_training(shop: Shop, tmp_path: Path) -> None:
    whole, parts = (
        run(shop.pixels, tmp_path / str(micro), *DIRECT, f"decoder.micro_batch={micro}", "decoder.start=linear")
        for micro in (0, 1)
    )
    assert parts.sample_order == whole.sample_order
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "0"), rel=1e-5)
    for one, other in zip(weights(whole).values(), weights(parts).values(), strict=True):
        torch.testing.assert_close(one, other, atol=3e-5, rtol=0)


def test_recomputed_activations_give_the_same_gradient_and_are_not_kept() -> None:
    trunk = PlainFeatureDecoder(override(debug(), DIRECT).model.decoder, 3)
    latent = torch.randn(2, 3, 16, 12)
    results, kept = [], []
    for frugal in (False, True):
        if frugal:
            enable_activation_checkpointing(trunk)
        numbers: list[int] = []
        trunk.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, n=numbers: n.append(t.numel()) or t, lambda t: t):  # type: ignore[misc]
            features = trunk(latent)
        features.square().sum().backward()
        results.append([p.grad.clone() for p in trunk.parameters() if p.grad is not None])
        kept.append(sum(numbers))
    assert len(results[0]) == len(results[1]) == len(list(trunk.parameters()))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("kind", ["drawn", "drawn and encoded", "cached"])
def test_a_run_that_fails_between_checkpoints_ends_like_an_uninterrupted_one(
    kind: str, shop: Shop, encoder: str, conditions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import training.stages.decoder as loop

    options: dict[str, Any] = {
        "drawn": {"data": shop.pixels},
        "drawn and encoded": {"data": shop.pixels, "bundle": encoder},
        "cached": {"data": conditions, "bundle": encoder},
    }[kind]
    settings = {"drawn": DIRECT, "drawn and encoded": WITH_ENCODER, "cached": CACHED}[kind]
    settings = [*settings, "decoder.steps=11", "decoder.checkpoint_every=3", "decoder.schedule=cosine"]
    data = options.pop("data")
    whole = run(data, tmp_path / "whole", *settings, **options)
    calls, original = [], loop.per_sample

    def failing(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, "per_sample", failing)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "cut", *settings, **options)
    again = run(data, tmp_path / "cut", *settings, **options)
    assert again.resumed_from == 6 and again.sample_order == whole.sample_order
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "cut")) == 11
    assert storage.sha256_file(f"{again.bundle}/decoder.safetensors") == storage.sha256_file(
        f"{whole.bundle}/decoder.safetensors"
    )


def test_a_run_does_not_go_on_with_another_encoder(shop: Shop, encoder: str, tmp_path: Path) -> None:
    """Drawn conditions are encoded by it; the shards, of pixels only, know nothing of it."""
    run(shop.pixels, tmp_path / "run", *WITH_ENCODER, "decoder.steps=2", bundle=encoder)
    other = load_bundle(encoder)
    for parameter in other.autoencoder.parameters():
        parameter.data.mul_(1.5)
    save_bundle(str(tmp_path / "other"), other)
    with pytest.raises(UserError, match="different bundle; choose another run folder"):
        run(shop.pixels, tmp_path / "run", *WITH_ENCODER, bundle=str(tmp_path / "other"))


# --- cached conditions ------------------------------------------------------------------------------------------------


def test_cached_conditions_have_a_cell_for_each_pixel(conditions: str, encoder: str, tmp_path: Path) -> None:
    with ShardLoader(conditions, batch_size=4, lr_size=(9, 16)) as loader:
        shapes = {tuple(batch.condition.shape) for batch, _ in zip(loader, range(12)) if batch.condition is not None}
    assert shapes == {(4, 6, 9, 9), (4, 6, 16, 16)}
    bundle = load_bundle(run(conditions, tmp_path / "run", *CACHED, "decoder.grid_every=4", bundle=encoder).bundle)
    assert len(list((tmp_path / "run/grids").iterdir())) == 2
    assert bundle.autoencoder.identity() == load_bundle(encoder).autoencoder.identity()
    assert bundle.config.scale_factor == 1.0  # a direct model's latents are never scaled


def test_cached_pictures_need_no_bundle_and_teach(pictures: Path, tmp_path: Path) -> None:
    """The autoencoder without weights, whose conditions are the small pictures themselves."""
    settings = [*DIRECT, "decoder.conditions=cached", "decoder.crop=0", "decoder.steps=40", "decoder.lr=5e-3"]
    first = save_first_stage(str(tmp_path / "first"), override(debug(), DIRECT).model)
    data = with_conditions(pictures, tmp_path / "data", first, 8, 16)
    result = run(data, tmp_path / "run", *settings, "decoder.log_every=20")
    assert result.last_loss < 0.8 * result.first_loss
    assert LatentZoom.load(result.bundle).upscale(Image.new("RGB", (9, 7)), 2.3).size == (21, 16)


@pytest.mark.parametrize(
    ("stage", "settings", "data", "named"),
    [
        ("denoiser", DIRECT, "no bundle", "stage denoiser: a model for direct super-resolution has no denoiser"),
        ("align", WITH_ENCODER, "conditions", "stage align: a model for direct super-resolution has no denoiser"),
        ("autoencoder", DIRECT, "pixels", "'identity' has no weights to train; begin with `decoder`"),
        ("decoder", WITH_ENCODER, "no bundle", "train stage autoencoder first"),
        ("decoder", [*DIRECT, "decoder.start=bundle"], "no bundle", "needs a bundle with the decoder"),
        ("decoder", [*DIRECT, "decoder.conditions=cached"], "no bundle", "holds pixels only; preprocess"),
        ("decoder", CACHED, "pixels", "holds pixels only; preprocess it again with --autoencoder"),
        ("decoder", CACHED, "no conditions", "no conditions for direct .* --condition-cells input"),
        ("decoder", CACHED, "image cells", "no conditions for direct .* --condition-cells input"),
        ("decoder", [*CACHED, "model.condition_resize=nearest"], "conditions", "by 'bicubic', the model is for 'near"),
        ("decoder", [*CACHED, "decoder.max_size=12"], "conditions", r"target sizes 16\.\.12 are empty"),
        ("decoder", [*WITH_ENCODER, "model.image_size=64"], "pixels", "32-pixel images and the model is for 64"),
    ],
)
def test_errors_before_training(
    stage: str, settings: list[str], data: str, named: str, shop: Shop, encoder: str, conditions: str, pictures: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    if data in ("no conditions", "image cells"):
        sizes = (16,) if data == "image cells" else ()
        url = with_conditions(pictures, tmp_path / "data", encoder, *sizes, cells="image")
    else:
        url = conditions if data == "conditions" else shop.pixels
    with pytest.raises(UserError, match=named) as error:
        run(url, tmp_path / "run", *settings, stage=stage, bundle=None if data == "no bundle" else encoder)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["decoder", "denoiser"])
def test_diffusion_refuses_conditions_with_a_cell_a_pixel(
    stage: str, pictures: Path, sr_shop: Shop, tmp_path: Path
) -> None:
    """Eight low-resolution pixels on eight cells: the shapes agree, the pictures that were encoded do not."""
    data = with_conditions(pictures, tmp_path / "data", sr_shop.bundle, 16)
    settings = ["model.task=sr", "model.lr_size=16"]
    settings += ["model.decoder.inputs=both"] if stage == "decoder" else []
    with pytest.raises(UserError, match="for direct super-resolution; preprocess again with --condition-cells image"):
        run(data, tmp_path / "run", *settings, stage=stage, bundle=sr_shop.bundle)


def test_a_decoder_for_both_needs_conditions_and_trains_with_them(sr_shop: Shop, shop: Shop, tmp_path: Path) -> None:
    both = ["model.task=sr", "model.lr_size=8", "model.decoder.inputs=both"]
    with pytest.raises(UserError, match="no 8-pixel conditions"):
        run(shop.data, tmp_path / "run", *both, bundle=shop.bundle)
    result = run(sr_shop.data, tmp_path / "run", *both, bundle=sr_shop.bundle)
    model = LatentZoom.load(result.bundle)
    assert result.steps == 4 and model.upscale(Image.new("RGB", (8, 8)), 3.1, num_steps=0).size == (25, 25)


# --- going on from a bundle, perceptual term, presets -----------------------------------------------------------------


def test_it_goes_on_from_the_bundle_s_decoder(shop: Shop, tmp_path: Path) -> None:
    first = run(shop.pixels, tmp_path / "first", *DIRECT)
    settings = [*DIRECT, "decoder.start=bundle", "decoder.steps=1", "decoder.lr=1e-9", "decoder.ema_warmup=false"]
    second = run(shop.pixels, tmp_path / "second", *settings, bundle=first.bundle)
    for before, after in zip(weights(first).values(), weights(second).values(), strict=True):
        torch.testing.assert_close(before, after, atol=1e-7, rtol=0)
    third = run(shop.pixels, tmp_path / "third", *DIRECT, "decoder.seed=1")
    with pytest.raises(UserError, match="different bundle; choose another run folder"):
        run(shop.pixels, tmp_path / "second", *settings, "decoder.steps=2", bundle=third.bundle)


def test_a_decoder_of_another_size_is_refused_in_one_line(shop: Shop, tmp_path: Path) -> None:
    first = run(shop.pixels, tmp_path / "first", *DIRECT, "decoder.steps=1")
    other = [*DIRECT, "decoder.start=bundle", "model.decoder.light_width=32"]
    with pytest.raises(UserError, match="bundle's decoder has other settings") as error:
        run(shop.pixels, tmp_path / "second", *other, bundle=first.bundle)
    assert "\n" not in str(error.value)


def test_a_perceptual_term_is_added_with_its_weight(shop: Shop, tmp_path: Path) -> None:
    settings = [*DIRECT, "decoder.crop=20", "decoder.steps=1", "decoder.input_cells=20"]
    terms = ["decoder.perceptual_weight=0.25", "decoder.lpips_weights=random"]
    plain = run(shop.pixels, tmp_path / "plain", *settings)
    sharp = run(shop.pixels, tmp_path / "sharp", *settings, *terms)
    assert sharp.metrics["l1"] == pytest.approx(plain.last_loss, rel=1e-6) and sharp.metrics["lpips"] > 0
    assert sharp.last_loss == pytest.approx(sharp.metrics["l1"] + 0.25 * sharp.metrics["lpips"], rel=1e-6)


def test_windows_too_small_for_the_perceptual_term_are_refused(
    shop: Shop, conditions: str, encoder: str, tmp_path: Path
) -> None:
    terms = ["decoder.perceptual_weight=0.25", "decoder.lpips_weights=random", "decoder.crop=12"]
    for settings in ([*DIRECT, *terms], [*DIRECT, *terms[:2], "decoder.crop=0"]):  # 12 cells at ×1 are 12 pixels
        with pytest.raises(UserError, match="at least 16 pixels, and this run would draw some of 12") as error:
            run(shop.pixels, tmp_path / "run", *settings)
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="draw some of 9"):  # the smaller conditions' own size
        run(conditions, tmp_path / "run", *CACHED, *terms[:2], bundle=encoder)
    with pytest.raises(UserError, match="draw some of 8"):  # a latent's own size
        run(shop.data, tmp_path / "run", *terms[:2], bundle=shop.bundle)


@pytest.mark.parametrize("name", ["starter", "starter-sharp"])
def test_the_starter_s_presets_step_once_at_reduced_width(name: str, pictures: Path, tmp_path: Path) -> None:
    from preprocess.config import PreprocessConfig
    from preprocess.run import preprocess

    preset = get_preset(name)
    assert preset.model.autoencoder.kind == "identity" and preset.model.decoder.norm == "none"
    assert preset.decoder.scattered is (name == "starter") and preset.decoder.turns
    preprocess(PreprocessConfig(source_url=str(pictures), dest=str(tmp_path / "data"), size=256, limit=4))
    small = [
        "model.decoder.base_width=8",
        "model.decoder.num_res_blocks=1",
        "decoder.global_batch=2",
        "decoder.steps=1",
    ]
    small += ["decoder.grid_every=0", "decoder.crop=32", "decoder.input_cells=32"]
    start = override(preset, [*small, "decoder.start=linear"])
    first = train("decoder", start, data=str(tmp_path / "data"), run_dir=str(tmp_path / "first"), device="cpu")
    if name == "starter-sharp":
        preset = override(preset, [*small, "decoder.lpips_weights=random"])
        options: dict[str, Any] = {"run_dir": str(tmp_path / "sharp"), "bundle": first.bundle, "device": "cpu"}
        first = train("decoder", preset, data=str(tmp_path / "data"), **options)
    assert np.isfinite(first.last_loss) and first.steps == 1


@pytest.mark.parametrize("settings", [DIRECT, WITH_ENCODER, CACHED])
def test_a_dry_run_knows_direct_models(settings: list[str]) -> None:
    assert "trained parameters" in dry_run("decoder", override(debug(), settings), 1, "cpu")
