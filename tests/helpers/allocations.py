"""Bytes that torch's own accounting finds on a CPU: kept for a backward pass, and live at once in a pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def kept(network: nn.Module, run: Callable[[], object]) -> int:
    """Bytes of all tensors that `run` saves for a backward pass, the network's own left out."""
    own = {each.untyped_storage()._cdata for each in (*network.parameters(), *network.buffers())}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes(), value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        held = run()
    del held
    return sum(size for size, _ in found.values())


class Height(TorchDispatchMode):
    """The most bytes that were live at once of what operations made, `known` tensors left out."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.most = self._live = 0
        self._seen: dict[int, Any] = {each.untyped_storage()._cdata: None for each in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._live += size
        self.most = max(self.most, self._live)
        self._seen[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._live -= size
        self._seen.pop(key, None)


def a_pass(network: nn.Module, call: Callable[[int], object], half: bool) -> float:
    """Bytes that each further image of a batch takes in a pass without gradients."""
    heights = []
    for batch in (1, 2):
        height = Height([*network.parameters(), *network.buffers()])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half), height:
            call(batch)
        heights.append(height.most)
    return float(heights[1] - heights[0])
