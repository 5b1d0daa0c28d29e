"""Figures of a latent space: how evenly it is filled, which channels carry something, what a line can read from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.floating[Any]]
Labels = NDArray[np.integer[Any]]
ACTIVE_VARIANCE = 0.01
"""A channel is active where the mean of its posterior varies by more than this over images (Burda et al. 2016, 2.3)."""
_RIDGES = tuple(10.0**power for power in range(-2, 6))


@dataclass(frozen=True)
class Uniformity:
    """How evenly points lie, from the density that an estimate finds at each of them (papers.md 1.8, table 6)."""

    variation: float
    """Standard deviation over mean of the densities; 0 is even."""
    gini: float
    """Gini coefficient of the densities; 0 is even."""
    entropy: float
    """Of the densities as shares, over that of equal shares; 1 is even."""

    @classmethod
    def of_densities(cls, densities_N: Rows) -> Uniformity:
        """Raises ValueError where a density is negative or all are zero."""
        values = np.sort(np.asarray(densities_N, np.float64))
        count, total = len(values), values.sum()
        if total <= 0 or values[0] < 0:
            raise ValueError("densities must not be negative, and one must be positive")
        ranks = np.arange(1, count + 1)
        shares = values[values > 0] / total
        return cls(
            variation=float(values.std() / values.mean()),
            gini=float(((2 * ranks - count - 1) * values).sum() / (count * total)),
            entropy=float(-(shares * np.log(shares)).sum() / np.log(count)),
        )


def uniformity(points_NC: Rows, runs: int = 3, seed: int = 0) -> Uniformity:
    """How evenly latent vectors lie, the mean over `runs` embeddings.

    The density estimate, where the paper names none: each channel is standardised, t-SNE (scikit-learn, perplexity 30
    or a quarter of the points) lays the points out in the plane, and a Gaussian kernel estimate with Scott's bandwidth
    gives the density at each of them. (The authors' own tool averages runs of t-SNE; the paper's three figures fit
    densities at about 1,000 points. Our reading: compare figures only with others made here.)
    Raises ValueError for fewer than 16 points or values that are not finite.
    """
    from scipy.stats import gaussian_kde
    from sklearn.manifold import TSNE

    points = np.asarray(points_NC, np.float64)
    if len(points) < 16 or not np.isfinite(points).all():
        raise ValueError(f"uniformity needs at least 16 finite points, found {points.shape}")
    scaled = (points - points.mean(axis=0)) / np.maximum(points.std(axis=0), 1e-12)
    found = []
    for run in range(runs):
        perplexity = min(30.0, len(points) / 4)
        plane = TSNE(perplexity=perplexity, init="random", random_state=seed + run).fit_transform(scaled)
        found.append(Uniformity.of_densities(gaussian_kde(plane.T)(plane.T)))
    return Uniformity(
        *(float(np.mean(values)) for values in zip(*(vars(each).values() for each in found), strict=True))
    )


def one_cell_each(latents_NChw: Rows, seed: int = 0) -> Rows:
    """The latent vector of one drawn cell of every image, (N, C): points that do not depend on one another."""
    count, channels = latents_NChw.shape[:2]
    cells = latents_NChw.reshape(count, channels, -1)
    drawn = np.random.default_rng(seed).integers(cells.shape[2], size=count)
    chosen: Rows = cells[np.arange(count), :, drawn]
    return chosen


@dataclass(frozen=True)
class Usage:
    """What each channel is used for, (C,) each."""

    deviation: Rows
    """Standard deviation of the posterior's mean over images and cells."""
    nats: Rows
    """Mean divergence from the standard normal of one cell, in nats."""

    @classmethod
    def of(cls, means_NChw: Rows, deviations_NChw: Rows) -> Usage:
        means, variances = np.asarray(means_NChw, np.float64), np.square(np.asarray(deviations_NChw, np.float64))
        nats = 0.5 * (means**2 + variances - 1 - np.log(np.maximum(variances, 1e-30)))
        return cls(means.std(axis=(0, 2, 3)), nats.mean(axis=(0, 2, 3)))

    @property
    def active(self) -> float:
        """Share of the channels that are active."""
        return float((np.square(self.deviation) > ACTIVE_VARIANCE).mean())

    @property
    def effective(self) -> float:
        """Channels that would carry the same variance in equal shares: exp of the entropy of the shares."""
        shares = np.square(self.deviation) / np.square(self.deviation).sum()
        shares = shares[shares > 0]
        return float(np.exp(-(shares * np.log(shares)).sum()))


def probe(train_ND: Rows, train_labels: Labels, test_ND: Rows, test_labels: Labels) -> float:
    """Accuracy on the test rows of a linear classifier fitted to the others: ridge regression on one-hot labels, its
    strength chosen by leave-one-out, after every dimension is standardised. It has no step size and no end of training
    to argue about (our choice).
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    line = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=_RIDGES))
    line.fit(np.asarray(train_ND, np.float64), train_labels)
    return float(line.score(np.asarray(test_ND, np.float64), test_labels))


@dataclass(frozen=True)
class CellSums:
    """Sums over cells from which lines from latents to features and principal components follow; float64."""

    cells: int
    zz_CC: Rows
    zf_CD: Rows
    ff_DD: Rows
    f_D: Rows

    @classmethod
    def of(cls, z_NC: Rows, f_ND: Rows) -> CellSums:
        z, f = np.asarray(z_NC, np.float64), np.asarray(f_ND, np.float64)
        return cls(len(z), z.T @ z, z.T @ f, f.T @ f, f.sum(axis=0))

    def __add__(self, other: CellSums) -> CellSums:
        return CellSums(
            *(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    @property
    def line_CD(self) -> Rows:
        """The linear map without offset, as the alignment loss has one, that takes latents nearest to features."""
        size = len(self.zz_CC)
        ridge = 1e-8 * max(float(np.trace(self.zz_CC)), 1e-30) / size
        found: Rows = np.linalg.solve(self.zz_CC + ridge * np.eye(size), self.zf_CD)
        return found

    def components(self, channels: int) -> tuple[Rows, Rows]:
        """Mean (D,) of the features and their first principal directions (D, channels), the widest first."""
        mean = self.f_D / self.cells
        _, directions = np.linalg.eigh(self.ff_DD / self.cells - np.outer(mean, mean))
        return mean, np.flip(directions, axis=1)[:, :channels].copy()
