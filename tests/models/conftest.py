"""What the tests of models/ share: one thread, and networks small enough to build in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from models.groups import ChannelGroups
from models.lightningdit import LightningDiT

PAIR = ChannelGroups(("texture", "semantic"), (4, 2))
SMALL_UNET: dict[str, Any] = {
    "resolutions": (8, 16),
    "num_classes": 4,
    "channels": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "norm_channels": 4,
    "attention": (8,),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def stirred(model: nn.Module, seed: int = 1) -> nn.Module:
    """The network with all its weights random: a fresh one outputs zeros and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def small_dit(**changes: Any) -> LightningDiT:
    """A two-clock network of the SFD kind."""
    arguments: dict[str, Any] = {
        "input_size": 4,
        "in_channels": 6,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
        "groups": PAIR,
        "qk_norm": True,
        "align_depth": 1,
        "align_dim": 12,
        "align_hidden": 16,
    }
    return stirred(LightningDiT(**(arguments | changes)))  # type: ignore[return-value]


def small_batch(count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, t, y for `small_dit`."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 6, 4, 4, generator=generator)
    return x, torch.rand(count, 2, generator=generator), torch.arange(count) % 5
