"""Targets with a height and a width of their own: what is drawn, and what a decoder trained so gains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.config import AutoencoderConfig, DecoderConfig, ModelConfig
from pipeline.decoder import ImplicitDecoder
from pipeline.errors import UserError
from pipeline.resize import resize
from training.config import AlignStage, AutoencoderStage, DecoderStage
from training.targets import Target, draw_target
from training.zoom import draw_zoom, smallest_zoom

MODEL = ModelConfig(image_size=32, autoencoder=AutoencoderConfig(width_mult=(1, 2, 4)))  # latents of 8 cells
Size = tuple[int, int]


@pytest.mark.parametrize("kind", [AutoencoderStage, DecoderStage, AlignStage])
def test_both_sides_stay_in_the_range_and_their_ratio_below_the_largest(kind: type[DecoderStage]) -> None:
    config = kind(min_size=10, max_size=30, max_aspect=1.5, crop=12)
    targets = [draw_target(config, MODEL, step) for step in range(600)]
    ratios = torch.tensor([t.size[0] / t.size[1] for t in targets])
    assert all(10 <= side <= 30 for t in targets for side in t.size)
    assert float(ratios.max()) < 1.5 + 0.08 and float(ratios.min()) > 1 / (1.5 + 0.08)  # a side is a whole number
    assert float(ratios.max()) > 1.4 and float(ratios.log().mean().abs()) < 0.02  # as often wide as tall
    for t in targets:
        y0, x0, y1, x1 = t.window
        assert y1 - y0 == min(12, t.size[0]) and x1 - x0 == min(12, t.size[1])
        assert y0 >= 0 and y1 <= t.size[0] and x0 >= 0 and x1 <= t.size[1]


def test_a_window_in_cells_has_the_targets_shape() -> None:
    config = AlignStage(min_size=8, max_size=32, max_aspect=2.0, crop_cells=4)
    for step in range(100):
        target = draw_target(config, MODEL, step)
        y0, x0, y1, x1 = target.window
        assert (y1 - y0, x1 - x0) == (target.size[0] // 2, target.size[1] // 2)


def test_the_truth_of_a_stretched_target_is_the_picture_stretched() -> None:
    image = torch.rand(1, 3, 32, 32)
    truth = Target((12, 24), (2, 3, 9, 20)).truth(image)
    assert torch.equal(truth, resize(image, (12, 24))[:, :, 2:9, 3:20])


def test_enlargements_of_height_and_width_have_scales_of_their_own() -> None:
    config = DecoderStage(min_scale=1.5, max_scale=4.0, input_cells=16, max_aspect=1.6, turns=True, crop=10)
    ratios = []
    image = torch.rand(1, 3, 64, 64)
    for step in range(300):
        zoom = draw_zoom(config, 64, step)
        height, width = (side / zoom.cells for side in zoom.size)
        slack = 0.5 / zoom.cells
        assert all(1.5 - slack <= scale <= 4.0 + slack for scale in (height, width))
        ratios.append(height / width)
        region = zoom.region(image)
        assert region.shape[-2:] == zoom.size and min(zoom.size) >= smallest_zoom(config, 64) - 1
        assert int(zoom.rows.max()) < zoom.size[0] and int(zoom.cols.max()) < zoom.size[1]
        assert zoom.truth(region).shape[-2:] == (10, 10)
        assert zoom.low_resolution(region).shape[-2:] == (zoom.cells, zoom.cells)
    assert 1.5 < max(ratios) < 1.7 and 1 / 1.7 < min(ratios) < 1 / 1.5
    squares = [draw_zoom(DecoderStage(max_scale=4.0, input_cells=16), 64, step).size for step in range(50)]
    assert all(height == width for height, width in squares)


@pytest.mark.parametrize("value", [0.5, 9.0, math.nan])
def test_an_aspect_that_is_none(value: float) -> None:
    for kind in (AutoencoderStage, DecoderStage, AlignStage):
        with pytest.raises(UserError, match=r"max_aspect = .* 1 \(squares\) to 8"):
            kind(max_aspect=value)


def waves(seeds: list[int], size: Size) -> Tensor:
    """Smooth pictures (B,3,*size) in [-1,1], four waves a channel, known at the pixel centres of any size."""
    y = ((torch.arange(size[0]) + 0.5) / size[0])[:, None]
    x = ((torch.arange(size[1]) + 0.5) / size[1])[None]
    pictures = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        frequency = torch.randn(3, 4, 2, 1, 1, generator=generator) * 1.2
        phase = torch.rand(3, 4, 1, 1, generator=generator) * 2 * math.pi
        angle = 2 * math.pi * (frequency[:, :, 0] * y + frequency[:, :, 1] * x) + phase
        pictures.append(angle.cos().mean(dim=1))
    return torch.stack(pictures)


def trained(max_aspect: float, num_steps: int = 250) -> ImplicitDecoder:
    """A small decoder of 8 × 8 samples of such pictures, trained at the sizes that alignment stage 1 would draw."""
    torch.manual_seed(0)
    config = DecoderStage(min_size=8, max_size=32, max_aspect=max_aspect)
    small = DecoderConfig(
        norm="none", mid_attention=False, base_width=16, width_mult=(1,), num_res_blocks=1, mlp_width=32, mlp_depth=2
    )
    decoder = ImplicitDecoder(small, latent_channels=3)
    optimizer = torch.optim.Adam(decoder.parameters())
    for step in range(1, num_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        target = draw_target(config, MODEL, step)
        y0, x0, y1, x1 = target.window
        seeds = list(range(8 * step, 8 * step + 8))
        truth = waves(seeds, target.size)[:, :, y0:y1, x0:x1]
        loss = (decoder(waves(seeds, (8, 8)), target.size, target.window) - truth).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return decoder.eval()


@torch.no_grad()
def psnr(decoder: ImplicitDecoder, size: Size) -> float:
    """Of 64 pictures that training has not seen, in dB."""
    seeds = list(range(10**6, 10**6 + 64))
    error = decoder(waves(seeds, (8, 8)), size) - waves(seeds, size)
    return float(10 * torch.log10(4 / error.square().mean()))


@pytest.mark.slow
def test_a_decoder_trained_so_stretches_a_smooth_picture_as_well_as_it_enlarges_it() -> None:
    """2:1 against the square of as many pixels, both ways; a decoder of squares only is worse at it."""
    ours, squares = trained(2.0), trained(1.0)
    gain = {}
    for name, decoder in (("ours", ours), ("squares", squares)):
        stretched = 0.5 * (psnr(decoder, (16, 32)) + psnr(decoder, (32, 16)))
        gain[name] = stretched - psnr(decoder, (23, 23))
    assert gain["ours"] >= 0  # measured: +0.3 dB
    assert gain["ours"] > gain["squares"] + 0.1  # -0.1 dB
