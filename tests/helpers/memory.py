"""What Python and Arrow hold at most while something is done."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pyarrow as pa

_POOLS: list[pa.MemoryPool] = []
"""Kept, since what was taken from one may be given back to it at any time."""


def peak_bytes(work: Callable[[], object]) -> int:
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    _POOLS.append(pool)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        work()
        return int(pool.max_memory() + tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
