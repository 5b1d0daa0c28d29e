"""An exponential moving average of a network's weights in float32, beside the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ema:
    """Starts as a copy and follows after each step: e += (1 - decay) (w - e) (papers.md 1.5)."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self._names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        self._live = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._averages = [parameter.detach().float().clone() for parameter in self._live]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._averages, [live.detach().float() for live in self._live], 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self._names, self._averages, strict=True))

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint. Raises KeyError where it lacks a weight."""
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(state[name])
