"""Scores: closed forms, torch-fidelity's numbers, and no dependence on blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from tasks.scoring import distances
from tasks.scoring.distances import (
    FrechetFrom,
    class_score,
    coverage,
    frechet_distance,
    kernel_distance,
    precision_recall,
    score_name,
)
from tasks.scoring.gaussian import Gaussian


def features(seed: int, count: int = 400, width: int = 24, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((width, width))
    return random.standard_normal((count, width)) @ mixing * (1 + 0.1 * seed) + shift


def test_frechet_of_gaussians_in_closed_form() -> None:
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.0])
    one = Gaussian(np.zeros(3), np.diag(a))
    other = Gaussian(np.array([1.0, 2.0, 2.0]), np.diag(b))
    expected = 9.0 + float(((np.sqrt(a) - np.sqrt(b)) ** 2).sum())
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_correlated_gaussians_is_symmetric_and_unchanged_by_rotation() -> None:
    one, other = Gaussian.of(features(1)), Gaussian.of(features(2, shift=0.3))
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((24, 24)))[0]
    turned = [Gaussian(rotation @ g.mean, rotation @ g.covariance @ rotation.T) for g in (one, other)]
    distance = frechet_distance(one, other)
    assert distance > 0.1
    assert frechet_distance(other, one) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(*turned) == pytest.approx(distance, rel=1e-9)


def test_frechet_of_a_set_with_itself_is_zero_even_with_fewer_images_than_features() -> None:
    few = Gaussian.of(features(3, count=10))
    assert frechet_distance(few, few) == pytest.approx(0.0, abs=1e-5 * np.trace(few.covariance))


@pytest.mark.parametrize("count", [400, 60])
def test_frechet_equals_torch_fidelity(count: int) -> None:
    one, other = features(1, count), features(2, count, shift=0.2)
    statistics = [fid_features_to_statistics(torch.from_numpy(f)) for f in (one, other)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(Gaussian.of(one), Gaussian.of(other)) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("count", [2, 20, 24, 100])
def test_frechet_of_rows_is_that_of_their_gaussian(count: int) -> None:
    one, rows = Gaussian.of(features(1)), features(2, count, shift=0.1)
    assert FrechetFrom(one).of_rows(rows) == pytest.approx(frechet_distance(one, Gaussian.of(rows)), rel=1e-6)


@pytest.mark.parametrize(("subsets", "size"), [(7, 50), (3, 120)])
def test_kernel_distance_is_the_unbiased_estimate_written_out(subsets: int, size: int) -> None:
    real, made = features(1, 130, 8), features(2, 120, 8, shift=0.3)
    random, found = np.random.RandomState(5), []
    for _ in range(subsets):  # torch-fidelity's draws, made images first
        x, y = (rows[random.choice(len(rows), size, replace=False)] for rows in (made, real))
        kernel = lambda a, b: (a @ b.T / 8 + 1) ** 3  # noqa: E731
        apart = ~np.eye(size, dtype=bool)
        found.append(kernel(x, x)[apart].mean() + kernel(y, y)[apart].mean() - 2 * kernel(x, y).mean())
    assert kernel_distance(real, made, subsets, size, seed=5) == pytest.approx((np.mean(found), np.std(found)))


def test_kernel_distance_of_small_sets_takes_them_whole() -> None:
    real, made = features(1, 40), features(2, 40, shift=0.2)
    whole = kernel_distance(real, made, subsets=100, size=1_000)
    assert whole[0] == pytest.approx(kernel_distance(real[::-1], made[::-1], 100, 1_000, seed=9)[0], rel=1e-9)
    assert whole[1] == 0.0
    assert kernel_distance(real, made[:10], 5, 1_000)[0] != whole[0]


def test_class_score_in_closed_form() -> None:
    sure = 50.0 * np.eye(10)[np.arange(200) % 10]
    assert class_score(sure)[0] == pytest.approx(10.0, rel=1e-6), "every class alike and certain: their number"
    assert class_score(sure[:1].repeat(200, axis=0))[0] == pytest.approx(1.0), "one class only"
    assert class_score(np.zeros((200, 10)))[0] == pytest.approx(1.0), "nothing is known of any"


def test_class_score_takes_splits_of_five_thousand() -> None:
    logits = np.random.default_rng(0).normal(size=(10_000, 3))
    mean, spread = class_score(logits, seed=3)
    order = np.random.RandomState(3).permutation(10_000)
    halves = [class_score(logits[part])[0] for part in np.split(order, 2)]
    assert (mean, spread) == pytest.approx((np.mean(halves), np.std(halves)), rel=1e-9)
    assert spread > 0


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_precision_and_recall_equal_torch_fidelity(neighbours: int) -> None:
    real, made = features(1, 300), features(2, 250, shift=0.5)[:, ::1] * 0.8
    theirs = calculate_precision_recall_full(torch.from_numpy(made), torch.from_numpy(real), neighbours)
    ours = precision_recall(real, made, neighbours)
    assert 0.0 < ours[0] < 1.0 and 0.0 < ours[1] < 1.0
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_precision_and_recall_of_a_known_layout() -> None:
    real = np.array([[0.0], [1.0], [2.0], [3.0]])
    made = np.array([[0.5], [0.6], [10.0], [10.1]])
    # Every real ball has radius 1 and covers [-1, 4]; made balls reach 0.1 around 0.5, 0.6, 10 and 10.1.
    assert precision_recall(real, made, neighbours=1) == (0.5, 0.0)
    found = coverage(real, made, neighbours=1)
    assert found.made.tolist() == [True, True, False, False] and found.real.tolist() == [False] * 4


def test_scores_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = features(1, 200), features(2, 150, shift=0.5)
    whole = precision_recall(real, made)
    monkeypatch.setattr(distances, "_BLOCK", 7)
    assert precision_recall(real, made) == whole


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((1, 3)), "at least two"),
        (np.zeros(3), "at least two"),
        (np.full((5, 3), np.nan), "not finite"),
    ],
)
def test_unusable_features_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gaussian.of(values)


def test_sets_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="24 and 5 dimensions"):
        frechet_distance(Gaussian.of(features(1)), Gaussian.of(features(1, width=5)))
    with pytest.raises(ValueError, match="24 and 5 dimensions"):
        precision_recall(features(1), features(1, width=5))
    with pytest.raises(ValueError, match="3 neighbours need more than 3 images"):
        precision_recall(features(1), features(1)[:3])


def test_scores_are_called_after_their_network() -> None:
    assert score_name("frechet", "efficientnet_lite0") == "frechet_efficientnet_lite0"
    assert score_name("recall", "vit_base_patch14_reg4_dinov2.lvd142m") == "recall_vit_base_patch14_reg4_dinov2_lvd142m"
