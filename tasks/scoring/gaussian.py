"""Mean and covariance of feature vectors, gathered in one pass and bitwise independent of how the vectors arrive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.floating]
_BLOCK = 1_024
"""Rows that are summed at once: whatever the pieces in which rows come, sums are over these blocks in this order."""


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and unbiased covariance (D, D) of a set of features, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def of(cls, features_ND: Features) -> Gaussian:
        """Raises ValueError on fewer than two rows or values that are not finite."""
        moments = GaussianAccumulator()
        moments.add(features_ND)
        return moments.gaussian()


class GaussianAccumulator:
    """Count, mean and scatter of rows added piece by piece; memory does not grow with their number.

    Blocks of a fixed number of rows, counted from the first row on, are merged one after the other in float64 (Chan,
    Golub and LeVeque 1983, pairwise update). The result depends on the rows and their order, not on the pieces: it is
    bitwise the same for any batch size, file size, number of workers or order of arrival that keeps the rows in
    order. It may differ in the last bits between machines or numbers of BLAS threads.
    """

    def __init__(self) -> None:
        self.count = 0
        """Rows added so far."""
        self._width = 0
        self._waiting: list[NDArray[np.float64]] = []
        self._merged = _Sums.nothing()

    def add(self, features_ND: Features) -> None:
        """Raises ValueError on anything but finite rows of the same width as before."""
        rows = checked(features_ND)
        if self.count and rows.shape[1] != self._width:
            raise ValueError(f"features of {self._width} and {rows.shape[1]} dimensions cannot be put together")
        self._width = rows.shape[1]
        self.count += len(rows)
        for piece in _pieces(rows, _BLOCK - sum(map(len, self._waiting))):
            self._waiting.append(piece)
            if sum(map(len, self._waiting)) == _BLOCK:
                self._merged = self._merged.with_block(np.concatenate(self._waiting))
                self._waiting = []

    def gaussian(self) -> Gaussian:
        """Of the rows so far; more may be added. Raises ValueError on fewer than two."""
        if self.count < 2:
            raise ValueError(f"scores need at least two feature vectors, found {self.count}")
        merged = self._merged.with_block(np.concatenate(self._waiting)) if self._waiting else self._merged
        return Gaussian(merged.mean, merged.scatter / (self.count - 1))


@dataclass(frozen=True)
class _Sums:
    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]
    """Sum of outer products of what is left of the rows without their mean."""

    @classmethod
    def nothing(cls) -> _Sums:
        return cls(0, np.zeros(0), np.zeros((0, 0)))

    def with_block(self, rows_ND: NDArray[np.float64]) -> _Sums:
        mean = rows_ND.mean(axis=0)
        centred = rows_ND - mean
        scatter = centred.T @ centred
        if not self.count:
            return _Sums(len(rows_ND), mean, scatter)
        count, gap = self.count + len(rows_ND), mean - self.mean
        between = np.outer(gap, gap) * (self.count * len(rows_ND) / count)
        return _Sums(count, self.mean + gap * (len(rows_ND) / count), self.scatter + scatter + between)


def _pieces(rows_ND: NDArray[np.float64], room: int) -> Iterator[NDArray[np.float64]]:
    """The rows cut where blocks end; the open block has room for `room` more."""
    start = 0
    while start < len(rows_ND):
        end = min(len(rows_ND), start + room)
        yield rows_ND[start:end]
        start, room = end, _BLOCK


def checked(features: Features, least: int = 0) -> NDArray[np.float64]:
    """The same values in float64. Raises ValueError on anything but a finite matrix of at least so many rows."""
    values = np.ascontiguousarray(features, dtype=np.float64)
    if values.ndim != 2 or len(values) < least:
        raise ValueError(f"scores need a matrix of at least two feature vectors, found shape {np.shape(features)}")
    if not np.isfinite(values).all():
        raise ValueError("features hold values that are not finite: the images or the network are damaged")
    return values
