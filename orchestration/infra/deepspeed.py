"""DeepSpeed settings by stage and size, as the engine makes them from a preset: for reading, and for other launchers.

Training itself needs no such file: `latentzoom train` derives the settings from preset and number of workers.
"""

from __future__ import annotations

from typing import Any

import torch

from training.engine import accumulation_steps, deepspeed_config
from training.presets import get_preset
from training.world import World

PRESETS = ("ffhq-256",)
SIZES = (1, 8, 32)
"""GPUs. Global batches of the paper's presets can be shared by each."""


def settings() -> dict[str, dict[str, Any]]:
    """ "ffhq-256-denoiser-8gpu" → its DeepSpeed configuration."""
    found = {}
    for name in PRESETS:
        preset = get_preset(name)
        for stage in preset.stages:
            for size in SIZES:
                world = World(0, size, 0, torch.device("cuda"))
                config = preset.stage(stage)
                made = deepspeed_config(config, world, accumulation_steps(config, size))
                found[f"{name}-{stage}-{size}gpu"] = made
    return found
