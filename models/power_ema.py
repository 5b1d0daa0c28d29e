"""Averages of weights whose profile is a power of training time, and any such average from stored ones afterwards.

The average at time t weighs the weights at time u in proportion to u^gamma: its length is a share of the training so
far, and its width relative to that is sigma_rel. A weighted sum of stored averages comes close to the average of any
other width or time between them. Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3.1, 3.2 and appendix C. Times are images seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDEST = 12**-0.5
"""sigma_rel of a plain mean over all of training (gamma 0); power averages are narrower."""


def exponent(sigma_rel: float) -> float:
    """gamma > 0 of the profile with this standard deviation, relative to the time of the average.

    sigma² = (gamma + 1) / ((gamma + 2)² (gamma + 3)), a cubic in gamma.
    Raises ValueError outside (0, 12^-½).
    """
    if not 0.0 < sigma_rel < WIDEST:
        raise ValueError(f"sigma_rel must lie between 0 and {WIDEST:.3f}, found {sigma_rel}")
    inverse = sigma_rel**-2.0
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def new_share(gamma: float, before: int, after: int) -> float:
    """Share of the weights that hold from image `before` to `after` in the average at `after`: 1 - beta."""
    return float(1.0 - (before / after) ** (gamma + 1.0))


@dataclass(frozen=True)
class Average:
    """Which average of weights: when it ends and how wide it is."""

    images: int
    sigma_rel: float


def combination(stored: Sequence[Average], wanted: Average) -> np.ndarray:
    """Coefficients, float64 (N,), of stored averages in the sum whose profile is nearest to the wanted one.

    Least squares between the profiles as functions of time, by their inner products in closed form. Coefficients sum
    to 1 (our choice: what all of training has in common comes out as it was).
    Raises ValueError where nothing is stored.
    """
    if not stored:
        raise ValueError("no stored averages to combine")
    times = np.array([average.images for average in stored], np.float64)
    powers = np.array([exponent(average.sigma_rel) for average in stored])
    end, power = np.array(float(wanted.images)), np.array(exponent(wanted.sigma_rel))
    system = np.ones((len(stored) + 1, len(stored) + 1))
    system[:-1, :-1] = end * _inner(times[:, None], powers[:, None], times[None, :], powers[None, :])
    system[-1, -1] = 0.0  # the last row and column hold the sum, by a Lagrange multiplier
    target = np.append(end * _inner(times, powers, end, power), 1.0)
    return np.linalg.lstsq(system, target, rcond=None)[0][:-1]


def _inner(t1: np.ndarray, g1: np.ndarray, t2: np.ndarray, g2: np.ndarray) -> np.ndarray:
    """Integral of the product of two profiles (g + 1) u^g / t^(g + 1), each 0 beyond its t."""
    # The earlier end t bounds the integral; the later profile is (t / later)^g of its value there.
    earlier, later = np.minimum(t1, t2), np.maximum(t1, t2)
    power_of_later = np.where(t1 < t2, g2, g1)
    return (g1 + 1) * (g2 + 1) / (g1 + g2 + 1) * (earlier / later) ** power_of_later / later
