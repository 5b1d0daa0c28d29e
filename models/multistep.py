"""Multistep solvers: they reuse earlier evaluations, and so ask the network once a step.

A path from noise to data is x = a x1 + s x0 with coefficients (a, s): (t, 1 - t) of a flow, (1, sigma) of a
denoiser. Between two of its points the noise falls out of the exact solution,

    x' = (s' / s) x + a' (1 - e^-h) mean of x1 under the weight e^l,     l = log(a / s), h = l' - l,

and the solvers differ in how they extrapolate the predicted data x1 from where it is known. Each channel group
goes its own way (its own clock); all numbers but the tensors are known to the host, in double precision.

Sources: DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095, algorithm 2); UniPC of order 2 with B(h) = e^h - 1,
Zhao et al. 2023 (arXiv 2302.04867, algorithms 5 and 6 in data prediction). Both begin and end with a step of
order 1, because l is infinite at pure noise and at data; there it is the exact step for constant data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from models.groups import ChannelGroups

MULTISTEP = ("dpmpp_2m", "unipc")
Point = tuple[float, float]
"""Coefficients (a, s) of data and noise."""


@dataclass
class MultistepSolver:
    """Steps of one batch along its path; call `step` once for each point, from noise on.

    kind: "dpmpp_2m" or "unipc". groups: channel groups of the batch, each with points of its own.
    """

    kind: str
    groups: ChannelGroups
    _earlier: Sequence[Point] | None = None
    _now: Sequence[Point] | None = None
    _earlier_data: Tensor | None = None
    _now_data: Tensor | None = None
    _start: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in MULTISTEP:
            raise ValueError(f"a multistep solver is one of {', '.join(MULTISTEP)}, found '{self.kind}'")

    def corrected(self, x_BCHW: Tensor, data_BCHW: Tensor, now: Sequence[Point]) -> Tensor:
        """x at `now` once the data predicted there is known: UniPC's corrector; of DPM-Solver++ x as it is."""
        if self.kind != "unipc" or self._now is None or self._start is None or self._now_data is None:
            return x_BCHW
        steps = [_Step(*points) for points in zip(self._now, now, strict=True)]
        history = self._history()
        weights = [step.corrector(before) for step, before in zip(steps, history, strict=True)]
        return self._combined(steps, self._start, weights, (self._now_data, self._earlier_data, data_BCHW))

    def step(self, x_BCHW: Tensor, data_BCHW: Tensor, now: Sequence[Point], ahead: Sequence[Point]) -> Tensor:
        """x at the points `ahead`, from x and the predicted data (B, C, H, W) at the points `now`, one per group.

        A group whose point does not change stays as it is.
        """
        x_BCHW = self.corrected(x_BCHW, data_BCHW, now)
        self._earlier, self._earlier_data = self._now, self._now_data
        self._now, self._now_data, self._start = now, data_BCHW, x_BCHW
        steps = [_Step(*points) for points in zip(now, ahead, strict=True)]
        weights = [step.predictor(before) for step, before in zip(steps, self._history(), strict=True)]
        return self._combined(steps, x_BCHW, weights, (data_BCHW, self._earlier_data))

    def _history(self) -> list[float | None]:
        """Of each group the log ratio at the step before, None where it has not moved yet."""
        if self._earlier is None or self._now is None:
            return [None] * len(self.groups)
        pairs = zip(self._earlier, self._now, strict=True)
        return [None if before == now else log_ratio(before) for before, now in pairs]

    def _combined(
        self,
        steps: list[_Step],
        start_BCHW: Tensor,
        weights: Sequence[tuple[float, ...]],
        data: tuple[Tensor | None, ...],
    ) -> Tensor:
        """start and data, each times its group's number. A weight of 0 needs no tensor."""
        x = self.groups.weighted(start_BCHW, [step.keep for step in steps])
        for tensor, column in zip(data, zip(*weights, strict=True), strict=True):
            if tensor is not None and any(column):
                x = x + self.groups.weighted(tensor, list(column))
        return x


def log_ratio(point: Point) -> float:
    """log(a / s): -inf at pure noise, +inf at data."""
    data, noise = point
    if data == 0 or noise == 0:
        return -math.inf if data == 0 else math.inf
    return math.log(data) - math.log(noise)


@dataclass(frozen=True)
class _Step:
    """One group's way from a point to the next one."""

    now: Point
    ahead: Point

    @property
    def keep(self) -> float:
        """Of the x before it."""
        return 1.0 if self.now == self.ahead else self.ahead[1] / self.now[1]

    @property
    def weight(self) -> float:
        """Of the data, where it is constant: a' - a s' / s."""
        return 0.0 if self.now == self.ahead else self.ahead[0] - self.now[0] * self.keep

    def _ratio(self, earlier: float | None) -> float | None:
        """Length of the step before in units of this one, endless after the first; None where nothing is known."""
        length = log_ratio(self.ahead) - log_ratio(self.now)
        if earlier is None or self.now == self.ahead or math.isinf(length):
            return None
        return (log_ratio(self.now) - earlier) / length

    def predictor(self, earlier: float | None) -> tuple[float, float]:
        """Weights of the data now and before: the line through both, read at the middle of the step."""
        ratio = self._ratio(earlier)
        beyond = 0.0 if ratio is None else 0.5 / ratio
        return self.weight * (1 + beyond), -self.weight * beyond

    def corrector(self, earlier: float | None) -> tuple[float, float, float]:
        """Weights of the data at the start, before it and at the end: a parabola, or a line without a before.

        With x1(l) = D + u b + u^2 c on u in [0, 1], the weight e^(h u) has the moments that UniPC calls b_1 / 1!
        and b_2 / 2! up to the sign; the parabola goes through the three data.
        """
        ratio = self._ratio(earlier)
        if ratio is None:
            return self.weight / 2, 0.0, self.weight / 2
        h = log_ratio(self.ahead) - log_ratio(self.now)
        growth = math.expm1(-h)
        first = growth / -h - 1
        b1 = first / growth
        b2 = 2 * (first / -h - 0.5) / growth
        # Slopes are (before - start) / -ratio and (end - start) / 1; R = [[1, 1], [-ratio, 1]].
        of_before = (b1 - b2) / (1 + ratio)
        of_end = b1 - of_before
        return (
            self.weight * (1 + of_before / ratio - of_end),
            -self.weight * of_before / ratio,
            self.weight * of_end,
        )
