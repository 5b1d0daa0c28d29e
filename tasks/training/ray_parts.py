"""What we add to Ray Train: mistakes of people end a run at once, and workers heed SIGTERM."""

from __future__ import annotations

import logging
from typing import Any

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


class Mistakes(UserCallback):
    """A UserError of a worker, or a defect of ours, would come again at every start: it fails the run at once.

    Storage that cannot be reached is no such mistake: workers start anew and go on, as after any other failure.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            found = getattr(error, "_base_exc", error)
            if type(found) in _DEFECTS or (isinstance(found, UserError) and not isinstance(found, Unreachable)):
                # The message is for the driver to say, without the controller's own traceback before it.
                logging.getLogger("ray.train.v2._internal.execution.controller.controller").disabled = True
                raise found


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
