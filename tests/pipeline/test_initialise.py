"""The linear start: a fresh network is already a resampler, and training moves it."""

import pytest
import torch
from torch import nn

from pipeline.autoencoder import Autoencoder
from pipeline.config import AutoencoderConfig, DecoderConfig
from pipeline.decoder import ImplicitDecoder
from pipeline.errors import UserError
from pipeline.initialise import initialise_autoencoder, initialise_decoder


def _smooth_picture(height: int, width: int) -> torch.Tensor:
    y = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width)[None, :].expand(height, width)
    return torch.stack([0.7 * x, 0.5 * y, 0.3 * x * y])[None].repeat(2, 1, 1, 1)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_autoencoder_begins_as_a_thumbnail_codec(kind):
    torch.manual_seed(0)
    config = AutoencoderConfig(
        kind=kind, base_width=16, width_mult=(1, 2, 2), num_res_blocks=1, norm_groups=2, num_embeddings=512
    )
    model = Autoencoder(config).eval()
    initialise_autoencoder(model)
    image = _smooth_picture(64, 48)
    with torch.no_grad():
        latent = model.encode(image)
        thumbnail = nn.functional.avg_pool2d(image, 4)
        inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
        torch.testing.assert_close(latent[inner], thumbnail[inner], atol=0.06, rtol=0)
        if kind == "kl":
            made = model.decoder(model.post_quant_conv(latent))
            error = (made - image)[:, :, 8:-8, 8:-8].abs().mean()
            assert error < 0.05


@pytest.mark.parametrize("kind", ["liif", "light"])
def test_decoder_begins_as_bilinear_interpolation(kind):
    torch.manual_seed(0)
    config = DecoderConfig(
        kind=kind, base_width=16, width_mult=(1, 2), num_res_blocks=1, norm_groups=2, mlp_width=24, light_width=24
    )
    decoder = ImplicitDecoder(config, 3).eval()
    initialise_decoder(decoder)
    latent = _smooth_picture(12, 9)
    with torch.no_grad():
        made = decoder(latent, (30, 41))
    expected = nn.functional.interpolate(latent, size=(30, 41), mode="bilinear", align_corners=False)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


def test_every_weight_of_the_residual_branches_learns_after_one_step():
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(base_width=16, width_mult=(1, 2), num_res_blocks=1, norm_groups=2, kind="kl"))
    initialise_autoencoder(model)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        (model.decoder(model.post_quant_conv(model.encode(image))) - image).abs().mean().backward()
        optimizer.step()
    still = [n for n, p in model.named_parameters() if p.grad is None or (n.endswith("weight") and not p.grad.any())]
    assert [n for n in still if "conv1" in n or "conv2" in n] == []


def test_a_network_without_room_is_refused():
    model = Autoencoder(AutoencoderConfig(base_width=32, width_mult=(1, 2), norm_groups=32, num_res_blocks=1))
    with pytest.raises(UserError, match="8 channels a norm group"):
        initialise_autoencoder(model)
