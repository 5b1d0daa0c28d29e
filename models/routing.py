"""Token routing: in training, some tokens go around the middle blocks of a transformer and join the others after them.

Source: TREAD (arXiv 2501.04765). The routed tokens keep what they were before the first of these blocks, so that no
weight is added and a network samples as it always did. Which tokens are kept is the caller's: they belong to the
image, and their number is the same for all, so that graphs and shapes stay static.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.sizes import kept_count


@dataclass(frozen=True)
class Route:
    """first, last: blocks (1 = the network's first, both included) through which only the kept tokens go.
    kept_BK: their numbers, rising within an image, int64.
    """

    first: int
    last: int
    kept_BK: Tensor

    def taken(self, x_BND: Tensor) -> Tensor:
        """The kept tokens (B, K, D)."""
        return x_BND.gather(1, self._index(x_BND))

    def values(self, first_BKNI: Tensor) -> Tensor:
        """Of the kept tokens, an attention's values (B, heads, N, width)."""
        index = self.kept_BK[:, None, :, None].expand(-1, first_BKNI.shape[1], -1, first_BKNI.shape[-1])
        return first_BKNI.gather(2, index)

    def returned(self, x_BKD: Tensor, around_BND: Tensor) -> Tensor:
        """All tokens again: the kept ones as they are now, the others as they went around."""
        return around_BND.scatter(1, self._index(around_BND), x_BKD.to(around_BND.dtype))

    def _index(self, x_BND: Tensor) -> Tensor:
        return self.kept_BK.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1])


class RoutedPass(nn.Module):
    """A network without a label, through whose blocks from `first` to `last` only some tokens go: the guide of SPRINT
    (arXiv 2510.21986), which costs less than the pass that it guides.

    The kept tokens are the same for all images and passes, drawn once for a grid: our choice, so that an image depends
    on its number alone.
    """

    def __init__(self, model: nn.Module, first: int, last: int, drop: float) -> None:
        super().__init__()
        self.model = model
        self.routed = first, last, drop
        self._kept: dict[tuple[int, torch.device], Tensor] = {}

    def forward(self, x_BCHW: Tensor, t_BG: Tensor, y_B: Tensor, *condition: Tensor | None) -> Tensor:
        """Velocity at x_BCHW; of the labels y_B only their number counts."""
        model: Any = self.model
        first, last, drop = self.routed
        grid = (x_BCHW.shape[-1] // model.patch_size) ** 2, x_BCHW.device
        if grid not in self._kept:  # once, so that a recorded pass copies nothing from the host
            draws = torch.randn(1, grid[0], generator=torch.Generator().manual_seed(0))
            self._kept[grid] = kept_tokens(draws, drop).to(x_BCHW.device)
        route = Route(first, last, self._kept[grid].expand(len(x_BCHW), -1))
        velocity: Tensor = model(x_BCHW, t_BG, torch.full_like(y_B, model.null_label), *condition, route=route)
        return velocity


def kept_tokens(draws_BN: Tensor, drop: float) -> Tensor:
    """Numbers (B, K), rising, of the tokens with the largest of an image's random numbers (B, N)."""
    count = kept_count(draws_BN.shape[1], drop)
    return torch.topk(draws_BN, count, dim=1).indices.sort(dim=1).values
