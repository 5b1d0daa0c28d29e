"""Mean and covariance in one pass: right, accurate, and bitwise the same however rows arrive."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.scoring import gaussian
from tasks.scoring.gaussian import Gaussian, GaussianAccumulator


def rows(count: int, width: int = 12, offset: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(count)
    return (random.standard_normal((count, width)) @ random.standard_normal((width, width)) + offset).astype(np.float32)


def gathered(values: np.ndarray, cuts: list[int]) -> Gaussian:
    found = GaussianAccumulator()
    for piece in np.split(values, cuts):
        found.add(piece)
    return found.gaussian()


@pytest.mark.parametrize("count", [2, 1_023, 1_024, 2_500])
def test_mean_and_covariance_are_numpys(count: int) -> None:
    values = rows(count)
    found = Gaussian.of(values)
    np.testing.assert_allclose(found.mean, values.astype(np.float64).mean(axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(
        found.covariance, np.cov(values.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-10
    )


def test_nothing_is_lost_far_from_the_origin() -> None:
    values = rows(3_000).astype(np.float64) + 1e7
    expected = np.cov(values - 1e7, rowvar=False)
    np.testing.assert_allclose(Gaussian.of(values).covariance, expected, rtol=1e-6, atol=1e-6)


def test_the_result_is_bitwise_the_same_for_every_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian, "_BLOCK", 64)
    values = rows(333)
    whole = Gaussian.of(values)
    random = np.random.default_rng(0)
    cuttings = [list(range(step, 333, step)) for step in (1, 7, 64, 65, 200)]
    cuttings += [sorted(random.choice(333, 12, replace=False).tolist()) for _ in range(5)]
    for cuts in cuttings:
        found = gathered(values, cuts)
        assert found.mean.tobytes() == whole.mean.tobytes()
        assert found.covariance.tobytes() == whole.covariance.tobytes()


def test_asking_does_not_disturb_the_sum() -> None:
    values, found = rows(50), GaussianAccumulator()
    found.add(values[:20])
    assert np.array_equal(found.gaussian().covariance, Gaussian.of(values[:20]).covariance)
    found.add(values[20:])
    assert np.array_equal(found.gaussian().covariance, Gaussian.of(values).covariance)


def test_rows_that_do_not_belong_together_are_refused() -> None:
    found = GaussianAccumulator()
    with pytest.raises(ValueError, match="at least two"):
        found.gaussian()
    found.add(rows(5))
    with pytest.raises(ValueError, match="12 and 3 dimensions"):
        found.add(rows(5, width=3))
    with pytest.raises(ValueError, match="not finite"):
        found.add(np.full((2, 12), np.inf))
