"""A cascade of resolutions (LowDiff, papers.md 3): one network makes a coarse result first, then each finer one on
the condition of the last.

The paper fixes the idea. Averages as coarse targets, the corruption of conditions and its level as an input follow
cascaded diffusion (CDM) and are our choices, see docs/lowdiff.md. Nothing here knows a backbone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from models.objectives import TrainableVelocity
from models.routing import Route

Upsample = Literal["bilinear", "nearest"]


@dataclass(frozen=True)
class Cascade:
    """The resolutions of a cascade and the ways between them.

    sides: coarsest first; each divides the last.
    upsample: how a lower result is brought to a finer side.
    Raises ValueError naming what does not fit.
    """

    sides: tuple[int, ...]
    upsample: Upsample = "bilinear"

    def __post_init__(self) -> None:
        if list(self.sides) != sorted(set(self.sides)) or any(self.sides[-1] % side for side in self.sides):
            raise ValueError(f"sides must rise and divide the last, found {self.sides}")
        if self.upsample not in get_args(Upsample):
            raise ValueError(f"upsample must be one of {', '.join(get_args(Upsample))}, found '{self.upsample}'")

    def below(self, side: int) -> int | None:
        """The next coarser side; None below the coarsest."""
        index = self.sides.index(side)
        return self.sides[index - 1] if index else None

    def lowered(self, x_BCHW: Tensor, side: int) -> Tensor:
        """Averages over the cells that make up one of a coarser grid, (B, C, side, side)."""
        factor = x_BCHW.shape[-1] // side
        return x_BCHW if factor == 1 else F.avg_pool2d(x_BCHW, factor)

    def raised(self, x_BCHW: Tensor, side: int) -> Tensor:
        """A lower result at a finer side, (B, C, side, side)."""
        if self.upsample == "nearest":
            return F.interpolate(x_BCHW, size=(side, side), mode="nearest")
        return F.interpolate(x_BCHW, size=(side, side), mode="bilinear", align_corners=False)

    def condition(self, lower_BCHW: Tensor, noise_BCHW: Tensor, level_B: Tensor, side: int) -> Tensor:
        """A lower result as the condition of a finer side: a share `level_B` of it replaced by noise of its own
        shape, then raised. Noise comes before raising because that is where a sampled result errs.
        """
        level = level_B.view(-1, 1, 1, 1).to(lower_BCHW.dtype)
        return self.raised((1 - level) * lower_BCHW + level * noise_BCHW.to(lower_BCHW.dtype), side)


@dataclass(frozen=True)
class Conditioned:
    """A network with its condition filled in: the (x, t, y) -> velocity that objectives, guidance and solvers know.

    condition_BCHW, level_B: as for `CascadeDiT.forward`; None at the coarsest resolution.
    """

    model: Callable[..., Any]
    condition_BCHW: Tensor | None = None
    level_B: Tensor | None = None
    augment_BA: Tensor | None = None
    """Of a network that knows augmentation (`CascadeUNet`)."""

    def __call__(self, x_BCHW: Tensor, t_BG: Tensor, y_B: Tensor, *, route: Route | None = None) -> Tensor:
        told: dict[str, Any] = {} if self.augment_BA is None else {"augment_BA": self.augment_BA}
        if route is not None:
            told["route"] = route
        velocity: Tensor = self.model(x_BCHW, t_BG, y_B, self.condition_BCHW, self.level_B, **told)
        return velocity

    def forward_with_alignment(
        self, x_BCHW: Tensor, t_BG: Tensor, y_B: Tensor, *, route: Route | None = None
    ) -> tuple[Tensor, Tensor]:
        """(velocity_BCHW, projection_BDhw) on the grid of x."""
        found: tuple[Tensor, Tensor] = self.model(
            x_BCHW, t_BG, y_B, self.condition_BCHW, self.level_B, with_alignment=True, route=route
        )
        return found


class TrainableCascade(TrainableVelocity):
    """A network over several resolutions and its objective; each batch is of one resolution."""

    def forward(  # type: ignore[override]  # further arguments
        self,
        x1_BCHW: Tensor,
        y_B: Tensor,
        noise_BCHW: Tensor,
        u_B: Tensor,
        align_target_BChw: Tensor | None = None,
        images_seen: int = 0,
        *,
        condition_BCHW: Tensor,
        level_B: Tensor,
        weight: float = 1.0,
        augment_BA: Tensor | None = None,
        kept_BK: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As `TrainableVelocity.forward`, on the batch's condition; `by_time/<side>/<group>` for each resolution.

        condition_BCHW, level_B: see `CascadeDiT.forward`; zeros at level 1 where there is no condition.
        weight: of the resolution's loss in the total.
        augment_BA: what was done to the images, where the network is told.
        """
        model = Conditioned(self.model, condition_BCHW, level_B, augment_BA)
        terms = self._terms(model, x1_BCHW, y_B, noise_BCHW, u_B, align_target_BChw, images_seen, kept_BK)
        side = x1_BCHW.shape[-1]
        found = {name.replace("by_time/", f"by_time/{side}/"): value for name, value in terms.as_dict().items()}
        return found | {"total": weight * found["total"]}


def no_condition(x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """What stands for a missing condition: zeros, at level 1 (nothing is known)."""
    return torch.zeros_like(x_BCHW), torch.ones(len(x_BCHW), device=x_BCHW.device)
