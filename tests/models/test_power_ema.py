"""Averages with a power profile: the recurrence, their widths, and one put together from stored others."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from models.power_ema import WIDEST, Average, combination, exponent, new_share

STEP, STEPS = 100, 800


@cache
def profile(sigma_rel: float, steps: int) -> NDArray[np.float64]:
    """Weight of each step's weights in the average that is tracked during training."""
    weights = np.zeros(STEPS)
    for step in range(steps):
        share = new_share(exponent(sigma_rel), step * STEP, (step + 1) * STEP)
        weights *= 1 - share
        weights[step] = share
    weights.flags.writeable = False
    return weights


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.1, 0.2, 0.28])
def test_a_tracked_average_has_the_width_it_is_named_after(sigma_rel: float) -> None:
    weights, times = profile(sigma_rel, STEPS), (np.arange(STEPS) + 0.5) / STEPS
    assert weights.sum() == pytest.approx(1.0)
    spread = np.sqrt((weights * times**2).sum() - (weights * times).sum() ** 2)
    assert spread == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, WIDEST, 0.5])
def test_a_width_that_no_power_has_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match="sigma_rel"):
        exponent(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.06, 0.08, 0.1, 0.15, 0.2])
@pytest.mark.parametrize("steps", [STEPS, STEPS * 3 // 4])
def test_snapshots_give_any_other_average(sigma_rel: float, steps: int) -> None:
    stored = [Average(STEP * n, sigma) for n in range(25, STEPS + 1, 25) for sigma in (0.05, 0.1)]
    parts = np.stack([profile(average.sigma_rel, average.images // STEP) for average in stored])
    found = combination(stored, Average(steps * STEP, sigma_rel)) @ parts
    wanted = profile(sigma_rel, steps)
    assert np.abs(found - wanted).sum() < 0.02, "share of the profile that lies elsewhere"
    assert found.sum() == pytest.approx(1.0, abs=1e-6)
    nearest = min(np.abs(part - wanted).sum() for part in parts if not np.array_equal(part, wanted))
    assert np.abs(found - wanted).sum() < 0.2 * nearest, "nearer than any stored one"


def test_a_stored_average_is_itself() -> None:
    stored = [Average(images, sigma) for images in (1000, 2000, 3000) for sigma in (0.05, 0.1)]
    np.testing.assert_allclose(combination(stored, stored[3]), np.eye(6)[3], atol=1e-6)
