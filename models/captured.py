"""Passes of a frozen network as CUDA graphs: a small batch is launched at once instead of kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.graphs import Tell, surroundings

Pass = Callable[..., Tensor]
Record = Callable[[nn.Module, tuple[Tensor | None, ...]], Pass]
"""Takes the network and the first call's arguments; gives what stands for further calls of the same kind."""


class Captured:
    """A frozen network whose passes are recorded once for every kind of call (shapes, dtypes, precision) and replayed.

    Replays are what the network would have computed. Where a kind cannot be recorded, which `tell` hears of, the
    network runs as it is. Results are copies, so that two passes of one step do not share memory.
    """

    def __init__(self, network: nn.Module, tell: Tell = lambda _line: None, record: Record | None = None) -> None:
        self.network, self._tell, self._record = network, tell, record or on_cuda
        self._passes: dict[Any, Pass] = {}

    def __call__(self, *given: Tensor | None) -> Tensor:
        kind = (surroundings(), *(None if x is None else (x.shape, x.dtype, x.device) for x in given))
        if kind not in self._passes:
            try:
                self._passes[kind] = self._record(self.network, given)
            except RuntimeError as error:
                why = str(error).strip().partition("\n")[0][:160]
                self._tell(f"no CUDA graph of {type(self.network).__name__}, which runs as it is: {why}")
                self._passes[kind] = self.network
        return self._passes[kind](*given)


def on_cuda(network: nn.Module, given: tuple[Tensor | None, ...]) -> Pass:
    """Record a pass on buffers of its own. Raises RuntimeError where an operation cannot be recorded."""
    buffers = [None if x is None else x.clone() for x in given]
    current, beside = torch.cuda.current_stream(), torch.cuda.Stream()
    beside.wait_stream(current)
    with torch.cuda.stream(beside):
        for _ in range(2):  # compiles, chooses algorithms and asks for workspaces, none of which can be recorded
            network(*buffers)
    current.wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on copying; what they do is no part of the pass.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result: Tensor = network(*buffers)

    def replay(*given: Tensor | None) -> Tensor:
        for buffer, value in zip(buffers, given, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value)
        graph.replay()
        return result.clone()

    return replay
