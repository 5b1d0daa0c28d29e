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
    return Guided(main, guide, scales, intervals, groups, channels)


@dataclass(frozen=True)
class Guided:
    """A velocity extrapolated from a guide's, on the first `channels` (None: all), in each group's own interval."""

    main: Velocity
    guide: Velocity
    scales: tuple[float, ...]
    intervals: tuple[Interval, ...]
    groups: ChannelGroups | None
    channels: int | None

    def __call__(self, x_BCHW: Tensor, t_BG: Tensor, y_B: Tensor) -> Tensor:
        """At times that may differ by image. Whether the guide runs is read from them: the host waits for the device,
        which a solver that knows its time spares itself (`moment`)."""
        active_BG = self._active(t_BG[:, None] if t_BG.ndim == 1 else t_BG)
        main_BCHW = self.main(x_BCHW, t_BG, y_B)
        if not bool(active_BG.any()):
            return main_BCHW
        parts = self._parts(x_BCHW)
        found = self._extrapolated(main_BCHW, self.guide(x_BCHW, t_BG, y_B), [part.stop for part in parts.slices])
        return torch.where(parts.spread(active_BG), found, main_BCHW)

    def at(self, t_G: Tensor) -> Velocity:
        """The velocity of all images at these times (G,), which lie on the host."""
        active_G = self._active(t_G[None])[0].tolist()
        if not any(active_G):
            return self.main

        def guided(x_BCHW: Tensor, t_BG: Tensor, y_B: Tensor) -> Tensor:
            slices = self._parts(x_BCHW).slices
            stops = [part.stop if active else part.start for part, active in zip(slices, active_G, strict=True)]
            return self._extrapolated(self.main(x_BCHW, t_BG, y_B), self.guide(x_BCHW, t_BG, y_B), stops)

        return guided

    def _parts(self, x_BCHW: Tensor) -> ChannelGroups:
        return self.groups or single_group(x_BCHW.shape[1])

    def _active(self, t_BG: Tensor) -> Tensor:
        columns = [
            (t_BG[:, i] >= start) & (t_BG[:, i] <= end) & (scale != 1.0)
            for i, ((start, end), scale) in enumerate(zip(self.intervals, self.scales, strict=True))
        ]
        return torch.stack(columns, dim=1)

    def _extrapolated(self, main_BCHW: Tensor, guide_BCHW: Tensor, stops: list[int]) -> Tensor:
        """Guided from each group's first channel to before its stop, and no further than `channels`."""
        pieces = []
        for part, stop, scale in zip(self._parts(main_BCHW).slices, stops, self.scales, strict=True):
            end = max(part.start, stop if self.channels is None else min(stop, self.channels))
            main, guide = main_BCHW[:, part.start : end], guide_BCHW[:, part.start : end]
            pieces += [guide + scale * (main - guide), main_BCHW[:, end : part.stop]]
        return torch.cat(pieces, dim=1)


@dataclass(frozen=True)
class Watched:
    """A velocity, guided or not, that tells what it was asked and what it said: (x_BCHW, t_BG, v_BCHW)."""

    velocity: Velocity
    tell: Callable[[Tensor, Tensor, Tensor], None]

    def __call__(self, x_BCHW: Tensor, t_BG: Tensor, y_B: Tensor) -> Tensor:
        v_BCHW = self.velocity(x_BCHW, t_BG, y_B)
        self.tell(x_BCHW, t_BG, v_BCHW)
        return v_BCHW

    def at(self, t_G: Tensor) -> Watched:
        return Watched(moment(self.velocity, t_G), self.tell)


def moment(velocity: Velocity, t_G: Tensor) -> Velocity:
    """A velocity, guided or not, at group times (G,) that the host knows and all images share."""
    return velocity.at(t_G) if isinstance(velocity, Guided | Watched) else velocity
