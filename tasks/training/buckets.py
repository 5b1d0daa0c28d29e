"""Gradients as workers average them: in buckets that set out while the backward pass still makes the others.

What a bucket holds follows from the order of the parameters alone, so that sums are the same at every step and after
every resume. When a bucket sets out does not change its values; it is the same in all workers, as collectives must be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 64 * 2**20
"""Of one bucket as it travels. Large enough for a network's full rate, small enough that few gradients are left when
the backward pass ends. Our choice, not measured on GPUs."""


@dataclass
class _Bucket:
    parameters: list[nn.Parameter] = field(default_factory=list)
    missing: int = 0
    """Gradients that this step has not made yet."""
    flat: Tensor | None = None
    travelling: Any = None


class Buckets:
    """Averages the gradients of `parameters` over all workers, in a step's last backward pass.

    Buckets are filled from the last parameter to the first, as backward passes reach them, and set out in the order in
    which rank 0's first step completed them: a head that sits early in the network holds up its own bucket only. In
    that first step none sets out before the pass is over.

    communication: data type in which gradients travel; None is their own.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        communication: torch.dtype | None = None,
        size: int = BUCKET_BYTES,
    ) -> None:
        self._communication = communication
        self.buckets = _cut(parameters, communication, size)
        self.order: list[int] | None = None
        """In which buckets set out; None before the first step is over."""
        self._completed: list[int] = []
        self._sent = 0
        self._armed = False
        for number, bucket in enumerate(self.buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(number))

    def begin(self) -> None:
        """The next backward pass is a step's last: what it makes may travel."""
        self._armed, self._sent, self._completed = True, 0, []
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def finish(self) -> None:
        """After that pass: every parameter has its mean gradient, zero where no worker's batch used it."""
        self._armed = False
        if self.order is None:
            self.order = self._agreed()
        for number in self.order[self._sent :]:
            self._send(self.buckets[number])
        for bucket in self.buckets:
            self._receive(bucket)

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        def made(_parameter: Tensor) -> None:
            if not self._armed:
                return
            self.buckets[number].missing -= 1
            if self.buckets[number].missing == 0:
                self._completed.append(number)
                self._send_complete()

        return made

    def _send_complete(self) -> None:
        while self.order is not None and self._sent < len(self.order):
            bucket = self.buckets[self.order[self._sent]]
            if bucket.missing:
                return
            self._send(bucket)
            self._sent += 1

    def _agreed(self) -> list[int]:
        """Rank 0's order of completion, and then what its batch did not use."""
        rest = [number for number in range(len(self.buckets)) if number not in self._completed]
        device = self.buckets[0].parameters[0].device
        order = torch.tensor(self._completed + rest, device=device)
        dist.broadcast(order, src=0)
        return [int(number) for number in order.tolist()]

    @torch.no_grad()
    def _send(self, bucket: _Bucket) -> None:
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket.parameters]
        flat = torch.cat([piece.reshape(-1) for piece in pieces]).div_(dist.get_world_size())
        for parameter in bucket.parameters:
            parameter.grad = None  # its memory is free for the gradients that are still to come
        bucket.flat = flat.to(self._communication or flat.dtype)
        bucket.travelling = dist.all_reduce(bucket.flat, async_op=True)

    @torch.no_grad()
    def _receive(self, bucket: _Bucket) -> None:
        bucket.travelling.wait()
        assert bucket.flat is not None  # it was sent
        flat = bucket.flat.to(bucket.parameters[0].dtype)
        sizes = [parameter.numel() for parameter in bucket.parameters]
        for parameter, piece in zip(bucket.parameters, flat.split(sizes), strict=True):
            parameter.grad = piece.view_as(parameter)
        bucket.flat = bucket.travelling = None


def _cut(parameters: Sequence[nn.Parameter], communication: torch.dtype | None, size: int) -> list[_Bucket]:
    """Into buckets of up to `size` bytes, from the last parameter to the first, of one data type each."""
    buckets: list[_Bucket] = []
    filled = 0
    for parameter in reversed(parameters):
        width = (communication or parameter.dtype).itemsize * parameter.numel()
        full = not buckets or filled + width > size
        if full or buckets[-1].parameters[0].dtype != parameter.dtype:
            buckets.append(_Bucket())
            filled = 0
        buckets[-1].parameters.append(parameter)
        filled += width
    return buckets
