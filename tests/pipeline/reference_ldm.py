"""The latent-diffusion family's networks, written plainly, under its parameter names: what imports must compute.

Independent of the product's modules. Widths are multiples of 32; dropout and conditioning are left out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FirstStageResnet(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, cin, eps=1e-6), nn.GroupNorm(32, cout, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(cin, cout, 3, padding=1), nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class FirstStageAttention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2) for layer in (self.q, self.k, self.v))
        share = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1]), dim=2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", share, v).reshape(x.shape))


class Sampling(nn.Module):
    """Down: pad right and below, stride 2. Up: nearest, then a convolution."""

    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def _middle(channels: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1, mid.block_2 = FirstStageResnet(channels, channels), FirstStageResnet(channels, channels)
    mid.attn_1 = FirstStageAttention(channels)
    return mid


class Encoder(nn.Module):
    def __init__(self, widths: list[int], num_res_blocks: int, attends: list[bool], out_channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        previous = widths[0]
        for i, width in enumerate(widths):
            level = nn.Module()
            inputs = [previous] + [width] * (num_res_blocks - 1)
            level.block = nn.ModuleList(FirstStageResnet(c, width) for c in inputs)
            level.attn = nn.ModuleList(FirstStageAttention(width) for _ in inputs if attends[i])
            if i + 1 < len(widths):
                level.downsample = Sampling(width, down=True)
            self.down.append(level)
            previous = width
        self.mid = _middle(previous)
        self.norm_out = nn.GroupNorm(32, previous, eps=1e-6)
        self.conv_out = nn.Conv2d(previous, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for j, block in enumerate(level.block):
                x = block(x)
                x = level.attn[j](x) if len(level.attn) else x
            x = level.downsample(x) if hasattr(level, "downsample") else x
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, widths: list[int], num_res_blocks: int, attends: list[bool], in_channels: int) -> None:
        super().__init__()
        previous = widths[-1]
        self.conv_in = nn.Conv2d(in_channels, previous, 3, padding=1)
        self.mid = _middle(previous)
        levels = []
        for i in reversed(range(len(widths))):
            level = nn.Module()
            inputs = [previous] + [widths[i]] * num_res_blocks
            level.block = nn.ModuleList(FirstStageResnet(c, widths[i]) for c in inputs)
            level.attn = nn.ModuleList(FirstStageAttention(widths[i]) for _ in inputs if attends[i])
            if i > 0:
                level.upsample = Sampling(widths[i], down=False)
            levels.insert(0, level)
            previous = widths[i]
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(32, previous, eps=1e-6)
        self.conv_out = nn.Conv2d(previous, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(self.features(z))))

    def features(self, z: Tensor) -> Tensor:
        """All but the output layers; with the up-sampling layers removed too, this is D_phi."""
        x = self.conv_in(z)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for level in reversed(self.up):
            for j, block in enumerate(level.block):
                x = block(x)
                x = level.attn[j](x) if len(level.attn) else x
            x = level.upsample(x) if hasattr(level, "upsample") else x
        return x


class FirstStage(nn.Module):
    """KL (double_z) or VQ first stage."""

    def __init__(
        self, widths: list[int], num_res_blocks: int, attends: list[bool], channels: int, *, kl: bool, codes: int = 0
    ) -> None:
        super().__init__()
        stored = 2 * channels if kl else channels
        self.encoder = Encoder(widths, num_res_blocks, attends, stored)
        self.decoder = Decoder(widths, num_res_blocks, attends, channels)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(stored, stored, 1), nn.Conv2d(channels, channels, 1)
        if codes:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(codes, channels)

    def moments(self, image: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(image))

    def decode(self, z: Tensor) -> Tensor:
        if hasattr(self, "quantize"):
            table = self.quantize.embedding.weight
            nearest = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), table).argmin(dim=1)
            z = table[nearest].reshape(z.shape[0], z.shape[2], z.shape[3], -1).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(z))


class UNetResnet(nn.Module):
    """scale_shift: the embedding scales and shifts the second norm. resample "up" or "down": both paths change size."""

    def __init__(self, cin: int, cout: int, emb: int, scale_shift: bool = False, resample: str = "") -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, cin), nn.SiLU(), nn.Conv2d(cin, cout, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * cout if scale_shift else cout))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, cout), nn.SiLU(), nn.Identity(), nn.Conv2d(cout, cout, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.in_layers[2](self._resized(self.in_layers[:2](x)))
        shift = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            hidden = self.out_layers[1:](self.out_layers[0](hidden) * (1 + scale) + shift)
        else:
            hidden = self.out_layers(hidden + shift)
        return self.skip_connection(self._resized(x)) + hidden

    def _resized(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x


class UNetAttention(nn.Module):
    """Rows of qkv lie head by head: the query, key and value of head 0, then those of head 1, ..."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(32, channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        flat = x.flatten(2)
        width = channels // self.num_heads
        heads = self.qkv(self.norm(flat)).reshape(batch, self.num_heads, 3, width, -1)
        q, k, v = heads.unbind(2)
        share = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(width), dim=-1)
        out = (share @ v.transpose(2, 3)).transpose(2, 3).reshape(batch, channels, -1)
        return (flat + self.proj_out(out)).reshape(x.shape)


class UNetDown(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.op(x)


class UNetUp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """head_channels or num_heads; `fancy` has scale-shift norms and residual blocks between the levels."""

    def __init__(
        self,
        channels: int,
        base: int,
        mult: list[int],
        num_res_blocks: int,
        factors: list[int],
        *,
        head_channels: int = 0,
        num_heads: int = 0,
        fancy: bool = False,
    ) -> None:
        super().__init__()

        def resnet(cin: int, cout: int, resample: str = "") -> UNetResnet:
            return UNetResnet(cin, cout, emb, scale_shift=fancy, resample=resample)

        def attend(width: int) -> UNetAttention:
            return UNetAttention(width, num_heads or width // head_channels)

        self.base, emb = base, 4 * base
        self.time_embed = nn.Sequential(nn.Linear(base, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels, base, 3, padding=1)])])
        widths, current = [base], base
        for i, m in enumerate(mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [resnet(current, base * m)]
                current = base * m
                if 2**i in factors:
                    layers.append(attend(current))
                self.input_blocks.append(nn.ModuleList(layers))
                widths.append(current)
            if i + 1 < len(mult):
                self.input_blocks.append(
                    nn.ModuleList([resnet(current, current, "down") if fancy else UNetDown(current)])
                )
                widths.append(current)
        attention = attend(current)
        self.middle_block = nn.ModuleList([resnet(current, current), attention, resnet(current, current)])
        self.output_blocks = nn.ModuleList()
        for i in reversed(range(len(mult))):
            for j in range(num_res_blocks + 1):
                layers = [resnet(current + widths.pop(), base * mult[i])]
                current = base * mult[i]
                if 2**i in factors:
                    layers.append(attend(current))
                if i > 0 and j == num_res_blocks:
                    layers.append(resnet(current, current, "up") if fancy else UNetUp(current))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(nn.GroupNorm(32, current), nn.SiLU(), nn.Conv2d(current, channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.base // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = t[:, None].float() * frequencies
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        x = self.input_blocks[0][0](x)
        skips = [x]
        for block in self.input_blocks[1:]:
            for layer in block:
                x = layer(x, emb)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, emb)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in block:
                x = layer(x, emb)
        return self.out(x)
