"""Batches as what a module is called with, on the device before the step asks for them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from tasks.loading.loader import Batch
from tasks.loading.prefetch import Prefetcher
from tasks.training.trainee import Trainee, pieces


@dataclass(frozen=True)
class Fed:
    """A worker's slice of a batch, ready to be trained on."""

    batch: Batch
    inputs: list[dict[str, Any]]
    """Arguments of the trainee's module, one set per accumulation step."""
    waited: float
    """Seconds that training waited for it."""


class Feed:
    """Every batch with its inputs, in pieces of `micro` images.

    ahead: a thread prepares the next batch while this one is trained on, so that random numbers, copies and frozen
        networks hold up no step, and `Trainee.inputs` may wait for the device as it likes: on an accelerator the
        thread has a stream of its own. None is so on accelerators; on a CPU both would share the same cores.
    """

    def __init__(
        self, trainee: Trainee, batches: Iterator[Batch], micro: int, device: torch.device, ahead: bool | None = None
    ) -> None:
        self._trainee, self._batches, self._micro, self._device = trainee, batches, micro, device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead = device.type == "cuda" if ahead is None else ahead
        self._prepared = Prefetcher(self._prepare(), int(self._ahead))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Fed:
        asked = time.monotonic()
        found, done = next(self._prepared)
        if done is not None:
            _hand_over(found.inputs, done)
        return Fed(found.batch, found.inputs, time.monotonic() - asked) if self._ahead else found

    def close(self) -> None:
        """Before the batches' own end."""
        self._prepared.close()

    def _prepare(self) -> Iterator[tuple[Fed, torch.cuda.Event | None]]:
        while True:
            asked = time.monotonic()
            batch = next(self._batches)
            waited = time.monotonic() - asked
            with torch.cuda.stream(self._side) if self._side else nullcontext():
                inputs = [self._trainee.inputs(piece, self._device) for piece in pieces(batch, self._micro)]
            yield Fed(batch, inputs, waited), self._side.record_event() if self._side else None


def _hand_over(inputs: list[dict[str, Any]], done: torch.cuda.Event) -> None:
    """To the stream of the caller, who may use the tensors once they are made and whose use keeps their memory."""
    ours = torch.cuda.current_stream()
    ours.wait_event(done)
    for tensor in tensors(inputs):
        tensor.record_stream(ours)


def tensors(given: Any) -> Iterator[Tensor]:
    """All of nested inputs, which may be lists of them."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, Mapping | list | tuple):
        for each in given.values() if isinstance(given, Mapping) else given:
            yield from tensors(each)
