"""A bundle as a diffusers pipeline folder, with its own pipeline file: diffusers runs it without latentzoom."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DModel, VQModel
from torch import nn

from pipeline.bundle import Bundle, load_strict
from pipeline.config import to_dict
from pipeline.diffusion import Schedule
from pipeline.errors import UserError
from pipeline.exporting.front_matter import Facts, with_front_matter
from pipeline.exporting.latentzoom_parts import ImplicitDecoder, LatentEncoder
from pipeline.migrations import CONFIG_VERSION

PIPELINE_FILE = "latentzoom_pipeline"
PARTS_FILE = "latentzoom_parts"
_HERE = Path(__file__).parent
_USE = """
## Use in diffusers

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    FOLDER, custom_pipeline=f"{FOLDER}/latentzoom_pipeline.py", trust_remote_code=True
)
"""


def write_diffusers_folder(bundle: Bundle, folder: Path, facts: Facts) -> None:
    """Write a pipeline folder into `folder`: decoder, and as far as the bundle has them vae, unet and scheduler.
    Raises `UserError` for a bundle that diffusers could not run."""
    config = bundle.config
    if bundle.decoder is None:
        raise UserError("this bundle has no implicit decoder yet; train the stage `decoder` first")
    if config.denoiser.condition_noise and bundle.denoiser is not None:
        raise UserError(
            "this denoiser is told the strength of noise on its condition (denoiser.condition_noise), for which "
            "diffusers' U-Net has no input; export it with --to hub-folder"
        )
    if bundle.denoiser is None and config.task == "sr":
        raise UserError("this bundle has no denoiser yet; train the stage `denoiser` first")
    index: dict[str, Any] = {
        "_class_name": [PIPELINE_FILE, "LatentZoomPipeline"],
        "_diffusers_version": diffusers.__version__,
        "model": {
            **to_dict(config),
            "config_version": CONFIG_VERSION,
            "autoencoder_has_decoder": bundle.autoencoder.has_decoder,
            "meta": bundle.meta,
        },
    }
    decoder = ImplicitDecoder(latent_channels=config.autoencoder.latent_channels, **dataclasses.asdict(config.decoder))
    _save(decoder, dict(bundle.decoder.state_dict()), folder / "decoder")
    index["decoder"] = [PARTS_FILE, "ImplicitDecoder"]
    shutil.copyfile(_HERE / f"{PARTS_FILE}.py", folder / "decoder" / f"{PARTS_FILE}.py")
    index["vae"] = _write_autoencoder(bundle, folder / "vae")
    index["unet"] = index["scheduler"] = [None, None]
    if bundle.denoiser is not None:
        unet: Any = bundle.denoiser.unet
        assert isinstance(unet, UNet2DModel)
        unet.save_pretrained(folder / "unet")
        _scheduler(bundle).save_pretrained(folder / "scheduler")
        index |= {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DPMSolverMultistepScheduler"]}
    shutil.copyfile(_HERE / f"{PIPELINE_FILE}.py", folder / f"{PIPELINE_FILE}.py")
    card = with_front_matter(bundle.card or f"# {config.name}\n", config, facts, library="diffusers")
    call = "pipe(height=700, width=1000)" if config.task == "generation" else "pipe(image=picture, scale=3.3)"
    (folder / "README.md").write_text(f"{card.rstrip()}\n{_USE}picture = {call}.images[0]\n```\n")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def autoencoder_of(bundle: Bundle) -> nn.Module:
    """diffusers' own module for the bundle's autoencoder, with new weights: AutoencoderKL or VQModel, or LatentEncoder
    where it has no convolutional decoder."""
    config = bundle.config.autoencoder
    if not bundle.autoencoder.has_decoder:
        fields = dataclasses.asdict(config)
        return LatentEncoder(**{name: value for name, value in fields.items() if name != "num_embeddings"})
    attends = [level in config.attention_levels for level in range(len(config.width_mult))]
    shared: dict[str, Any] = {
        "down_block_types": tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)),
        "block_out_channels": config.widths,
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.mid_attention,
        "sample_size": bundle.config.image_size,
        "scaling_factor": bundle.config.scale_factor,
    }
    kind: Any = AutoencoderKL if config.kind == "kl" else VQModel
    codes = {} if config.kind == "kl" else {"num_vq_embeddings": config.num_embeddings}
    return kind(**shared, **codes)


def _write_autoencoder(bundle: Bundle, folder: Path) -> list[str | None]:
    """Its entry in model_index.json."""
    if bundle.config.autoencoder.kind == "identity":
        return [None, None]
    module = autoencoder_of(bundle)
    weights = dict(bundle.autoencoder.state_dict())
    _save(module, {name.replace("quantizer.", "quantize.", 1): value for name, value in weights.items()}, folder)
    if isinstance(module, LatentEncoder):
        shutil.copyfile(_HERE / f"{PARTS_FILE}.py", folder / f"{PARTS_FILE}.py")
        return [PARTS_FILE, "LatentEncoder"]
    return ["diffusers", type(module).__name__]


def _scheduler(bundle: Bundle) -> DPMSolverMultistepScheduler:
    """As `pipeline.sampling.dpm_solver` has it."""
    schedule = bundle.config.schedule
    return DPMSolverMultistepScheduler(
        num_train_timesteps=schedule.num_steps,
        trained_betas=Schedule(schedule).betas.tolist(),
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[schedule.prediction],
        final_sigmas_type="zero",
        rescale_betas_zero_snr=schedule.zero_terminal_snr,
    )


def _save(module: nn.Module, weights: dict[str, Any], folder: Path) -> None:
    load_strict(module, weights, str(folder))
    module.save_pretrained(folder)  # type: ignore[operator]
