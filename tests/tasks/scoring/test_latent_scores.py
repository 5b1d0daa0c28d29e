"""Figures of a latent space against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tasks.scoring.latent_scores import CellSums, Uniformity, Usage, one_cell_each, probe, uniformity

RANDOM = np.random.default_rng(0)


def test_even_densities_are_even_and_one_peak_is_not() -> None:
    even = Uniformity.of_densities(np.full(7, 0.3))
    assert (even.variation, even.gini, even.entropy) == pytest.approx((0.0, 0.0, 1.0))
    # Densities 1, 1, 2, 4: mean 2, variance 1.5, mean absolute difference 2 (1+1+1+3+3+2)/16 ... by hand.
    found = Uniformity.of_densities(np.array([4.0, 1.0, 2.0, 1.0]))
    assert found.variation == pytest.approx(math.sqrt(1.5) / 2)
    pairs = sum(abs(a - b) for a in (4, 1, 2, 1) for b in (4, 1, 2, 1))
    assert found.gini == pytest.approx(pairs / (2 * 16 * 2.0))
    shares = (0.5, 0.125, 0.25, 0.125)
    assert found.entropy == pytest.approx(-sum(share * math.log(share) for share in shares) / math.log(4))
    with pytest.raises(ValueError, match="negative"):
        Uniformity.of_densities(np.array([1.0, -1.0]))


def test_the_papers_figures_fit_one_another_as_densities_of_a_thousand_points() -> None:
    """Table 6: variation .263 goes with Gini .145 and entropy .995, and .178 with .096 and .998."""
    for variation, gini, entropy in ((0.263, 0.145, 0.995), (0.178, 0.096, 0.998)):
        found = Uniformity.of_densities(np.clip(1 + variation * RANDOM.normal(size=1_000), 0, None))
        assert found.variation == pytest.approx(variation, abs=0.02)
        assert found.gini == pytest.approx(gini, abs=0.01)
        assert found.entropy == pytest.approx(entropy, abs=0.0015)


def test_clumps_are_less_even_than_a_cloud() -> None:
    cloud = RANDOM.uniform(size=(160, 4))
    clumps = np.concatenate([RANDOM.normal(scale=0.02, size=(140, 4)), RANDOM.uniform(size=(20, 4)) * 3])
    even, uneven = (uniformity(points, runs=1) for points in (cloud, clumps))
    assert uneven.variation > even.variation and uneven.gini > even.gini and uneven.entropy < even.entropy
    with pytest.raises(ValueError, match="16"):
        uniformity(cloud[:8])


def test_one_cell_of_every_image() -> None:
    latents = np.arange(5 * 2 * 3 * 3, dtype=np.float32).reshape(5, 2, 3, 3)
    points = one_cell_each(latents, seed=1)
    assert points.shape == (5, 2)
    assert all((latents[image] == points[image][:, None, None]).all(axis=0).any() for image in range(5))
    assert not np.array_equal(points, one_cell_each(latents, seed=2))


def test_usage_by_channel() -> None:
    means = np.stack([RANDOM.normal(size=(400, 4, 4)), np.zeros((400, 4, 4)), 3 * RANDOM.normal(size=(400, 4, 4))], 1)
    found = Usage.of(means, np.full_like(means, 0.5))
    assert found.deviation == pytest.approx([1.0, 0.0, 3.0], abs=0.05)
    assert found.active == pytest.approx(2 / 3)
    floor = 0.5 * (0.25 - 1 - math.log(0.25))  # of a mean that is always 0
    assert found.nats == pytest.approx([floor + 0.5, floor, floor + 4.5], abs=0.15)
    entropy = -sum(share * math.log(share) for share in (0.1, 0.9))
    assert found.effective == pytest.approx(math.exp(entropy), abs=0.02)


def test_a_probe_reads_what_lies_on_a_line_and_no_more() -> None:
    labels = RANDOM.integers(3, size=600)
    rows = RANDOM.normal(size=(600, 5)) + 4 * np.eye(3, 5)[labels]
    assert probe(rows[:400], labels[:400], rows[400:], labels[400:]) > 0.95
    noise = RANDOM.normal(size=(600, 5))
    assert probe(noise[:400], labels[:400], noise[400:], labels[400:]) < 0.5


def test_sums_give_the_line_and_the_components_however_they_were_cut() -> None:
    z = RANDOM.normal(size=(300, 3))
    line = RANDOM.normal(size=(3, 6))
    f = z @ line
    whole, cut = CellSums.of(z, f), CellSums.of(z[:100], f[:100]) + CellSums.of(z[100:], f[100:])
    np.testing.assert_allclose(cut.line_CD, line, atol=1e-6)
    np.testing.assert_allclose(whole.line_CD, cut.line_CD, atol=1e-9)
    mean, basis = cut.components(3)
    np.testing.assert_allclose(mean, f.mean(axis=0))
    np.testing.assert_allclose((f - mean) @ basis @ basis.T + mean, f, atol=1e-8)  # three directions hold it all
    widths = ((f - mean) @ basis).std(axis=0)
    assert widths[0] >= widths[1] >= widths[2]
