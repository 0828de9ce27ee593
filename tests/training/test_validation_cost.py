"""Held-out figures take less than 3 % of the floating-point operations of each of the presets' stages."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.bundle import build_autoencoder, build_decoder
from pipeline.config import ModelConfig
from pipeline.metrics.lpips import Lpips
from training.config import AutoencoderStage, DecoderStage, StageConfig, is_joint
from training.estimate import _FusedAttention, _meta_case, estimate
from training.presets import get_preset
from training.stage_figures import LEVELS, SCALES, three_sizes

_SAMPLER_STEPS = 20
LARGE = ["starter", "starter-sharp", "ffhq-256", "celebahq-sr-16-128", "div2k-sr"]
"""The others have the same shapes; `demo`, which is all overhead, was timed (docs/verbs/train.md)."""


def flops(run: object) -> float:
    with torch.no_grad(), _FusedAttention(), FlopCounterMode(display=False) as counter:
        run()  # type: ignore[operator]
    return float(counter.get_total_flops())


def rendering(model: ModelConfig, cells: int, side: int) -> float:
    decoder = build_decoder(model)
    latent = torch.empty(1, model.autoencoder.latent_channels, cells, cells)
    return flops(lambda: decoder(latent, (side, side), (0, 0, side, side)))


def lpips(sides: tuple[int, ...]) -> float:
    net = Lpips("alexnet").features
    return 2 * sum(flops(lambda side=side: net(torch.empty(1, 3, side, side))) for side in sides if side >= 32)


def of_a_sample(config: StageConfig, model: ModelConfig) -> tuple[float, float]:
    """Operations for one sample of a validation, and for one of an early figure of quality."""
    side, sizes = model.image_size, three_sizes(model)
    autoencoder = build_autoencoder(model)
    picture = torch.empty(1, 3, side, side)
    if isinstance(config, DecoderStage) and model.task == "direct":
        cells = {scale: side // scale for scale in SCALES}
        whole = sum(rendering(model, num, scale * num) for scale, num in cells.items())
        return whole + lpips(tuple(scale * num for scale, num in cells.items())), 0.0
    if isinstance(config, AutoencoderStage) and not is_joint(config):
        return flops(lambda: autoencoder.decode(autoencoder.encode(picture))) + lpips(sizes), 0.0
    pictures = sum(rendering(model, model.latent_size, size) for size in sizes) + lpips(sizes)
    if isinstance(config, AutoencoderStage):
        return flops(lambda: autoencoder.encode(picture)) + pictures, 0.0
    if isinstance(config, DecoderStage):
        return pictures, 0.0
    case = _meta_case(config, model, 1)
    made: list[object] = []
    denoise = flops(lambda: made.append(case.forward(case.largest)))
    render = flops(lambda: case.through(made[0], case.largest))
    # In evaluation every enlargement that is compared passes through LPIPS; feature networks are smaller.
    return LEVELS * (denoise + render), _SAMPLER_STEPS * denoise + rendering(model, 1, side) + 4 * lpips((side,))


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_presets_validate_for_less_than_three_percent(name: str) -> None:
    preset = get_preset(name)
    for stage in preset.stages:
        config = preset.stage(stage)
        assert config.validate_every and config.bundle_every, stage
        step = estimate(stage, config, preset.model, 1).flops_per_step
        with torch.device("meta"):
            validation, quality = of_a_sample(config, preset.model)
        share = config.validate_samples * validation / (config.validate_every * step)
        if config.quality_every:
            share += config.quality_samples * quality / (config.quality_every * step)
        print(f"{name} {stage}: {100 * share:.2f} %")
        assert 0 < share < 0.03, stage
