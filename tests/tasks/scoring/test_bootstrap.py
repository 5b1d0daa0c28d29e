"""Confidence intervals: closed forms, the true spread of independent draws, and a fixed seed."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.scoring.bootstrap import interval, share_interval
from tasks.scoring.distances import FrechetFrom
from tasks.scoring.gaussian import Gaussian


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    mean, error = values.mean(), values.std() / 20
    low, high = interval(mean, lambda chosen: float(values[chosen].mean()), 400, replicates=4_000)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_the_interval_of_a_share_is_the_textbooks() -> None:
    hits = np.arange(1_000) < 300
    error = np.sqrt(0.3 * 0.7 / 1_000)
    low, high = share_interval(hits, replicates=20_000)
    assert low == pytest.approx(0.3 - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(0.3 + 1.96 * error, abs=0.1 * error)
    assert share_interval(np.ones(50, dtype=bool), replicates=100) == (1.0, 1.0)


def test_the_interval_of_a_frechet_distance_is_as_wide_as_independent_sets_scatter() -> None:
    width, count = 6, 300
    real = Gaussian(np.full(width, 0.4), 1.5 * np.eye(width))
    distance = FrechetFrom(real)
    random = np.random.default_rng(1)
    sets = [random.standard_normal((count, width)) for _ in range(200)]
    true_width = np.subtract(*np.quantile([distance(Gaussian.of(each)) for each in sets], [0.975, 0.025]))
    found = []
    for rows in sets[:10]:
        value = distance(Gaussian.of(rows))
        low, high = interval(value, lambda chosen, rows=rows: distance(Gaussian.of(rows[chosen])), count, 100)
        assert low < value < high
        found.append(high - low)
    assert np.mean(found) == pytest.approx(true_width, rel=0.3)


def test_an_interval_belongs_to_its_seed() -> None:
    values = np.random.default_rng(0).normal(size=50)

    def of(seed: int) -> tuple[float, float]:
        return interval(values.mean(), lambda chosen: float(values[chosen].mean()), 50, 50, seed)

    assert of(1) == of(1) != of(2)


def test_one_replicate_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        interval(0.0, lambda chosen: 0.0, 5, replicates=1)
    with pytest.raises(ValueError, match="at least 2"):
        share_interval(np.ones(5, dtype=bool), replicates=1)
