"""Channel groups: which channels of a composite latent share a clock, a loss weight and a guidance scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChannelGroups:
    """Named, contiguous groups of channels, in the order in which they lie in the latent.

    Raises ValueError when names and sizes do not pair up, a name repeats or a size is not positive.
    Source: SFD's composite latent (papers.md 2.1); arbitrary groups are our generalisation.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if not self.names or len(self.names) != len(self.sizes):
            raise ValueError(f"channel groups need one size per name, found names {self.names} and sizes {self.sizes}")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"channel group names must differ, found {self.names}")
        if any(size < 1 for size in self.sizes):
            raise ValueError(f"channel group sizes must be at least 1, found {self.sizes}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def channels(self) -> int:
        """Channels of the whole latent."""
        return sum(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """One channel slice per group, in order."""
        starts = [sum(self.sizes[:i]) for i in range(len(self))]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))

    def slice_of(self, name: str) -> slice:
        """The channels of one group. Raises KeyError naming the known groups."""
        if name not in self.names:
            raise KeyError(f"no channel group '{name}'; this latent has {', '.join(self.names)}")
        return self.slices[self.names.index(name)]

    def split(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Views of x_BCHW, one per group. Raises ValueError when the channels do not add up."""
        if x_BCHW.shape[1] != self.channels:
            raise ValueError(
                f"expected {self.channels} channels ({dict(zip(self.names, self.sizes, strict=True))}), "
                f"found {x_BCHW.shape[1]}"
            )
        return tuple(x_BCHW.split(self.sizes, dim=1))

    def spread(self, per_group_BG: Tensor) -> Tensor:
        """Repeat one value per group over its channels: (B, G) -> (B, C, 1, 1), any dtype."""
        parts = [
            per_group_BG[:, i : i + 1].expand(-1, size).unsqueeze(-1).unsqueeze(-1) for i, size in enumerate(self.sizes)
        ]
        return torch.cat(parts, dim=1)

    def weighted(self, x_BCHW: Tensor, weights: Sequence[float]) -> Tensor:
        """x_BCHW with each group's channels times a number that the host knows: nothing is copied to the device, and
        where all are 1 nothing is done.
        """
        if all(weight == 1 for weight in weights):
            return x_BCHW
        parts = zip(self.split(x_BCHW), weights, strict=True)
        return torch.cat([part if weight == 1 else part * weight for part, weight in parts], dim=1)


def single_group(channels: int) -> ChannelGroups:
    """All channels in one group: the plain LightningDiT case."""
    return ChannelGroups(("latent",), (channels,))


SFD = ChannelGroups(("texture", "semantic"), (32, 16))
