"""All scores of one examined set against another, with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from configs.scores import Evaluate
from tasks.scoring.bootstrap import Interval, interval, share_interval
from tasks.scoring.distances import FrechetFrom, class_score, coverage, kernel_distance
from tasks.scoring.features import ImageFeatures, PerImageFeatures

_SHARES = 1_000
"""Replicates of a share's interval: one random number each."""
JUDGED = "judged"
Name = Callable[[str], str]


@dataclass
class Scores:
    """Values by name."""

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    """At 95 %, for other images of the same model against the same reference."""
    spread: dict[str, float] = field(default_factory=dict)
    """Standard deviation among the subsets or splits of which a score is the mean."""


def compare(
    real: ImageFeatures,
    made: ImageFeatures,
    section: Evaluate,
    names: Mapping[str, Name],
    classes: int,
    intervals: bool = True,
) -> Scores:
    """Scores of `made` with `real` as the reference.

    Args:
        real: the reference.
        made: generated images, or real ones for the floor.
        section: neighbours, subsets, replicates and their seed.
        names: what scores on `features`, and on `pool` where Inception looked, are called.
        classes: number of labels; images with none of them cannot be judged.
        intervals: whether to find any.

    Raises ValueError when a set is too small or the vectors do not compare.
    """
    scores = Scores()
    replicates = section.bootstrap if intervals else 0
    for vectors, name in names.items():
        _frechet(scores, real, made, vectors, name("frechet"), section, replicates)
        if vectors == JUDGED:  # a second opinion of the set, not of single images
            continue
        _neighbourhoods(scores, real, made, vectors, name, section, replicates)
    if "pool" in names:
        if "spatial" in real.gaussians:
            _frechet(scores, real, made, "spatial", names["pool"]("spatial_frechet"), section, replicates)
        _class_score(scores, made.findings, names["pool"]("class_score"), section, replicates)
    if made.findings.predictions is not None and (made.findings.labels < classes).all():
        right = made.findings.predictions == made.findings.labels
        scores.values["class_consistency"] = float(right.mean())
        if replicates:
            scores.intervals["class_consistency"] = share_interval(right, _SHARES, section.seed)
    return scores


def _frechet(
    scores: Scores,
    real: ImageFeatures,
    made: ImageFeatures,
    vectors: str,
    name: str,
    section: Evaluate,
    replicates: int,
) -> None:
    distance, rows = FrechetFrom(real.gaussians[vectors]), _vectors(made, vectors)
    scores.values[name] = value = distance.of_rows(rows)
    if replicates:

        def again(chosen: NDArray[np.int64]) -> float:
            return distance.of_rows(rows[chosen])

        low, high = interval(value, again, len(rows), replicates, section.seed)
        scores.intervals[name] = (max(0.0, low), high)


def _neighbourhoods(
    scores: Scores,
    real: ImageFeatures,
    made: ImageFeatures,
    vectors: str,
    name: Name,
    section: Evaluate,
    replicates: int,
) -> None:
    """Precision, recall and kernel distance: what is said of single images and pairs."""
    ours, theirs = _vectors(made, vectors), _vectors(real, vectors)
    covered = coverage(theirs, ours, section.neighbours)
    for score, hits in (("precision", covered.made), ("recall", covered.real)):
        scores.values[name(score)] = float(hits.mean())
        if replicates:
            scores.intervals[name(score)] = share_interval(hits, _SHARES, section.seed)
    kernel = kernel_distance(theirs, ours, section.kernel_subsets, section.kernel_subset_size, section.seed)
    scores.values[name("kernel_distance")], scores.spread[name("kernel_distance")] = kernel


def _class_score(scores: Scores, made: PerImageFeatures, name: str, section: Evaluate, replicates: int) -> None:
    assert made.logits is not None, "Inception gives logits"
    logits = made.logits
    scores.values[name], scores.spread[name] = class_score(logits, section.seed)
    if replicates:

        def again(chosen: NDArray[np.int64]) -> float:
            return class_score(logits[chosen], section.seed)[0]

        scores.intervals[name] = interval(scores.values[name], again, len(logits), replicates, section.seed)


def _vectors(found: ImageFeatures, vectors: str) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = getattr(found.findings, vectors)
    return rows
