"""FLOPs that really happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Counter(TorchDispatchMode):
    """torch's formulas without its watch over modules, which forbids gradients of tensors that begin a graph."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, formula = kwargs or {}, flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:  # inference mode hands over whole operators
                found = func.decompose(*args, **given)
            return func(*args, **given) if found is NotImplemented else found
        found = func(*args, **given)
        self.flops += formula(*args, **given, out_val=found)
        return found


def counted(run: Callable[[], object]) -> int:
    # The fused attention of a CPU is not among the operators that torch's counter knows.
    with Counter() as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.flops
