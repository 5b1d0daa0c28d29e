"""An exponential moving average of weights in float32, beside the network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """Starts as a copy and follows after each good step: e += (1 - decay) (w - e) (papers.md 1.5).

    live: the weights as this worker holds them, by name; the averages are held alike.
    """

    def __init__(self, live: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._live = dict(live)
        self.averages = {name: tensor.detach().float().clone() for name, tensor in live.items()}

    @torch.no_grad()
    def update(self, bad: Tensor) -> None:
        """Follow the weights, unless `bad` (a scalar on their device, 0 or 1) says that the step was left out."""
        averages = list(self.averages.values())
        away = torch._foreach_sub([tensor.detach().float() for tensor in self._live.values()], averages)
        torch._foreach_mul_(away, (1 - self.decay) * (1 - bad))
        torch._foreach_add_(averages, away)

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint. Raises KeyError where it lacks a weight."""
        for name, average in self.averages.items():
            average.copy_(averages[name])
