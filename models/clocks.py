"""Clocks: how one global time becomes one time per channel group, in training and in sampling.

The global time g runs over [0, span]; group i starts at its offset o_i and ends one unit later:
t_i = clamp(g - o_i, 0, 1). Source: papers.md 2.5 and 2.6 for semantic-first; arbitrary offsets are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Clock(Protocol):
    """What objectives and solvers need of a clock."""

    @property
    def groups(self) -> int:
        """Number of channel groups G."""
        ...

    @property
    def span(self) -> float:
        """End of the global time; 1 when all groups run together."""
        ...

    def train_times(self, u_B: Tensor) -> Tensor:
        """Times (B, G) in [0, 1] from one number in (0, 1) per image."""
        ...

    def at(self, global_time: Tensor) -> tuple[Tensor, Tensor]:
        """Times and activity masks (bool), (G,) for a scalar global time, (B, G) for one per image."""
        ...


@dataclass(frozen=True)
class Offsets:
    """Group i starts `offsets[i]` after the earliest one.

    Raises ValueError when an offset is negative or none is 0: somebody has to start at g = 0.
    """

    offsets: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", tuple(float(offset) for offset in self.offsets))
        if not self.offsets or min(self.offsets) != 0.0:
            raise ValueError(f"clock offsets must be at least 0 and the smallest 0, found {self.offsets}")

    @property
    def groups(self) -> int:
        """Number of channel groups G."""
        return len(self.offsets)

    @property
    def span(self) -> float:
        """End of the global time: the last group ends here."""
        return 1.0 + max(self.offsets)

    def train_times(self, u_B: Tensor) -> Tensor:
        """Stretch u over [0, span], then read each group's clock: (B,) -> (B, G), dtype kept."""
        return self._times(u_B * self.span)

    def at(self, global_time: Tensor) -> tuple[Tensor, Tensor]:
        """Times and masks at g, bounds included: a group moves while o_i <= g <= 1 + o_i.

        An adaptive solver may look beyond the span; there the clock of the group that ends last runs on past
        1, as published: clamping it would change the error estimate and with it the last step.
        """
        g = global_time.unsqueeze(-1)
        masks = []
        for offset in self.offsets:
            started = g >= offset if offset > 0 else torch.ones_like(g, dtype=torch.bool)
            # The group that ends last is never stopped: rounding must not freeze the final evaluation.
            running = g <= 1.0 + offset if 1.0 + offset < self.span else torch.ones_like(started)
            masks.append(started & running)
        beyond = (g - self.span).clamp_min(0.0)
        late = [beyond if 1.0 + offset == self.span else torch.zeros_like(g) for offset in self.offsets]
        return self._times(global_time) + torch.cat(late, dim=-1), torch.cat(masks, dim=-1)

    def _times(self, g: Tensor) -> Tensor:
        return torch.stack([(g - offset).clamp(0.0, 1.0) for offset in self.offsets], dim=-1)


def Synchronous(groups: int = 1) -> Offsets:
    """All groups share one time."""
    return Offsets((0.0,) * groups)


def SemanticFirst(delta: float = 0.3) -> Offsets:
    """Two groups (texture, semantic); semantics lead by `delta` (0 = synchronous, 1 = one after the other)."""
    return Offsets((float(delta), 0.0))
