"""From noise to latents as a sample of the recipe goes there, as a scheduler that diffusers loads and saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from models.cascade import Cascade, Conditioned
from models.clocks import Offsets
from models.edm import sample as denoise
from models.edm import sigma_grid
from models.groups import ChannelGroups
from models.guidance import AutoGuidance, ClassifierFree, Velocity
from models.solvers import sample as solve

_DRAWS_PER_STAGE = 1 << 32
_CONDITION = 1 << 31


class LatentforgeScheduler(SchedulerMixin, ConfigMixin):
    """Solver, clock, guidance and cascade of a sample.

    groups: channels of each channel group by its name, in the latent's order.
    offsets: when each group's clock starts.
    stages: resolutions to go through, coarsest first: `side`, `solver`, `steps`, `shift`, `times`, `steps_are_points`,
        `augment`, and `guidance` with `method`, `scales` and `interval` (and `channels`).
    cascade: `sides` and `upsample`; None has one resolution. sigmas: `low`, `high` and `rho` of denoising in pixels.
    precision: of the network; batch: images at once.
    """

    config_name = "scheduler_config.json"  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        groups: dict[str, int],
        offsets: list[float],
        stages: list[dict[str, Any]],
        cascade: dict[str, Any] | None = None,
        sigmas: dict[str, Any] | None = None,
        precision: str = "tf32",
        batch: int = 1,
    ) -> None:
        self.groups = ChannelGroups(tuple(groups), tuple(groups.values()))
        self.clock = Offsets(tuple(offsets))
        self.cascade = None if cascade is None else Cascade(tuple(cascade["sides"]), cascade["upsample"])
        self.sigmas: Callable[[int], Tensor] | None = None if sigmas is None else partial(sigma_grid, **sigmas)
        self.stages = stages

    @torch.no_grad()
    def integrate(
        self,
        network: Callable[..., Tensor],
        labels_B: Tensor,
        noise: Callable[[tuple[int, ...], int], Tensor],
        null_label: int,
        guide: Callable[..., Tensor] | None = None,
        scale: float | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Normalised latents (B, C, side, side) of these labels.

        noise: standard normal numbers of the batch's images by shape of one and number of the draw.
        guide: the weak network of autoguidance. scale, steps: in place of the recipe's.
        """
        latents: Tensor | None = None
        for number, stage in enumerate(self.stages):
            side, count = stage["side"], steps or stage["steps"]
            shape, first = (self.groups.channels, side, side), number * _DRAWS_PER_STAGE
            condition = level = None
            if self.cascade is not None and latents is not None:
                level = latents.new_full((len(latents),), stage["augment"])
                beside = noise(tuple(latents.shape[1:]), first + _CONDITION)
                condition = self.cascade.condition(latents, beside, level, side)
            main, weak = (_told(each, condition, level) for each in (network, guide or network))
            velocity = self._guided(main, weak, stage["guidance"], null_label, scale)
            start = noise(shape, first)
            if self.sigmas is not None:
                latents = denoise(velocity, start, labels_B, self.sigmas(count), solver=stage["solver"])
                continue
            latents = solve(
                velocity,
                start,
                labels_B,
                clock=self.clock,
                groups=self.groups,
                solver=stage["solver"],
                steps=count,
                shift=stage["shift"],
                steps_are_points=stage["steps_are_points"],
                times=None if steps else stage["times"],
                step_noise=lambda step, shape=shape, first=first: noise(shape, first + step + 1),  # type: ignore[misc]
            )
        assert latents is not None  # there is at least one stage
        return latents

    def _guided(
        self, main: Velocity, weak: Velocity, section: Mapping[str, Any], null_label: int, scale: float | None
    ) -> Velocity:
        if section["method"] == "none":
            return main
        scales = tuple(old if scale is None or old == 1.0 else scale for old in section["scales"])
        interval = tuple(section["interval"])
        if section["method"] == "autoguidance":
            return AutoGuidance(weak, scales, interval, self.groups)(main)  # type: ignore[arg-type]
        channels = section["channels"]
        return ClassifierFree(scales, null_label, channels, interval, self.groups)(main)  # type: ignore[arg-type]


def _told(network: Callable[..., Tensor], condition: Tensor | None, level: Tensor | None) -> Velocity:
    return network if condition is None else Conditioned(network, condition, level)
