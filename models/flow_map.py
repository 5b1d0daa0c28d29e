"""Flow maps: one pass leads from one time of a flow to a later one, and a few make an image.

A map says the mean velocity u of each channel group between two of its times, and goes
x' = x + (t' - t) u; where a group's time stands still, so does the group. Between a time and itself
u is the flow's own velocity.

The mean velocity is learnt from points on the way of a flow that is given, by a solver: the target
of a flow map (flow map matching, Boffi et al. 2024, arXiv 2406.07507) from a teacher's steps
(progressive distillation, Salimans & Ho 2022, arXiv 2202.00512). A guided teacher leaves its
guidance in the map (Meng et al. 2022, arXiv 2210.03142), whose pass then is the only one of a step.
One clock or several alike, by times per group: our choice.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from models.clocks import Clock
from models.groups import ChannelGroups
from models.layers import TimeEmbedder
from models.lightningdit import LightningDiT
from models.solvers import everywhere, time_grid

FlowMap = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x_BCHW, t_BG, y_B, until_BG) -> mean velocity (B, C, H, W)."""


class FlowMapDiT(LightningDiT):
    """LightningDiT that is also told where to: the times until which its mean velocity is meant.

    What is added begins without effect, so that published weights load and say their velocity for
    every step.
    arguments: those of `LightningDiT`.
    """

    added = ("step_embedders.",)
    """Names of what the published network does not have; fresh where a checkpoint lacks it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.step_embedders = nn.ModuleList(TimeEmbedder(self.hidden_size) for _ in self.groups.names)
        for embedder in self.step_embedders:
            layers: Any = embedder.mlp
            first, last = layers[0], layers[2]
            nn.init.normal_(first.weight, std=0.02)
            for zero in (first.bias, last.weight, last.bias):
                nn.init.zeros_(zero)

    def forward(  # type: ignore[override]  # one return type instead of two overloads
        self, x_BCHW: Tensor, t_BG: Tensor, y_B: Tensor, until_BG: Tensor | None = None
    ) -> Tensor:
        """Mean velocity (B, C, H, W) from times t_BG to until_BG (None: the velocity at t_BG); the
        rest as `LightningDiT.forward`. Raises ValueError when shapes do not fit."""
        t_BG = self._checked_times(x_BCHW, t_BG, self.input_size)
        step_BG = torch.zeros_like(t_BG) if until_BG is None else until_BG.view_as(t_BG) - t_BG
        c_BD = self._condition(t_BG, y_B)
        for group, embedder in enumerate(self.step_embedders):
            c_BD = c_BD + embedder(step_BG[:, group])
        found = self._through_blocks(self.x_embedder(x_BCHW) + self.pos_embed, c_BD, self.feat_rope, False)
        assert isinstance(found, Tensor)  # without the projection of an alignment
        return found


class TrainableFlowMap(nn.Module):
    """A map and its objective as one module, so that a training engine can wrap the whole step's
    forward pass."""

    def __init__(self, model: nn.Module, groups: ChannelGroups) -> None:
        super().__init__()
        self.model = model
        self.groups = groups

    def forward(
        self, x_BCHW: Tensor, t_BG: Tensor, until_BG: Tensor, y_B: Tensor, end_BCHW: Tensor
    ) -> dict[str, Tensor]:
        """{"total": mean squared error of where the map leads, (scalar), "by_time/<group>": each
        step's length and error (2, B)}; all but the total detached.

        x_BCHW, end_BCHW: points of the flow at times t_BG and until_BG, in float32.
        """
        step_BG = until_BG - t_BG
        away = x_BCHW + self.groups.spread(step_BG) * self.model(x_BCHW, t_BG, y_B, until_BG).float() - end_BCHW
        squared = away.square()
        found = {"total": squared.mean()}
        each = squared.detach().flatten(2).mean(dim=2)
        for group, (name, part) in enumerate(zip(self.groups.names, self.groups.slices, strict=True)):
            found[f"by_time/{name}"] = torch.stack([step_BG[:, group], each[:, part].mean(dim=1)])
        return found


@torch.no_grad()
def walk(
    flow_map: FlowMap, noise_BCHW: Tensor, y_B: Tensor, *, clock: Clock, groups: ChannelGroups, evaluations: int
) -> Tensor:
    """Normalised latents from noise, in its dtype, by even steps of a map along a clock."""
    x_BCHW = noise_BCHW
    for now, ahead in pairwise(clock.at(g)[0] for g in time_grid(evaluations, clock.span)):
        times = [everywhere(t_G, x_BCHW) for t_G in (now, ahead)]
        mean = flow_map(x_BCHW, times[0], y_B, times[1]).to(x_BCHW.dtype)
        x_BCHW = x_BCHW + groups.weighted(mean, (ahead - now).tolist())
    return x_BCHW
