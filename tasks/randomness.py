"""Random numbers that belong to images: the same image number draws the same numbers on any worker.

A counter-based generator (Philox) is keyed by (seed, purpose, image number), so nothing about ranks, batches or
restarts enters, and a checkpoint has no random state to keep.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


class ImageNumbers:
    """Numbers for one purpose of one training, e.g. `ImageNumbers(seed, "noise")`."""

    def __init__(self, seed: int, purpose: str) -> None:
        self._key = (seed & 0xFFFFFFFF) << 32 | zlib.crc32(purpose.encode())

    def uniform(self, positions: np.ndarray) -> Tensor:
        """Uniform in (0, 1), float32 (B,), one per image number in `positions` (int64 (B,))."""
        # A half step inside the interval: the quantile function of the normal is infinite at 0 and 1.
        draws = [(generator.integers(0, 1 << 23) + 0.5) / (1 << 23) for generator in self._generators(positions)]
        return torch.tensor(draws, dtype=torch.float32)

    def normal(self, positions: np.ndarray, shape: Sequence[int]) -> Tensor:
        """Standard normal, float32 (B, *shape)."""
        out = np.empty((len(positions), *shape), np.float32)
        for row, generator in zip(out, self._generators(positions), strict=True):
            generator.standard_normal(out=row, dtype=np.float32)
        return torch.from_numpy(out)

    def _generators(self, positions: np.ndarray) -> Iterator[np.random.Generator]:
        """A generator at the beginning of each image's numbers. It is one, set anew: to make one costs three times as
        much. Not kept between calls, which may come from several threads."""
        bits = np.random.Philox(key=[self._key, 0])
        generator, state = np.random.Generator(bits), bits.state
        for position in positions.tolist():
            state["state"]["key"][1] = position
            bits.state = state
            yield generator
