"""Distances between two sets of feature vectors, in float64 and independent of how the sets were batched.

torch-fidelity computes the same figures; the tests hold ours to its numbers. Ours need no non-symmetric
eigenvalues, no matrix square root and no full distance matrix. A distance is only comparable with others on
the same network's features and the same number of images, and carries the network's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.floating]
_BLOCK = 1_024
"""Rows of the distance matrix in memory at once."""


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and unbiased covariance (D, D) of a set of features, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def of(cls, features_ND: Features) -> Gaussian:
        """Raises ValueError on fewer than two rows or values that are not finite."""
        features = _checked(features_ND)
        centred = features - (mean := features.mean(axis=0))
        return cls(mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½), at least 0 (Heusel et al. 2017, eq. 6).

    tr (S1 S2)^½ is the sum of the roots of the eigenvalues of the symmetric L' S2 L with S1 = L L', which are
    real and stay accurate where S1 is singular (fewer images than features).
    Raises ValueError when the dimensions differ.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"features of {one.mean.size} and {other.mean.size} dimensions cannot be compared")
    values, vectors = np.linalg.eigh(one.covariance)
    root = vectors * np.sqrt(values.clip(min=0.0))
    product = np.linalg.eigvalsh(root.T @ other.covariance @ root).clip(min=0.0)
    trace = np.trace(one.covariance) + np.trace(other.covariance) - 2.0 * np.sqrt(product).sum()
    gap = one.mean - other.mean
    return max(0.0, float(gap @ gap + trace))


def precision_recall(real_ND: Features, made_MD: Features, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2).

    Precision is the share of made images within the manifold of real ones, recall the share of real images
    within that of made ones; a set's manifold is the union of balls around its points that reach to the k-th
    nearest neighbour, the point itself not counted.
    Raises ValueError when a set has no k neighbours, or dimensions differ.
    """
    real, made = _checked(real_ND), _checked(made_MD)
    if real.shape[1] != made.shape[1]:
        raise ValueError(f"features of {real.shape[1]} and {made.shape[1]} dimensions cannot be compared")
    if min(len(real), len(made)) <= neighbours:
        raise ValueError(
            f"{neighbours} neighbours need more than {neighbours} images in each set, found {len(real)} and {len(made)}"
        )
    real_radii, made_radii = _radii(real, neighbours), _radii(made, neighbours)
    return _covered(made, real, real_radii), _covered(real, made, made_radii)


def score_name(score: str, network: str) -> str:
    """`frechet` and `efficientnet_lite0` → `frechet_efficientnet_lite0`: a score is called after its network."""
    return f"{score}_{re.sub('[^0-9a-zA-Z]+', '_', network).strip('_').lower()}"


def _checked(features: Features) -> NDArray[np.float64]:
    values = np.ascontiguousarray(features, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(f"scores need a matrix of at least two feature vectors, found shape {features.shape}")
    if not np.isfinite(values).all():
        raise ValueError("features hold values that are not finite: the images or the network are damaged")
    return values


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


def _covered(points: NDArray[np.float64], centres: NDArray[np.float64], radii: NDArray[np.float64]) -> float:
    """Share of points within at least one centre's radius."""
    inside = 0
    for start in range(0, len(points), _BLOCK):
        distances = _squared_distances(points[start : start + _BLOCK], centres)
        inside += int((distances <= radii).any(axis=1).sum())
    return inside / len(points)
