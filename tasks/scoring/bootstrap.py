"""Confidence intervals by bootstrap over images (Efron 1979): how far a score would move with other images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
LEVEL = 0.95


def interval(
    value: float,
    statistic: Callable[[NDArray[np.int64]], float],
    count: int,
    replicates: int,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """The interval around a score of `count` images at this confidence.

    The score is computed of `replicates` sets of as many images drawn from these with replacement. Only the spread
    of the replicates is used, around the score itself: resampling repeats images, which lowers the variance of a set
    and so raises a Fréchet distance, so that replicates lie off the score they belong to.

    Args:
        value: the score of all images.
        statistic: the score of the images with these numbers (with repetition).
        count: number of images.
        replicates: one evaluation of the statistic each; quantiles at 95 % want 40 or more.
        seed: of the resampling; the interval is a pure function of it.
        level: confidence.

    Raises ValueError on fewer than two replicates.
    """
    if replicates < 2:
        raise ValueError(f"an interval needs at least 2 replicates, found {replicates}")
    drawn = np.random.default_rng(seed)
    found = np.array([statistic(drawn.integers(count, size=count)) for _ in range(replicates)])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]) - found.mean()
    return float(value + low), float(value + high)


def share_interval(hits_N: NDArray[np.bool_], replicates: int, seed: int = 0, level: float = LEVEL) -> Interval:
    """The interval of the share of true values: what :func:`interval` would find, from one binomial draw each."""
    if replicates < 2:
        raise ValueError(f"an interval needs at least 2 replicates, found {replicates}")
    share = float(hits_N.mean())
    found = np.random.default_rng(seed).binomial(len(hits_N), share, size=replicates) / len(hits_N)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]) - found.mean()
    return max(0.0, float(share + low)), min(1.0, float(share + high))
