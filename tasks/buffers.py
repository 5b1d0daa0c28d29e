"""Memory of batches: used again once nobody holds it, page-locked where copies to an accelerator are to overlap."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

_OURS_ALONE = 3
"""References to an array that only its list, a loop variable and the question itself hold."""
_PAGE = 4096


class Buffers:
    """Arrays of batches for one stream. Fresh pages cost as much as what is written to them, so memory is used again
    as soon as no array, slice or tensor over it is left; whoever keeps a batch keeps its memory.

    kept: buffers of a kind that are remembered.
    pin: page-locked memory. Torch's own pool is used then, since it knows which copies are still under way.
    """

    def __init__(self, kept: int, pin: bool = False) -> None:
        self.kept, self.pin = kept, pin
        self._owned: dict[int, list[np.ndarray]] = {}

    def take(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """An array with content to be overwritten."""
        if self.pin:
            import torch

            kind = torch.from_numpy(np.empty(0, dtype)).dtype
            return torch.empty(tuple(shape), dtype=kind, pin_memory=True).numpy()
        size = math.prod(shape) * np.dtype(dtype).itemsize
        owned = self._owned.setdefault(size, [])
        for memory in owned:
            if sys.getrefcount(memory) == _OURS_ALONE:  # numpy's views, and torch's of them, hold the owner of the data
                return _over(memory, shape, dtype)
        memory = np.empty(size + _PAGE, np.uint8)
        if len(owned) < self.kept:
            owned.append(memory)
        return _over(memory, shape, dtype)


def _over(memory: np.ndarray, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array at the first page boundary: copies to 16 bytes past one are several times slower on some processors."""
    start = -memory.ctypes.data % _PAGE
    return memory[start : start + len(memory) - _PAGE].view(dtype).reshape(shape)


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
