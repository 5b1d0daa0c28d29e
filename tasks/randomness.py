"""Random numbers that belong to images: the same image draws the same numbers on any worker, in any batch.

A counter-based generator (Philox) is keyed by what the numbers belong to, so nothing about ranks, batches or restarts
enters, and a checkpoint has no random state to keep. There are four keyings, one for each kind of name: images of a
training and of a sample have numbers, stored images have keys, and an order has words. They stay as they are: another
would give everybody other orders, latents and samples.
"""

from __future__ import annotations

import hashlib
import json
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

    def seed(self, position: int) -> int:
        """For a generator of torch's own, where numbers begin at the image of this number."""
        (generator,) = self._generators(np.array([position]))
        return int(generator.integers(1 << 63))

    def _generators(self, positions: np.ndarray) -> Iterator[np.random.Generator]:
        """A generator at the beginning of each image's numbers. It is one, set anew: to make one costs three times as
        much. Not kept between calls, which may come from several threads."""
        bits = np.random.Philox(key=[self._key, 0])
        generator, state = np.random.Generator(bits), bits.state
        for position in positions.tolist():
            state["state"]["key"][1] = position
            bits.state = state
            yield generator


def sample_stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    """Numbers of image `index` of a sample, for one of a few purposes."""
    return np.random.Generator(np.random.Philox(counter=[0, 0, 0, purpose], key=[seed % 2**64, index]))


def stream(*words: int) -> np.random.Generator:
    """Numbers of anything that a few integers name, such as an epoch of an order."""
    seed = np.random.SeedSequence([word % 2**64 for word in words])
    return np.random.Generator(np.random.Philox(seed))


def key_noise(seed: int, keys: Sequence[str], column: str, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 noise (len(keys), *shape) whose every row belongs to one image and column, whoever draws
    it, when, and beside which others.

    Our choice: a counter-based generator (Philox) keyed by a hash of (seed, column, key).
    """
    salt = hashlib.blake2b(json.dumps([seed, column]).encode(), digest_size=32).digest()
    philox = np.random.Philox(key=0)
    generator, state = np.random.Generator(philox), philox.state
    noise = np.empty((len(keys), *shape), np.float32)
    for row, key in zip(noise, keys, strict=True):
        digest = hashlib.blake2b(key.encode(), digest_size=16, key=salt).digest()
        state["state"]["key"] = np.frombuffer(digest, "<u8")
        philox.state = state  # counter at zero: a tenth of the cost of another generator
        generator.standard_normal(out=row, dtype=np.float32)
    return noise
