"""Where a parameter of ours lies in a checkpoint: our name → name in the latent-diffusion family.

CompVis' and the released checkpoints share the first stage's and the U-Net's naming; they differ in how the parts are
nested (see latent_diffusion.py). Our modules carry diffusers' names. Levels of an up path count from deep to shallow
here and from shallow to deep there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint, or, with `part` 0, 1 or 2, its query, key or value rows."""

    key: str
    part: int | None = None


_RESNET = {"conv_shortcut": "nin_shortcut"}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_DOWN = {"conv": "op"}
_UNET_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def first_stage_name(name: str, num_levels: int) -> str:
    """A parameter of an encoder, a convolutional decoder or D_phi, without the module's prefix ("mid_block. ...")."""
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        way, level, kind, index, rest = match.groups()
        level = level if way == "down" else str(num_levels - 1 - int(level))
        block = "block" if kind == "resnets" else "attn"
        return f"{way}.{level}.{block}.{index}.{_rename(rest, _RESNET if kind == 'resnets' else _ATTENTION)}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv\.(.+)", name):
        way, level, _, rest = match.groups()
        level = level if way == "down" else str(num_levels - 1 - int(level))
        return f"{way}.{level}.{way}sample.conv.{rest}"
    if match := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", name):
        return f"mid.block_{int(match[1]) + 1}.{_rename(match[2], _RESNET)}"
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", name):
        return f"mid.attn_1.{_rename(match[1], _ATTENTION)}"
    return _rename(name, {"conv_norm_out": "norm_out"})


def unet_source(name: str, num_res_blocks: int, up_attends: tuple[bool, ...]) -> Source:
    """A parameter of the U-Net, without the module's prefix. up_attends: whether each up level has attention."""
    per_level = num_res_blocks + 1
    if match := re.fullmatch(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnets|attentions)\.(\d+)\.(.+)", name):
        way, level, kind, index, rest = match.groups()
        if way == "mid":
            block = f"middle_block.{2 * int(index) if kind == 'resnets' else 1}"
        elif way == "down":
            block = f"input_blocks.{1 + int(level) * per_level + int(index)}.{int(kind == 'attentions')}"
        else:
            block = f"output_blocks.{int(level) * per_level + int(index)}.{int(kind == 'attentions')}"
        return Source(f"{block}.{_rename(rest, _UNET_RESNET)}") if kind == "resnets" else _unet_attention(block, rest)
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.(.+)", name):
        return Source(f"input_blocks.{(int(match[1]) + 1) * per_level}.0.{_rename(match[2], _UNET_RESNET | _DOWN)}")
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.(.+)", name):
        level = int(match[1])
        block = f"output_blocks.{level * per_level + num_res_blocks}.{2 if up_attends[level] else 1}"
        return Source(f"{block}.{_rename(match[2], _UNET_RESNET)}")
    return Source(_rename(name, _UNET_OUTER))


def head_name(name: str, depth: int) -> str:
    """A parameter of the implicit decoder's MLP ("hidden.0.weight", "out.bias"): linear layers alternate with ReLUs."""
    if match := re.fullmatch(r"hidden\.(\d+)\.(.+)", name):
        return f"layers.{2 * int(match[1])}.{match[2]}"
    return _rename(name, {"out": f"layers.{2 * depth}"})


def ema_name(key: str) -> str:
    """The moving average's name for a parameter: the training framework drops the dots."""
    return "model_ema." + key.replace(".", "")


def _unet_attention(block: str, rest: str) -> Source:
    stem, kind = rest.rsplit(".", 1)
    if stem in ("to_q", "to_k", "to_v"):
        return Source(f"{block}.qkv.{kind}", part=("to_q", "to_k", "to_v").index(stem))
    return Source(f"{block}.{_rename(rest, {'group_norm': 'norm', 'to_out.0': 'proj_out'})}")


def _rename(name: str, table: dict[str, str]) -> str:
    """`name` ("stem.weight") with its stem looked up in `table`."""
    stem, _, kind = name.rpartition(".")
    return f"{table.get(stem, stem)}.{kind}"
