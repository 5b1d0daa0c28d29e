"""Networks made ready to run: compiled where that is asked for, graphs kept, and it is said what one waits for."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from infra import logs
from infra.compiled import keep_compiled
from infra.device import HALVES
from models.execution import halve, prepare

Network = TypeVar("Network", bound=nn.Module)


def ready(network: Network, compiled: bool, precision: str = "fp32") -> Network:
    """The same frozen network, its blocks compiled in place (see `prepare`) where that is wanted, and where it will run
    in a half precision, with products' weights in that (see `halve`).
    """
    if precision in HALVES:
        halve(network, HALVES[precision])
    if compiled:
        keep_compiled()
        prepare(network, compile=True, tell=logs.say)
    return network
