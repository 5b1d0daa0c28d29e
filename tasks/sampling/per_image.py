"""What belongs to one image of a sample: its label and its random numbers, pure functions of (seed, index).

Counter-based generators (Philox, keyed by seed and index) give every image its own stream, so an image does
not depend on the batch, the worker or the order in which it is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.randomness import sample_stream

Plan = Literal["balanced", "random", "unconditional"] | Sequence[int] | Mapping[int, int]
_NOISE, _LABEL = 0, 1


def image_labels(plan: Plan, indices: NDArray[np.int64], classes: int, seed: int) -> NDArray[np.int64]:
    """Labels of images by index, (B,) → (B,).

    `balanced` goes round the classes (index modulo classes), so that every stretch of the sample is as
    balanced as the whole and no later shuffle is needed for scores on parts of it; `random` draws each label
    uniformly from the image's own stream; `unconditional` is the null label, `classes`, for all. A list of labels is
    gone round in its order. A mapping from label to number of images is gone round in an order drawn from the seed,
    so that no part of the sample is all of one class.
    Raises ValueError on an unknown plan.
    """
    if plan == "balanced":
        return indices % classes
    if plan == "random":
        return np.array([sample_stream(seed, int(i), _LABEL).integers(classes) for i in indices], dtype=np.int64)
    if plan == "unconditional":
        return np.full(len(indices), classes, dtype=np.int64)
    if isinstance(plan, str):
        raise ValueError(f"label plan must be 'balanced', 'random', 'unconditional' or name labels, found {plan!r}")
    order = _mixed(tuple(sorted(plan.items())), seed) if isinstance(plan, Mapping) else np.asarray(plan, np.int64)
    return order[indices % len(order)]


@lru_cache(maxsize=4)
def _mixed(counts: tuple[tuple[int, int], ...], seed: int) -> NDArray[np.int64]:
    """So many of each label, in an order drawn from the seed."""
    labels, times = np.array(counts, dtype=np.int64).T
    return sample_stream(seed, 0, _LABEL).permutation(labels.repeat(times))


def image_noise(indices: NDArray[np.int64], shape: Sequence[int], seed: int, draw: int = 0) -> NDArray[np.float32]:
    """Standard normal noise of images by index, (B,) → (B, *shape); `draw` counts an image's later draws."""
    streams = (sample_stream(seed, int(index), _NOISE + 2 * draw) for index in indices)
    return np.stack([stream.standard_normal(tuple(shape), dtype=np.float32) for stream in streams])


def shown_per_class(
    labels: NDArray[np.int64], columns: int, rows: int, among: NDArray[np.int64] | None = None
) -> list[list[int]]:
    """Positions to show in a picture of one class per column: at most `rows` lists of positions in `labels`.

    With more classes than columns, columns are spread evenly over the classes (`among` these, where given). Every
    row is complete: rows end where one of the shown classes has no more images. A single class fills all columns.
    """
    found = np.unique(labels) if among is None else np.intersect1d(labels, among)
    if len(found) == 1:
        positions = np.flatnonzero(labels == found[0]).tolist()
        width = min(columns, len(positions))
        return [positions[start : start + width] for start in range(0, len(positions) - width + 1, width)][:rows]
    shown = found[np.linspace(0, len(found) - 1, min(columns, len(found))).round().astype(int)]
    by_class = [np.flatnonzero(labels == label)[:rows].tolist() for label in shown]
    return [list(row) for row in zip(*by_class, strict=False)]
