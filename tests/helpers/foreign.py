"""Small autoencoders of diffusers with random weights, saved as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

KL: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 32,
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {**KL, "latent_channels": 4},
    "AutoencoderKLFlux2": {**KL, "latent_channels": 8, "decoder_block_out_channels": (8, 16, 16, 16)},
    "AutoencoderDC": {
        "latent_channels": 6,
        "attention_head_dim": 8,
        "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (12, 24, 24, 24),
        "decoder_block_out_channels": (12, 24, 24, 24),
        "encoder_layers_per_block": (1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1),
        "encoder_qkv_multiscales": ((), (), (5,), (5,)),
        "decoder_qkv_multiscales": ((), (), (5,), (5,)),
        "scaling_factor": 0.41407,
    },
    "AutoencoderRAE": {
        "encoder_hidden_size": 64,
        "encoder_num_hidden_layers": 2,
        "encoder_patch_size": 14,
        "encoder_input_size": 56,
        "patch_size": 8,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 64,
    },
}
"""Of each class, for images of 32 × 32."""
SIZES = {"AutoencoderKL": (4, 8), "AutoencoderKLFlux2": (8, 8), "AutoencoderDC": (6, 8), "AutoencoderRAE": (64, 8)}
"""Channels and downscale."""


def theirs(class_name: str, **changes: Any) -> Any:
    """The network, its weights spread so that every layer matters."""
    import diffusers

    torch.manual_seed(0)
    network = getattr(diffusers, class_name)(**(ARGUMENTS[class_name] | changes)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        if class_name == "AutoencoderRAE":
            for name, scale in (("_latents_mean", 0.1), ("_latents_std", 1.5)):
                getattr(network, name).fill_(scale)
    return network


def saved(folder: Path, class_name: str, shard: str | None = None, **changes: Any) -> nn.Module:
    """The network, saved in `folder` as diffusers saves it. shard: the largest size of a file, e.g. "20KB"."""
    network = theirs(class_name, **changes)
    network.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return network


def section(class_name: str, location: object, **changes: Any) -> dict[str, Any]:
    """`train_vavae.model` of a recipe."""
    channels, downscale = SIZES[class_name]
    found = {"kind": "diffusers", "class_name": class_name, "location": str(location)}
    return found | {"channels": channels, "downscale": downscale} | changes
