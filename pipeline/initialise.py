"""Starting weights that make a fresh network the linear resampler it has to surpass.

Random weights need thousands of steps to learn that an image's latent may begin as its thumbnail. Here the residual
stream of every network carries the picture through from the first step on, so training only adds what linear
resampling lacks. The same ideas as Dirac and zero-residual initialisation (Zagoruyko & Komodakis 2017; Zhang, Dauphin &
Ma, "Fixup", 2019), applied to norm-activation-convolution blocks:

  channels 0-2 of the stream carry +x, 3-5 carry -x, 6 and 7 a constant ±ANCHOR; the others start at zero;
  residual branches start at zero (their last convolution), shortcuts and samplers keep the 8 channels apart;
  silu(a) - silu(-a) = a and relu(a) - relu(-a) = a, so reading both signs passes the activation unchanged;
  the constants dominate the first group's variance, so the final group norm hardly depends on the picture.

Applies to autoencoders and decoders with 3 latent channels and at least 8 channels a norm group.
"""

from __future__ import annotations

from typing import cast

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from pipeline.autoencoder import Autoencoder
from pipeline.decoder import ImplicitDecoder
from pipeline.errors import UserError
from pipeline.liif import LiifHead
from pipeline.plain_trunk import ResidualBlock

CARRIERS = 8
ANCHOR = 4.0
LOG_VARIANCE = -8.0


@torch.no_grad()
def initialise_autoencoder(autoencoder: Autoencoder) -> None:
    """In place: the encoder averages f × f pixels, the decoder interpolates bilinearly (but for its edges)."""
    config = autoencoder.config
    _require_room(config.latent_channels, min(config.widths), config.norm_groups)
    encoder = autoencoder.encoder
    _carry_in(encoder.conv_in)
    _carry_stream(encoder)
    _read_out(encoder.conv_norm_out, encoder.conv_out)
    _identity_1x1(autoencoder.quant_conv)
    if config.kind == "kl":
        autoencoder.quant_conv.weight[3:].zero_()
        cast(Tensor, autoencoder.quant_conv.bias)[3:] = LOG_VARIANCE
    if autoencoder.has_decoder:
        _identity_1x1(autoencoder.post_quant_conv)
        _carry_in(autoencoder.decoder.conv_in)
        _carry_stream(autoencoder.decoder)
        _read_out(cast(nn.GroupNorm, autoencoder.decoder.conv_norm_out), autoencoder.decoder.conv_out)
    if config.kind == "vq":  # codes spread over the latent's range, [-1, 1]
        autoencoder.quantizer.embedding.weight.uniform_(-1.0, 1.0)


@torch.no_grad()
def initialise_decoder(decoder: ImplicitDecoder) -> None:
    """In place: the implicit decoder interpolates a thumbnail-like latent bilinearly."""
    has_norm = decoder.config.norm == "group"
    groups = decoder.config.norm_groups if has_norm else 1
    _require_room(decoder.latent_channels, min(decoder.config.widths), groups)
    _identity_1x1(decoder.trunk.post_quant_conv)
    if has_norm:
        _carry_in(decoder.trunk.conv_in)
    else:
        _carry_signs(decoder.trunk.conv_in)
    _carry_stream(decoder.trunk)
    head = decoder.head
    layers = [cast(nn.Linear, layer) for layer in head.hidden]
    if isinstance(head, LiifHead):
        _carry_linear(layers[0])
        layers = layers[1:]
    else:
        first, second = cast(nn.Conv2d, head.field[0]), cast(nn.Conv2d, head.field[2])
        first.weight[:6].zero_()
        cast(Tensor, first.bias)[:6].zero_()
        second.weight[:6].zero_()
        cast(Tensor, second.bias)[:6].zero_()
        for c in range(6):
            first.weight[c, c] = 1.0
            second.weight[c, c], second.weight[c, (c + 3) % 6] = 1.0, -1.0
        head.pixel_size.weight[:6].zero_()
        head.pixel_size.bias[:6].zero_()
        second.weight[head.width : head.width + 6].zero_()  # no slopes in the carried channels
        second.weight[2 * head.width : 2 * head.width + 6].zero_()
        cast(Tensor, second.bias)[head.width : head.width + 6].zero_()
        cast(Tensor, second.bias)[2 * head.width : 2 * head.width + 6].zero_()
    for layer in layers:
        _carry_linear(layer)
    head.out.weight.zero_()
    head.out.bias.zero_()
    for c in range(3):
        head.out.weight[c, c], head.out.weight[c, c + 3] = 1.0, -1.0


def _require_room(latent_channels: int, width: int, groups: int) -> None:
    if latent_channels != 3 or width // groups < CARRIERS:
        raise UserError(
            f"the linear start needs 3 latent channels and {CARRIERS} channels a norm group; this network has "
            f"{latent_channels} and {width // groups}"
        )


def _carry_in(conv: nn.Conv2d) -> None:
    """3 → width: +x, -x and the two constants; the rest of the stream starts at zero."""
    bias = cast(Tensor, conv.bias)
    conv.weight.zero_()
    bias.zero_()
    _carry_signs(conv)
    bias[6], bias[7] = ANCHOR, -ANCHOR


def _carry_signs(conv: nn.Conv2d) -> None:
    """3 → width: +x and -x; the rest as it is. Without group norms no constants are needed to steady them, and the
    other channels may begin as random features."""
    conv.weight[:6].zero_()
    cast(Tensor, conv.bias)[:6].zero_()
    for c in range(3):
        conv.weight[c, c, 1, 1], conv.weight[c + 3, c, 1, 1] = 1.0, -1.0


def _carry_stream(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, (ResnetBlock2D, ResidualBlock)):
            module.conv2.weight.zero_()
            cast(Tensor, module.conv2.bias).zero_()
            if module.conv_shortcut is not None:
                _carry_conv(module.conv_shortcut, torch.ones(1, 1))
        elif isinstance(module, Downsample2D):
            _carry_conv(module.conv, _outer([0.5, 0.5, 0.0]))
        elif isinstance(module, Upsample2D):
            _carry_conv(cast(nn.Conv2d, module.conv), _outer([0.25, 0.5, 0.25]))
        elif hasattr(module, "to_out") and isinstance(module.to_out, nn.ModuleList):
            cast(nn.Linear, module.to_out[0]).weight.zero_()
            cast(nn.Linear, module.to_out[0]).bias.zero_()


def _carry_conv(conv: nn.Conv2d, kernel: Tensor) -> None:
    """Every channel keeps to itself, filtered by `kernel`; channels that come new start at zero."""
    conv.weight.zero_()
    cast(Tensor, conv.bias).zero_()
    for c in range(min(conv.in_channels, conv.out_channels)):
        conv.weight[c, c] = kernel
    # Stride and padding act on the constants too; only the inner part of the picture needs them exact.


def _read_out(norm: nn.GroupNorm, conv: nn.Conv2d) -> None:
    """Group norm, SiLU, convolution: pass +x minus -x. Undoes the division by the first group's deviation."""
    size = norm.num_channels // norm.num_groups
    deviation = (2 * ANCHOR**2 / size) ** 0.5
    norm.weight[:CARRIERS] = deviation
    norm.bias[:CARRIERS] = 0.0
    conv.weight.mul_(0.01)
    cast(Tensor, conv.bias).zero_()
    conv.weight[:3, :CARRIERS] = 0.0
    for c in range(3):
        conv.weight[c, c, 1, 1], conv.weight[c, c + 3, 1, 1] = 1.0, -1.0


def _identity_1x1(conv: nn.Conv2d) -> None:
    conv.weight.zero_()
    cast(Tensor, conv.bias).zero_()
    for c in range(min(conv.in_channels, conv.out_channels)):
        conv.weight[c, c] = 1.0


def _carry_linear(layer: nn.Linear) -> None:
    layer.weight[:6].zero_()
    layer.bias[:6].zero_()
    for c in range(6):
        layer.weight[c, c] = 1.0


def _outer(taps: list[float]) -> Tensor:
    kernel = torch.tensor(taps)
    return kernel[:, None] * kernel[None, :]
