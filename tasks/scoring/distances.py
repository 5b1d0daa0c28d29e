"""Distances between two sets of feature vectors, in float64 and independent of how the sets were batched.

Inception score and kernel distance are torch-fidelity's. It computes the others too, and the tests hold ours to its
numbers, but ours need no non-symmetric eigenvalues, no matrix square root and no full distance matrix. A distance is
only comparable with others on the same network's features and the same number of images, and carries the network's
name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.scoring.gaussian import Features, Gaussian, checked

_BLOCK = 1_024
"""Rows of the distance matrix in memory at once."""
SPLIT = 5_000
"""Images per split of the Inception score, as in ADM's evaluator: 50,000 make the usual ten."""


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½), at least 0 (Heusel et al. 2017, eq. 6).

    Raises ValueError when the dimensions differ.
    """
    return FrechetFrom(one)(other)


@dataclass(frozen=True)
class FrechetFrom:
    """The Fréchet distance of many sets from one.

    tr (S1 S2)^½ is the sum of the roots of the eigenvalues of a symmetric product, which are real and stay accurate
    where a covariance is singular: L' S2 L with S1 = L L', or of fewer images than dimensions, where S2 = A' A, the
    much smaller A S1 A'.
    """

    one: Gaussian

    def __call__(self, other: Gaussian) -> float:
        """Raises ValueError when the dimensions differ."""
        self._check(other.mean.size)
        product = self._root.T @ other.covariance @ self._root
        return self._distance(other.mean, float(np.trace(other.covariance)), product)

    def of_rows(self, features_ND: Features) -> float:
        """Of a set's features themselves. Raises ValueError when they cannot be scored or the dimensions differ."""
        if len(features_ND) > self.one.mean.size:
            return self(Gaussian.of(features_ND))
        rows = checked(features_ND, least=2)
        self._check(rows.shape[1])
        mean = rows.mean(axis=0)
        factor = (rows - mean) / np.sqrt(len(rows) - 1)
        return self._distance(mean, float(np.square(factor).sum()), factor @ self.one.covariance @ factor.T)

    @cached_property
    def _root(self) -> NDArray[np.float64]:
        values, vectors = np.linalg.eigh(self.one.covariance)
        root: NDArray[np.float64] = vectors * np.sqrt(values.clip(min=0.0))
        return root

    def _distance(self, mean: NDArray[np.float64], trace: float, product: NDArray[np.float64]) -> float:
        between = np.sqrt(np.linalg.eigvalsh(product).clip(min=0.0)).sum()
        gap = self.one.mean - mean
        return max(0.0, float(gap @ gap + np.trace(self.one.covariance) + trace - 2.0 * between))

    def _check(self, width: int) -> None:
        if self.one.mean.size != width:
            raise ValueError(f"features of {self.one.mean.size} and {width} dimensions cannot be compared")


@dataclass(frozen=True)
class Coverage:
    """Which images of two sets lie within the other set's manifold (Kynkäänniemi et al. 2019, eq. 1 and 2)."""

    made: NDArray[np.bool_]
    """(M,) of each made image, whether it is within the manifold of real ones; their share is the precision."""
    real: NDArray[np.bool_]
    """(N,) of each real image, whether it is within the manifold of made ones; their share is the recall."""

    @property
    def precision(self) -> float:
        return float(self.made.mean())

    @property
    def recall(self) -> float:
        return float(self.real.mean())


def coverage(real_ND: Features, made_MD: Features, neighbours: int = 3) -> Coverage:
    """Improved precision and recall, image by image.

    A set's manifold is the union of balls around its points that reach to the k-th nearest neighbour, the point
    itself not counted.
    Raises ValueError when a set has no k neighbours, or dimensions differ.
    """
    real, made = _comparable(real_ND, made_MD)
    if min(len(real), len(made)) <= neighbours:
        raise ValueError(
            f"{neighbours} neighbours need more than {neighbours} images in each set, found {len(real)} and {len(made)}"
        )
    real_radii, made_radii = _radii(real, neighbours), _radii(made, neighbours)
    return Coverage(made=_covered(made, real, real_radii), real=_covered(real, made, made_radii))


def precision_recall(real_ND: Features, made_MD: Features, neighbours: int = 3) -> tuple[float, float]:
    """Shares of :func:`coverage`; raises as it does."""
    covered = coverage(real_ND, made_MD, neighbours)
    return covered.precision, covered.recall


def kernel_distance(
    real_ND: Features, made_MD: Features, subsets: int = 100, size: int = 1_000, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy under the kernel (x·y / D + 1)³, unbiased: KID where features are Inception's.

    The mean over random subsets of each set, and the standard deviation among them (Bińkowski et al. 2018, 4; by
    torch-fidelity). Sets smaller than a subset are taken whole.
    Raises ValueError when dimensions differ.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    real, made = _comparable(real_ND, made_MD)
    size = min(size, len(real), len(made))
    if size == len(real) == len(made):
        subsets = 1  # every subset would be the whole
    found = kid_features_to_metric(
        *(torch.from_numpy(made), torch.from_numpy(real)),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def class_score(logits_NC: Features, seed: int = 0) -> tuple[float, float]:
    """exp of the mean divergence of an image's class probabilities from those of all: the Inception score where the
    logits are Inception's (Salimans et al. 2016, 4).

    The mean over splits of about 5,000 images in random order, and the standard deviation among them (by
    torch-fidelity, float64).
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    logits = torch.from_numpy(checked(logits_NC, least=2))
    found = isc_features_to_metric(logits, splits=max(1, round(len(logits) / SPLIT)), shuffle=True, rng_seed=seed)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]


def score_name(score: str, network: str) -> str:
    """`frechet` and `efficientnet_lite0` → `frechet_efficientnet_lite0`: a score is called after its network."""
    return f"{score}_{re.sub('[^0-9a-zA-Z]+', '_', network).strip('_').lower()}"


def _comparable(real: Features, made: Features) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    one, other = checked(real, least=2), checked(made, least=2)
    if one.shape[1] != other.shape[1]:
        raise ValueError(f"features of {one.shape[1]} and {other.shape[1]} dimensions cannot be compared")
    return one, other


def _squared_distances(rows: NDArray[np.float64], columns: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = (rows**2).sum(axis=1)[:, None] + (columns**2).sum(axis=1)[None, :]
    return np.maximum(norms - 2.0 * rows @ columns.T, 0.0)


def _radii(points: NDArray[np.float64], neighbours: int) -> NDArray[np.float64]:
    """Squared distance of each point to its k-th nearest neighbour in the set."""
    radii = np.empty(len(points))
    for start in range(0, len(points), _BLOCK):
        distances = _squared_distances(points[start : start + _BLOCK], points)
        own = np.arange(len(distances))
        distances[own, start + own] = np.inf
        radii[start : start + _BLOCK] = np.partition(distances, neighbours - 1, axis=1)[:, neighbours - 1]
    return radii


def _covered(
    points: NDArray[np.float64], centres: NDArray[np.float64], radii: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Whether each point is within at least one centre's radius."""
    inside = np.empty(len(points), dtype=np.bool_)
    for start in range(0, len(points), _BLOCK):
        distances = _squared_distances(points[start : start + _BLOCK], centres)
        inside[start : start + _BLOCK] = (distances <= radii).any(axis=1)
    return inside
