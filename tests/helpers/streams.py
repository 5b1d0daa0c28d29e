"""What a loader serves, put together and compared."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from tasks.loading.loader import Batch, Loader
from tasks.loading.order import Order


def served(order: Order, epoch: int, start: int, stop: int) -> list[int]:
    window_rows = lru_cache(order.window_rows)
    windows = zip(*(found.tolist() for found in order.windows(np.arange(start, stop))), strict=True)
    return [int(window_rows(epoch, lane, window)[turn]) for lane, window, turn in windows]


def take(loader: Loader, images: int, cursor: int = 0, world: int = 1) -> list[Batch]:
    """Global batches put together from every worker's slices."""
    streams = [loader.stream(cursor, rank, world) for rank in range(world)]
    found = []
    for _ in range(-(-images // loader.batch)):
        slices = [next(stream) for stream in streams]
        assert len({part.images_seen for part in slices}) == 1
        found.append(
            Batch(
                slices[0].images_seen,
                np.concatenate([part.positions for part in slices]),
                [key for part in slices for key in part.keys],
                np.concatenate([part.labels for part in slices]),
                {name: np.concatenate([part.arrays[name] for part in slices]) for name in slices[0].arrays},
            )
        )
    for stream in streams:
        stream.close()
    return found


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        x.images_seen == y.images_seen
        and x.keys == y.keys
        and np.array_equal(x.positions, y.positions)
        and np.array_equal(x.labels, y.labels)
        and all(np.array_equal(x.arrays[name], y.arrays[name]) for name in x.arrays)
        for x, y in zip(a, b, strict=True)
    )


def with_a_flipped_bit(data: bytes) -> bytes:
    """In the middle."""
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
