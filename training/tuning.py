"""What CUDA is told before a stage: the fast ways that a CPU has no use for."""

from __future__ import annotations

import logging

import torch

from training.config import AlignStage, AutoencoderStage, DenoiserStage, StageConfig, is_joint

_log = logging.getLogger("latentzoom")


def tune(config: StageConfig, device: torch.device) -> None:
    """Matrix products and convolutions of float32 in TF32, whose 10 bits of mantissa train as well; cuDNN tries its
    algorithms once for each shape where a stage has few: drawn sizes would have it try at every step."""
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = has_fixed_shapes(config)


def has_fixed_shapes(config: StageConfig) -> bool:
    """Whether the trained network sees the same shapes at every step (what is behind it in `align` may not)."""
    if isinstance(config, AutoencoderStage):
        return not is_joint(config)
    return isinstance(config, (DenoiserStage, AlignStage))


def compile_where_it_pays(module: torch.nn.Module, config: StageConfig, device: torch.device) -> bool:
    """Compile the network if the settings ask for it, or, where they leave it open, on CUDA for a stage of fixed shapes
    without ZeRO 3, whose weights come and go between the operations → whether it is compiled.

    What was not asked for must not end a run: an operation that cannot be compiled then runs as it is."""
    pays = device.type == "cuda" and has_fixed_shapes(config) and config.zero_stage < 3
    if not (pays if config.compile is None else config.compile):
        return False
    if config.compile is None:
        torch._dynamo.config.suppress_errors = True
        _log.info("the network is compiled in the first step, which takes a minute or two; compile=false does without")
    module.compile()
    return True
