"""The model card: a bundle's README.md, in Markdown. What the model is, what it was trained on, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config import ModelConfig


def model_card(config: ModelConfig, meta: Mapping[str, Any], *, data: str = "", licence: str = "") -> str:
    """A card for a bundle. data: where the training images came from; licence: of the weights, if it is known."""
    task = {
        "generation": "generation",
        "sr": f"super-resolution from {config.lr_size} pixels",
        "direct": "direct super-resolution by any factor",
    }[config.task]
    schedule = (
        f"{config.schedule.prediction} prediction{', zero terminal SNR' if config.schedule.zero_terminal_snr else ''}"
    )
    kind = "one-step denoiser, distilled" if config.schedule.distilled_steps else "latent diffusion model"
    diffusion = "" if config.task == "direct" else f"{kind} ({schedule}), "
    ae, decoder = config.autoencoder, config.decoder
    lines = [
        f"# {config.name}",
        "",
        f"A latentzoom model for {task}: autoencoder ({ae.kind}, f = {ae.factor}, {ae.latent_channels} channels), "
        f"{diffusion}implicit neural decoder (`{decoder.kind}`). Trained at {config.image_size} pixels; renders any "
        "height × width.",
        "",
        "## Training",
        "",
        f"- data: {data or 'not recorded'}",
        f"- weights: {meta.get('weights', 'not recorded')}",
    ]
    if isinstance(going_on := meta.get("unfinished"), Mapping):
        lines.append(f"- written while training went on, after step {going_on.get('step')} of {going_on.get('of')}")
    for name, stage in meta.get("stages", {}).items():
        if isinstance(stage, Mapping):
            settings = stage.get("settings", {})
            lines.append(
                f"- {name}: {stage.get('steps')} steps of {settings.get('global_batch')} samples, learning rate "
                f"{settings.get('lr')}, shard set {str(stage.get('data', ''))[:12]}{started_from(stage)}"
            )
    if imported := meta.get("imported_from"):
        lines.append(f"- imported from: {imported_text(imported)}")
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from pipeline import LatentZoom",
        'model = LatentZoom.load("path/or/url/of/this/folder")',
    ]
    if config.task == "generation":
        lines.append("images = model.generate(num=4, size=(700, 1000), seed=0)")
    lines += [
        "image = model.upscale(pil_image, scale=5.3)",
        "```",
        *_strengths(config),
        "",
        "## Licence",
        "",
        licence or "Not stated: the licences of the training images decide what the weights may be used for.",
    ]
    return "\n".join(lines) + "\n"


def _strengths(config: ModelConfig) -> list[str]:
    most = config.denoiser.condition_noise
    return ["", f"`condition_noise` of 0 to {most:g} (`--condition-noise`) may be added to the input."] if most else []


def started_from(stage: Mapping[str, Any]) -> str:
    """What a stage's weights began as, in words, with a comma before; nothing for new weights."""
    origins = stage.get("started_from", {})
    words = [
        f"the {o.get('part')} of {o.get('of')} ({o.get('model')}, weights {str(o.get('sha256', ''))[:12]})"
        for o in origins.values()
    ]
    return f", started from {' and '.join(words)}" if words else ""


def imported_text(imported: Mapping[str, Any]) -> str:
    """Format and source of imported weights."""
    facts = {name: value for name, value in imported.items() if value and isinstance(value, (str, int))}
    return ", ".join(f"{name} {value}" for name, value in facts.items())
