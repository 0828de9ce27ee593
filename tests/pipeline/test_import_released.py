"""`latentzoom import released`: EMA by default, strict about keys, first stage alone or the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from reference_ldm import Decoder, Encoder
from small_models import Released, relative_error
from torch import Tensor

from orchestration import cli
from pipeline.bundle import load_bundle
from pipeline.errors import UserError
from pipeline.importing.latent_diffusion import import_checkpoint
from pipeline.model import LatentZoom


def main(argv: list[str]) -> int:
    return cli.main(["import", *argv])


def write(folder: Path, state: dict[str, Tensor]) -> str:
    """A checkpoint as training frameworks write it."""
    path = folder / "model.ckpt"
    torch.save({"epoch": 3, "global_step": 1234, "state_dict": state, "optimizer_states": [], "callbacks": {}}, path)
    return str(path)


def first_stage_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "first_stage_model."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def changed_config(released: Released, folder: Path, path: str, value: Any) -> str:
    """The released configuration with one field (dots between sections) changed."""
    data = yaml.safe_load(Path(released.config).read_text())
    *sections, last = path.split(".")
    section = data["model"]["params"]
    for name in sections:
        section = section[name]
    section[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(data))
    return str(folder / "config.yaml")


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_command_writes_a_bundle(weights: str, released: Released, tmp_path: Path) -> None:
    out = str(tmp_path / "bundle")
    argv = ["released", write(tmp_path, released.weights), "--model-config", released.config, "--out", out]
    assert main([*argv, "--raw"] if weights == "raw" else argv) == 0
    model = LatentZoom.load(out)
    latent = model.sample_latents(released.vectors["x_T"], released.vectors["condition"], num_steps=10)
    expected = released.vectors["ddim10_eta0" if weights == "raw" else "ddim10_eta0_ema"]
    assert relative_error(latent * model.config.scale_factor, expected) < 1e-4
    assert model.bundle.meta["weights"] == weights
    assert model.config.scale_factor == pytest.approx(2.185145139694214, rel=1e-6)
    assert (model.config.task, model.config.image_size, model.config.lr_size) == ("sr", 32, 8)


def test_first_stage_alone(released: Released, tmp_path: Path) -> None:
    out = str(tmp_path / "bundle")
    checkpoint = write(tmp_path, first_stage_of(released.weights))
    assert main(["released", checkpoint, "--model-config", released.config, "--out", out, "--name", "stage"]) == 0
    bundle = load_bundle(out)
    assert bundle.denoiser is None and bundle.decoder is not None and bundle.config.name == "stage"
    decoded = LatentZoom(bundle).decode(released.vectors["latent"], (53, 53))
    assert relative_error(decoded, released.vectors["decoded_53"]) < 1e-4


def test_first_stage_with_a_moving_average(released: Released, tmp_path: Path) -> None:
    state = first_stage_of(released.weights)
    ema = {"model_ema." + key.replace(".", ""): value * 2 for key, value in state.items()}
    checkpoint = write(tmp_path, state | ema)
    key = "encoder.conv_in.weight"
    by_default = import_checkpoint(checkpoint, released.config, "released").autoencoder.state_dict()[key]
    raw = import_checkpoint(checkpoint, released.config, "released", weights="raw").autoencoder.state_dict()[key]
    assert torch.equal(raw, state["encoder.0.conv_in.weight"]) and torch.equal(by_default, 2 * raw)


def test_first_stage_configuration_of_its_own(released: Released, tmp_path: Path) -> None:
    params = yaml.safe_load(Path(released.config).read_text())["model"]["params"]["first_stage_config"]["params"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": {"target": "a.FirstStage", "params": params}}))
    checkpoint = write(tmp_path, first_stage_of(released.weights))
    bundle = import_checkpoint(checkpoint, str(tmp_path / "own.yaml"), "released")
    assert bundle.config.image_size == 32 and bundle.decoder is not None


@pytest.mark.parametrize(
    "key",
    [
        "model_ema.diffusion_modelinput_blocks31qkvweight",
        "first_stage_model.encoder.1.weight",
        "first_stage_model.decoder.decoder.1.up.1.block.0.nin_shortcut.bias",
        "first_stage_model.decoder.inr.imnet.layers.8.weight",
    ],
)
def test_missing_key_is_named(key: str, released: Released, tmp_path: Path) -> None:
    state = {k: v for k, v in released.weights.items() if k != key}
    with pytest.raises(UserError, match=f"misses {key}".replace(".", r"\.")):
        import_checkpoint(write(tmp_path, state), released.config, "released")


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.9.0.op.weight",
        "model_ema.diffusion_modelout9weight",
        "first_stage_model.encoder.0.mid.attn_2.q.weight",
        "cond_stage_model.embedding.weight",
        "unheard_of",
    ],
)
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_left_over_key_is_named(key: str, weights: Any, released: Released, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, released.weights | {key: torch.zeros(1)})
    with pytest.raises(UserError, match=f"left over {key}".replace(".", r"\.")):
        import_checkpoint(checkpoint, released.config, "released", weights=weights)


def test_wrong_shape_is_named(released: Released, tmp_path: Path) -> None:
    key = "first_stage_model.decoder.inr.imnet.layers.0.weight"
    checkpoint = write(tmp_path, released.weights | {key: torch.zeros(64, 34)})
    with pytest.raises(UserError, match=r"imnet\.layers\.0\.weight is \(64, 34\), expected \(64, 36\)"):
        import_checkpoint(checkpoint, released.config, "released")


def test_no_moving_average(released: Released, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write(tmp_path, {k: v for k, v in released.weights.items() if not k.startswith("model_ema.")})
    argv = ["released", checkpoint, "--model-config", released.config, "--out", str(tmp_path / "bundle")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("latentzoom: error: ") and "--raw" in error and error.count("\n") == 1
    assert not (tmp_path / "bundle").exists()
    assert main([*argv, "--raw"]) == 0


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("linear_end", 0.0195, "alphas_cumprod"),
        ("conditioning_key", "crossattn", "conditioning_key"),
        ("c_encode", False, "c_encode"),
        ("unet_config.params.in_channels", 3, "in_channels"),
        ("unet_config.params.num_res_blocks", 2, "misses"),
        ("unet_config.params.attention_resolutions", [], "output_blocks11conv"),
        ("first_stage_config.params.liifconfig.hidden_list", [64, 64, 32, 64], "hidden_list"),
        ("first_stage_config.params.liifconfig.local_ensemble", False, "local_ensemble"),
        ("first_stage_config.params.ddconfig", {"ch": 32}, "z_channels is missing"),
    ],
)
def test_configuration_that_does_not_fit(
    field: str, value: Any, named: str, released: Released, tmp_path: Path
) -> None:
    config = changed_config(released, tmp_path, field, value)
    with pytest.raises(UserError, match=named):
        import_checkpoint(write(tmp_path, released.weights), config, "released")


def test_implicit_decoder_attends_only_at_the_latent_size(released: Released, tmp_path: Path) -> None:
    """Nothing is up-sampled in D_phi, so every level has the latent's 8×8 cells."""
    from pipeline.importing.settings import autoencoder_config, decoder_config, first_stage, read_yaml

    for resolutions, encoder_levels, decoder_levels in (([8], (2,), (0, 1, 2)), ([16], (1,), ()), ([], (), ())):
        config = changed_config(released, tmp_path, "first_stage_config.params.ddconfig.attn_resolutions", resolutions)
        stage = first_stage(read_yaml(config))
        assert autoencoder_config(stage).attention_levels == encoder_levels
        assert decoder_config(stage).attention_levels == decoder_levels


def test_attention_in_the_implicit_decoder_s_levels(released: Released, tmp_path: Path) -> None:
    """With 8 in attn_resolutions both the encoder's last level and all of D_phi's levels attend."""
    torch.manual_seed(0)
    encoder, d_phi = Encoder([32, 32, 64], 1, [False, False, True], 3), Decoder([32, 32, 64], 1, [True] * 3, 3)
    for level in d_phi.up:
        level.__dict__["_modules"].pop("upsample", None)
    del d_phi.norm_out, d_phi.conv_out
    state = first_stage_of(released.weights)
    state = {k: v for k, v in state.items() if not k.startswith(("encoder.0.", "decoder.decoder.1."))}
    state |= {f"encoder.0.{k}": v for k, v in encoder.state_dict().items()}
    state |= {f"decoder.decoder.1.{k}": v for k, v in d_phi.state_dict().items()}
    config = changed_config(released, tmp_path, "first_stage_config.params.ddconfig.attn_resolutions", [8])
    model = LatentZoom(import_checkpoint(write(tmp_path, state), config, "released"))
    image, latent = released.vectors["image"], released.vectors["latent"]
    one_by_one = {name: torch.nn.Conv2d(3, 3, 1) for name in ("encoder.1", "decoder.decoder.0")}
    for name, conv in one_by_one.items():
        conv.load_state_dict({"weight": state[f"{name}.weight"], "bias": state[f"{name}.bias"]})
    with torch.no_grad():
        assert relative_error(model.encode(image), one_by_one["encoder.1"](encoder(image))) < 1e-4
        features = d_phi.features(one_by_one["decoder.decoder.0"](latent))
    assert relative_error(model.features(latent), features) < 1e-4


def test_lr_size(released: Released, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write(tmp_path, released.weights)
    bundle = import_checkpoint(checkpoint, released.config, "released", lr_size=4)
    assert LatentZoom(bundle).high_resolution((4, 6)) == (32, 48)
    assert main(["released", checkpoint, "--model-config", released.config, "--out", str(tmp_path / "b")]) == 0
    assert "give --lr-size" in capsys.readouterr().out


def test_files_that_are_no_configuration(released: Released, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, released.weights)
    for text, named in (("a: [", "not valid YAML"), ("- 1", "is not a configuration"), ("a: 1", "model is missing")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UserError, match=named):
            import_checkpoint(checkpoint, str(tmp_path / "c.yaml"), "released")
