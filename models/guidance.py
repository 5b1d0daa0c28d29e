"""Guidance: wrappers that turn a velocity network into a guided one. None knows the backbone.

A velocity is any callable (x_BCHW, t_BG, y_B) -> v_BCHW. Guidance extrapolates from a guide's velocity to the
main one's, v = v_guide + scale * (v_main - v_guide), on some channels and over some interval of each group's
own time. Outside both, the main velocity is returned untouched, and where no channel of the batch is guided
the guide is not run at all. Source: papers.md 1.7 (classifier-free), 2.6 (per group, autoguidance).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.groups import ChannelGroups, single_group

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
Interval = tuple[float, float]
EVERYWHERE: Interval = (0.0, 1.0)


@dataclass(frozen=True)
class NoGuidance:
    """The main network as it is."""

    def __call__(self, model: Velocity) -> Velocity:
        return model


@dataclass(frozen=True)
class ClassifierFree:
    """Guide with the same network under the null label.

    scale: one number, or one per channel group; 1 is no guidance.
    channels: guide only the first k channels (3 reproduces the published LightningDiT); None guides all.
    interval: (start, end) of the group's time within which guidance acts, bounds included: one pair, or one
        pair per channel group.
    groups: the channel groups, needed when there is more than one.
    """

    scale: float | tuple[float, ...]
    null_label: int
    channels: int | None = None
    interval: Interval | tuple[Interval, ...] = EVERYWHERE
    groups: ChannelGroups | None = None

    def __call__(self, model: Velocity) -> Velocity:
        def guide(x_BCHW: Tensor, t_BG: Tensor, y_B: Tensor) -> Tensor:
            return model(x_BCHW, t_BG, torch.full_like(y_B, self.null_label))

        return _extrapolate(model, guide, self.scale, self.interval, self.groups, self.channels)


@dataclass(frozen=True)
class AutoGuidance:
    """Guide with a weaker network that sees the same labels and clocks.

    scale, interval, groups: as for ClassifierFree.
    """

    weak_model: Velocity
    scale: float | tuple[float, ...]
    interval: Interval | tuple[Interval, ...] = EVERYWHERE
    groups: ChannelGroups | None = None

    def __call__(self, model: Velocity) -> Velocity:
        return _extrapolate(model, self.weak_model, self.scale, self.interval, self.groups, None)


Guidance = NoGuidance | ClassifierFree | AutoGuidance


def _extrapolate(
    main: Velocity,
    guide: Velocity,
    scale: float | tuple[float, ...],
    interval: Interval | tuple[Interval, ...],
    groups: ChannelGroups | None,
    channels: int | None,
) -> Velocity:
    count = len(groups) if groups else 1
    scales = tuple(scale) if isinstance(scale, tuple | list) else (float(scale),) * count
    intervals: tuple[Interval, ...] = (
        tuple(interval) if isinstance(interval[0], tuple | list) else (interval,) * count  # type: ignore
    )
    for name, values in (("scale", scales), ("interval", intervals)):
        if len(values) != count:
            raise ValueError(
                f"guidance {name} needs one value or one per channel group ({count}), found {len(values)}; "
                f"give `groups` when the latent has several"
            )
    if all(value == 1.0 for value in scales):
        return main

    def guided(x_BCHW: Tensor, t_BG: Tensor, y_B: Tensor) -> Tensor:
        parts = groups or single_group(x_BCHW.shape[1])
        times = t_BG[:, None] if t_BG.ndim == 1 else t_BG
        active_BG = _active(times, intervals, scales)
        main_BCHW = main(x_BCHW, t_BG, y_B)
        if not bool(active_BG.any()):
            return main_BCHW
        active = parts.spread(active_BG)
        if channels is not None:
            active = active & (torch.arange(parts.channels, device=active.device) < channels).view(1, -1, 1, 1)
        weight = parts.spread(torch.tensor([scales], device=x_BCHW.device, dtype=main_BCHW.dtype))
        guide_BCHW = guide(x_BCHW, t_BG, y_B)
        return torch.where(active, guide_BCHW + weight * (main_BCHW - guide_BCHW), main_BCHW)

    return guided


def _active(t_BG: Tensor, intervals: tuple[Interval, ...], scales: tuple[float, ...]) -> Tensor:
    columns = [
        (t_BG[:, i] >= start) & (t_BG[:, i] <= end) & (scale != 1.0)
        for i, ((start, end), scale) in enumerate(zip(intervals, scales, strict=True))
    ]
    return torch.stack(columns, dim=1)
