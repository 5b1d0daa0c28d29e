"""Our tokenizer as diffusers' `AutoencoderKL`: the same network under other names, where theirs can be built so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def config_of(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments of diffusers' `AutoencoderKL` for ours (`models.autoencoder`), or None where it has no such network.

    It begins at the first level's width and at full resolution, and its moments have as many channels as the latents.
    """
    multipliers, z_channels = arguments["channel_multipliers"], arguments["z_channels"]
    widened = arguments.get("embed_dim") not in (None, z_channels)
    beside = arguments.get("patch_size", 1) > 1 or arguments.get("linear_path", False)
    if multipliers[0] != 1 or widened or beside:
        return None
    levels = range(len(multipliers))
    attended = [level in arguments["attention_levels"] for level in levels]
    decoded = [attends and arguments.get("decoder_attention", True) for attends in reversed(attended)]
    return {
        "in_channels": arguments.get("in_channels", 3),
        "out_channels": arguments.get("out_channels", 3),
        "block_out_channels": [arguments["base_channels"] * each for each in multipliers],
        "down_block_types": ["AttnDownEncoderBlock2D" if each else "DownEncoderBlock2D" for each in attended],
        "up_block_types": ["AttnUpDecoderBlock2D" if each else "UpDecoderBlock2D" for each in decoded],
        "layers_per_block": arguments["blocks_per_level"],
        "latent_channels": z_channels,
        "norm_num_groups": arguments.get("norm_groups", 32),
        "scaling_factor": 1.0,
    }


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ours under diffusers' names; attention's 1 × 1 convolutions become matrices there."""
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up."))
    found = {}
    for name, value in tensors.items():
        new = _name(name, last)
        matrix = ".attentions." in new and value.ndim == 4
        found[new] = (value[:, :, 0, 0] if matrix else value).contiguous()
    return found


def _name(name: str, last: int) -> str:
    if match := re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(\w+)\.(\w+)", name):
        side, way, level, what, number, part, kind = match.groups()
        level = level if way == "down" else str(last - int(level))
        own = ("resnets", _BLOCK) if what == "block" else ("attentions", _ATTENTION)
        return f"{side}.{way}_blocks.{level}.{own[0]}.{number}.{own[1][part]}.{kind}"
    if match := re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d+)\.(down|up)sample\.conv\.(\w+)", name):
        side, way, level, _, kind = match.groups()
        level = level if way == "down" else str(last - int(level))
        return f"{side}.{way}_blocks.{level}.{way}samplers.0.conv.{kind}"
    if match := re.fullmatch(r"(encoder|decoder)\.mid\.(block|attn)_(\d)\.(\w+)\.(\w+)", name):
        side, what, number, part, kind = match.groups()
        own = ("resnets", _BLOCK) if what == "block" else ("attentions", _ATTENTION)
        return f"{side}.mid_block.{own[0]}.{int(number) - 1}.{own[1][part]}.{kind}"
    return name.replace(".norm_out.", ".conv_norm_out.")
