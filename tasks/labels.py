"""What belongs to one image of a sample: its label and its random numbers, pure functions of (seed, index).

Counter-based generators (Philox, keyed by seed and index) give every image its own stream, so an image does
not depend on the batch, the worker or the order in which it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Plan = Literal["balanced", "random"]
_NOISE, _LABEL = 0, 1


def image_labels(plan: Plan, indices: NDArray[np.int64], classes: int, seed: int) -> NDArray[np.int64]:
    """Labels of images by index, (B,) → (B,).

    `balanced` goes round the classes (index modulo classes), so that every stretch of the sample is as
    balanced as the whole and no later shuffle is needed for scores on parts of it; `random` draws each label
    uniformly from the image's own stream.
    Raises ValueError on an unknown plan.
    """
    if plan == "balanced":
        return indices % classes
    if plan == "random":
        return np.array([_stream(seed, int(i), _LABEL).integers(classes) for i in indices], dtype=np.int64)
    raise ValueError(f"label plan must be 'balanced' or 'random', found {plan!r}")


def image_noise(indices: NDArray[np.int64], shape: Sequence[int], seed: int, draw: int = 0) -> NDArray[np.float32]:
    """Standard normal noise of images by index, (B,) → (B, *shape); `draw` counts an image's later draws."""
    streams = (_stream(seed, int(index), _NOISE + 2 * draw) for index in indices)
    return np.stack([stream.standard_normal(tuple(shape), dtype=np.float32) for stream in streams])


def shown_per_class(
    labels: NDArray[np.int64], columns: int, rows: int, among: NDArray[np.int64] | None = None
) -> list[list[int]]:
    """Positions to show in a picture of one class per column: at most `rows` lists of positions in `labels`.

    With more classes than columns, columns are spread evenly over the classes (`among` these, where given). Every
    row is complete: rows end where one of the shown classes has no more images.
    """
    found = np.unique(labels) if among is None else np.intersect1d(labels, among)
    shown = found[np.linspace(0, len(found) - 1, min(columns, len(found))).round().astype(int)]
    by_class = [np.flatnonzero(labels == label)[:rows].tolist() for label in shown]
    return [list(row) for row in zip(*by_class, strict=False)]


def _stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(counter=[0, 0, 0, purpose], key=[seed % 2**64, index]))
