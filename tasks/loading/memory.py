"""Memory of batches: used again once nobody holds it, page-locked where copies to an accelerator are to overlap."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

_OURS_ALONE = 2
"""References to an array that only its owner and the question itself hold."""
_PAGE = 4096


class _Memory:
    """A buffer that is used again and again."""

    def __init__(self, size: int) -> None:
        self.data = np.empty(size + _PAGE, np.uint8)
        # Copies to 16 bytes past a page boundary are several times slower on some processors.
        self.start, self.size = -self.data.ctypes.data % _PAGE, size
        self.rows: list[memoryview] = []

    @property
    def free(self) -> bool:
        """Numpy's views, and torch's of them, hold the owner of the data; all of our rows hold it once."""
        return sys.getrefcount(self.data) == _OURS_ALONE + bool(self.rows)

    def array(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        return self.data[self.start : self.start + self.size].view(dtype).reshape(shape)

    def by_row(self, count: int) -> list[memoryview]:
        if len(self.rows) != count:
            self.rows = _rows(self.data.data[self.start : self.start + self.size], count)
        return self.rows


class Buffers:
    """Arrays of batches for one stream. Fresh pages cost as much as what is written to them, so memory is used again
    as soon as no array, slice or tensor over it is left; whoever keeps a batch keeps its memory.

    kept: buffers of a size that are remembered.
    pin: page-locked memory. Torch's own pool is used then, since it knows which copies are still under way.
    """

    def __init__(self, kept: int, pin: bool = False) -> None:
        self.kept, self.pin = kept, pin
        self._owned: dict[int, list[_Memory]] = {}

    def take(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """An array with content to be overwritten."""
        return _pinned(shape, dtype) if self.pin else self._memory(shape, dtype).array(shape, dtype)

    def take_rows(self, shape: Sequence[int], dtype: Any) -> tuple[np.ndarray, list[memoryview]]:
        """The same, and the bytes of each row, which are not to outlive the array."""
        if self.pin:
            array = _pinned(shape, dtype)
            return array, _rows(array.view(np.uint8).data.cast("B"), len(array))
        memory = self._memory(shape, dtype)
        return memory.array(shape, dtype), memory.by_row(shape[0])

    def _memory(self, shape: Sequence[int], dtype: Any) -> _Memory:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        owned = self._owned.setdefault(size, [])
        for memory in owned:
            if memory.free:
                return memory
        memory = _Memory(size)
        if len(owned) < self.kept:
            owned.append(memory)
        return memory


def _pinned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    import torch

    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.empty(tuple(shape), dtype=kind, pin_memory=True).numpy()


def _rows(data: memoryview, count: int) -> list[memoryview]:
    width = len(data) // count
    return [data[start : start + width] for start in range(0, len(data), width)]


def as_tensor(values: np.ndarray) -> Any:
    """A tensor over the memory of a batch's array, or of a slice of its first axis.

    In page-locked memory it is a part of the tensor that owns it: only so does torch's allocator learn that an
    asynchronous copy still reads it. (A tensor made from the address of a slice is none that the allocator knows.)
    """
    import torch

    whole = values if values.base is None or isinstance(values.base, torch.Tensor) else values.base
    owner = whole.base
    if not isinstance(owner, torch.Tensor):
        return torch.from_numpy(values)
    start = (values.ctypes.data - whole.ctypes.data) // whole.strides[0]
    return owner[start : start + len(values)]
