"""What people and machines ask of a running training: to save, to save and leave, or to profile a few steps.

A request is an empty file `requests/{name}` in the artifact's folder, a signal to a worker (SIGTERM: save), or Ray's
notice that a node goes away (save). Workers look together, so that all act on the same step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from infra.storage import Storage

FOLDER = "requests"
SAVE, LEAVE, PROFILE = "save", "leave", "profile"
_ALL = (SAVE, LEAVE, PROFILE)
_signalled = threading.Event()


class Left(Exception):
    """Training saved and left, as it was asked to; the next run goes on."""


class Requests:
    """Looks for requests; every worker must look at the same steps.

    warned: whether this worker's machine is about to be taken away; asked until it says so once.
    """

    def __init__(self, out: Storage, device: torch.device, warned: Callable[[], bool]) -> None:
        self._out, self._device, self._warned, self._heard = out, device, warned, False

    def look(self) -> frozenset[str]:
        """What is asked for since the last look, the same in all workers."""
        fresh = not self._heard and self._warned()
        self._heard |= fresh
        found = {SAVE} if fresh or _signalled.is_set() else set()
        _signalled.clear()
        if dist.get_rank() == 0:
            found |= {name.split("/")[1] for name in self._out.names(FOLDER)}
            for name in found.intersection(_ALL):
                self._out.delete(f"{FOLDER}/{name}")
        asked = torch.tensor([float(name in found) for name in _ALL], device=self._device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return frozenset(name for name, value in zip(_ALL, asked.tolist(), strict=True) if value)


def ask(out: Storage, name: str) -> None:
    """Leave a request for the training that writes to `out`."""
    out.write_bytes(f"{FOLDER}/{name}", b"")


def heed_signals() -> None:
    """Take SIGTERM as the request to save, the first time; a second one ends the process. For main threads."""
    usual = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: Any) -> None:
        _signalled.set()
        signal.signal(signal.SIGTERM, usual)

    signal.signal(signal.SIGTERM, note)
