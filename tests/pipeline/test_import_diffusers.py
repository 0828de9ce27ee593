"""diffusers folders: our networks compute what diffusers computes with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file, save_file
from small_models import relative_error

from orchestration import cli
from pipeline.errors import UserError
from pipeline.importing.diffusers_folder import import_diffusers
from pipeline.model import LatentZoom


def main(argv: list[str]) -> int:
    return cli.main(["import", *argv])


AUTOENCODER: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "sample_size": 16,
    "layers_per_block": 2,
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (16, 24),
    "latent_channels": 3,
    "norm_num_groups": 8,
    "scaling_factor": 0.7,
}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
SCHEDULER: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}


def write_pipeline(folder: Path, scheduler: dict[str, Any] = SCHEDULER, **unet: Any) -> tuple[VQModel, UNet2DModel]:
    torch.manual_seed(0)
    vq, denoiser = VQModel(**AUTOENCODER, num_vq_embeddings=20), UNet2DModel(**{**UNET, **unet})
    vq.eval().save_pretrained(folder / "vqvae")
    denoiser.eval().save_pretrained(folder / "unet")
    DDIMScheduler(**scheduler).save_pretrained(folder / "scheduler")
    return vq, denoiser


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@torch.no_grad()
def test_kl_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kl = AutoencoderKL(**AUTOENCODER).eval()
    kl.save_pretrained(tmp_path / "kl")
    bundle = import_diffusers(str(tmp_path / "kl"))
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    posterior = kl.encode(image).latent_dist
    assert torch.equal(bundle.autoencoder.encode(image), posterior.mean)
    assert torch.equal(bundle.autoencoder.decode(posterior.mean), kl.decode(posterior.mean).sample)
    assert bundle.denoiser is None and bundle.config.scale_factor == 0.7 and bundle.config.name == "kl"
    assert bundle.config.autoencoder.widths == (16, 24)


@torch.no_grad()
def test_pipeline_folder(tmp_path: Path) -> None:
    vq, denoiser = write_pipeline(tmp_path / "ldm")
    assert main(["diffusers", str(tmp_path / "ldm"), "--out", str(tmp_path / "bundle")]) == 0
    model = LatentZoom.load(str(tmp_path / "bundle"))
    image, t = torch.rand(2, 3, 16, 24) * 2 - 1, torch.tensor([5, 800])
    latent = vq.encode(image).latents
    assert torch.equal(model.encode(image), latent)
    assert relative_error(model.autoencoder.decode(latent), vq.decode(latent).sample) < 1e-6
    assert torch.equal(model.denoise(latent, t), denoiser(latent, t).sample)
    assert (model.config.image_size, model.config.schedule.beta_end) == (16, 0.0195)


@torch.no_grad()
def test_ddim_equals_diffusers_ddim(tmp_path: Path) -> None:
    """The paper's time steps and last step are diffusers' with steps_offset = 1 and set_alpha_to_one = False."""
    _, denoiser = write_pipeline(tmp_path)
    model = LatentZoom(import_diffusers(str(tmp_path)))
    scheduler = DDIMScheduler(**SCHEDULER, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    scheduler.set_timesteps(20)
    z = noise = torch.randn(2, 3, 8, 8)
    for step in scheduler.timesteps:
        z = scheduler.step(denoiser(z, step).sample, step, z).prev_sample
    assert relative_error(model.sample_latents(noise, num_steps=20) * model.config.scale_factor, z) < 1e-5


@torch.no_grad()
def test_ddim_from_noise_alone_equals_diffusers_ddim(tmp_path: Path) -> None:
    """A schedule with zero terminal SNR is recognised, and sampled by diffusers' "trailing" steps."""
    settings = {**SCHEDULER, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    _, denoiser = write_pipeline(tmp_path, settings)
    model = LatentZoom(import_diffusers(str(tmp_path)))
    assert model.config.schedule.zero_terminal_snr and model.config.schedule.prediction == "v"
    scheduler = DDIMScheduler(**settings, timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False)
    scheduler.set_timesteps(20)
    z = noise = torch.randn(2, 3, 8, 8)
    for step in scheduler.timesteps:
        z = scheduler.step(denoiser(z, step).sample, step, z).prev_sample
    assert relative_error(model.sample_latents(noise, num_steps=20) * model.config.scale_factor, z) < 1e-4


def test_unet_from_another_folder(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "a")
    bundle = import_diffusers(str(tmp_path / "a" / "vqvae"), unet=str(tmp_path / "a" / "unet"))
    assert bundle.denoiser is not None
    with pytest.raises(UserError, match="holds no UNet2DModel"):
        import_diffusers(str(tmp_path / "a" / "vqvae"), unet=str(tmp_path / "a" / "vqvae"))


def test_a_unet_that_takes_conditions_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    write_pipeline(tmp_path)
    edit_config(tmp_path / "unet", _class_name="UNet2DConditionModel")
    with pytest.raises(UserError, match="takes text or other conditions"):
        import_diffusers(str(tmp_path / "vqvae"), unet=str(tmp_path / "unet"))


def test_old_attention_names_and_bin_files(tmp_path: Path) -> None:
    """Folders from before diffusers renamed its attention layers, with pickled weights."""
    write_pipeline(tmp_path)
    expected = import_diffusers(str(tmp_path)).autoencoder.state_dict()
    file = tmp_path / "vqvae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(str(file))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
    assert any(".query." in key for key in tensors)
    torch.save(tensors, tmp_path / "vqvae" / "diffusion_pytorch_model.bin")
    file.unlink()
    read = import_diffusers(str(tmp_path)).autoencoder.state_dict()
    assert all(torch.equal(read[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("folder", "change", "named"),
    [
        ("unet", {"norm_eps": 1e-6}, "norm_eps = 1e-06"),
        ("unet", {"attention_head_dim": None}, "attention_head_dim must be int"),
        ("unet", {"in_channels": 6}, "in_channels = 6"),
        ("unet", {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]}, "ResnetDownsampleBlock2D"),
        ("unet", {"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "must mirror"),
        ("unet", {"layers_per_block": 2}, "misses down_blocks"),
        ("vqvae", {"norm_type": "spatial"}, "norm_type"),
        ("vqvae", {"act_fn": "relu"}, "act_fn"),
        ("vqvae", {"layers_per_block": 1}, "left over decoder"),
        ("vqvae", {"vq_embed_dim": 2}, "vq_embed_dim"),
        ("vqvae", {"block_out_channels": [16]}, "must mirror"),
        ("vqvae", {"latents_mean": [0.0]}, "latents_mean"),
    ],
)
def test_unsupported_configurations_are_refused_by_name(
    folder: str, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    write_pipeline(tmp_path)
    edit_config(tmp_path / folder, **change)
    with pytest.raises(UserError, match=named):
        import_diffusers(str(tmp_path))


@pytest.mark.parametrize(
    ("scheduler", "named"),
    [
        ({**SCHEDULER, "beta_schedule": "linear"}, "beta_schedule 'linear'"),
        ({**SCHEDULER, "prediction_type": "x"}, "'x'"),
        ({**SCHEDULER, "rescale_betas_zero_snr": True}, "'v' or 'x0' with schedule.zero_terminal_snr"),
    ],
)
def test_unknown_schedules_are_refused(scheduler: dict[str, Any], named: str, tmp_path: Path) -> None:
    write_pipeline(tmp_path, scheduler)
    with pytest.raises(UserError, match=named):
        import_diffusers(str(tmp_path))


def test_missing_and_left_over_files_and_keys(tmp_path: Path) -> None:
    write_pipeline(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(str(file))
    save_file({**tensors, "extra.weight": torch.ones(1)}, str(file))
    with pytest.raises(UserError, match=r"left over extra\.weight"):
        import_diffusers(str(tmp_path))
    save_file({key: value for key, value in tensors.items() if key != "conv_in.bias"}, str(file))
    with pytest.raises(UserError, match=r"misses conv_in\.bias"):
        import_diffusers(str(tmp_path))
    file.unlink()
    with pytest.raises(UserError, match="holds none of"):
        import_diffusers(str(tmp_path))
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match=r"no scheduler_config\.json"):
        import_diffusers(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no AutoencoderKL or VQModel"):
        import_diffusers(str(tmp_path / "empty"))


def test_hub_ids_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="cannot be fetched from the hub"):
        import_diffusers("nobody/nothing")
    with pytest.raises(UserError, match="no such folder"):
        import_diffusers(str(tmp_path / "none"))


def test_import_never_mixes_two_bundles_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pipeline(tmp_path / "whole")
    torch.manual_seed(1)
    AutoencoderKL(**AUTOENCODER).save_pretrained(tmp_path / "kl")
    out = tmp_path / "bundle"
    command = ["diffusers", str(tmp_path / "whole"), "--out", str(out)]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(command) == 0  # the same again is no hindrance
    other = ["diffusers", str(tmp_path / "kl"), "--out", str(out)]
    capsys.readouterr()
    assert main(other) == 2
    assert "holds another bundle already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main([*other, "--overwrite"]) == 0
    assert {path.name for path in out.iterdir()} == {"config.json", "README.md", "autoencoder.safetensors"}
    assert LatentZoom.load(str(out)).config.name == "kl"

    (out / "config.json").unlink()  # as after a kill: it is written last
    assert main(other) == 0


def test_import_does_not_write_among_other_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoencoderKL(**AUTOENCODER).save_pretrained(tmp_path / "kl")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    for out, words in (("photos", "holds 'a.png', which is no part of a bundle"), ("file", "is a file; give a folder")):
        assert main(["diffusers", str(tmp_path / "kl"), "--out", str(tmp_path / out)]) == 2
        assert words in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.png"]


def test_a_hub_pipeline_gives_its_autoencoder_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache, as without network: the denoiser of a Stable Diffusion was never downloaded, nor is it missed."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, revision = tmp_path / "models--owner--sd", "a" * 40
    snapshot = repository / "snapshots" / revision
    AutoencoderKL(**AUTOENCODER).save_pretrained(snapshot / "vae")
    (snapshot / "unet").mkdir()
    (snapshot / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    bundle = import_diffusers("owner/sd")
    assert bundle.denoiser is None and bundle.config.name == "sd"
