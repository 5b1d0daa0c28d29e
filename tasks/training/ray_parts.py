"""What we add to Ray Train: mistakes of people end a run at once, workers heed SIGTERM, and it stores nothing."""

from __future__ import annotations

import logging
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.train import UserCallback
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from configs.errors import Unreachable, UserError
from tasks.training.requests import heed_signals

_DEFECTS = {
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, NameError, ImportError, ModuleNotFoundError),
    *(NotImplementedError, AssertionError, ZeroDivisionError, RecursionError),
}
"""What Python raises for code and values that do not fit. Kinds derived from them (a library's own) may be of a read
that was cut short, as RuntimeError and OSError may be of a machine: those start anew."""


_ACCOUNTS = ("execution.controller.controller", "execution.failure_handling.default", "util")
"""Loggers of Ray Train that print the traceback of what a worker raised: the controller's, and the worker's own."""


class Mistakes(UserCallback):
    """A UserError of a worker, or a defect of ours, would come again at every start: it fails the run at once.

    Storage that cannot be reached is no such mistake: workers start anew and go on, as after any other failure.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            found = getattr(error, "_base_exc", error)
            if type(found) in _DEFECTS or (isinstance(found, UserError) and not isinstance(found, Unreachable)):
                if isinstance(found, UserError):
                    say_no_more()
                raise found
            if isinstance(found, Unreachable):  # its worker said so
                _policy.addFilter(_skip_once)


def meaning(failure: Exception) -> UserError | None:
    """What is told of a failure that Ray Train's controller did not get over; None where that is a defect.

    Workers that memory or a node leaves while they start are no failure of workers to it, and it would not try again.
    """
    if isinstance(failure, UserError):
        return failure
    if isinstance(failure, OutOfMemoryError | RayActorError | WorkerCrashedError | NodeDiedError):
        why = next(iter(str(failure).strip().splitlines()), type(failure).__name__)
        return Unreachable(
            f"training did not start ({why[:300]}): run again; if memory ran out, end what else takes it, or set fewer "
            "compute.train.workers"
        )
    return None


_policy = logging.getLogger("ray.train.v2._internal.execution.failure_handling.default")
"""It tells each failure, once, with its traceback."""


def _skip_once(record: logging.LogRecord) -> bool:
    _policy.removeFilter(_skip_once)
    return False


def say_no_more() -> None:
    """Keep Ray Train's own account of a mistake out of sight, in this process: the driver says it in one line."""
    for name in _ACCOUNTS:
        logging.getLogger(f"ray.train.v2._internal.{name}").disabled = True


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(heed_signals)  # on the main thread, which alone may; training runs on another


class _Config(TorchConfig):
    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


def heedful_torch(backend: str) -> TorchConfig:
    """A process group of this kind, whose workers take SIGTERM as a request to save."""
    return _Config(backend=backend)


def nowhere() -> PyFileSystem:
    """Where Ray Train keeps its records of a run: in the memory of the process that writes them.

    Checkpoints and results are ours, so nobody reads them; on the artifact's own storage, which Ray asks once, an
    outage of seconds at a training's start would end it.
    """
    return PyFileSystem(FSSpecHandler(MemoryFileSystem()))
