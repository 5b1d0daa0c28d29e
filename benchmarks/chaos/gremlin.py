"""Faults drawn from a seed, of every kind as many, and what became of each."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.chaos.proxy import Proxy

OUTAGE = 10.0
"""Seconds that a server is away, or storage behaves badly."""
KINDS = (
    "worker", "actor", "node", "driver", "flow", "storage_cut", "short_reads", "slow_answers", "disk_full",
    "mlflow_away", "prefect_away",
)  # fmt: skip
_WEATHERS = {"storage_cut": "cut", "short_reads": "short", "slow_answers": "slow", "disk_full": "full"}
_NO_WORK = ("ray::IDLE", "ray::_", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Titles of processes that wait, and of those that are Ray's own on each node."""
_PATIENCE = 30.0
"""Seconds to wait for somebody to kill."""


@dataclass
class Fault:
    """One fault that happened."""

    kind: str
    at: float
    """Seconds since the run began."""
    whom: str = ""
    recovered: float | None = None
    """Seconds until the next unit of work was written; None where none was any more."""
    repeated: float = 0.0
    """Units of work that were done again after it, before the next fault."""


@dataclass
class Gremlin:
    """Brings a fault every so often while a run lasts."""

    seed: int
    kinds: tuple[str, ...]
    every: float
    """Seconds between faults, on average: each waits between half and one and a half of it."""
    nodes: Any
    """A `tests.helpers.nodes.RayNodes`."""
    members: list[str]
    """Ids of nodes that may be killed; a killed one is replaced."""
    flow: Callable[[], int | None]
    """The process of the flow now."""
    proxies: dict[str, Proxy]
    """`storage`, `mlflow` and `prefect`."""
    most: int = 10_000
    """Faults of the plan; a run longer than that is left alone from there on."""
    faults: list[Fault] = field(default_factory=list)

    def plan(self, count: int) -> list[tuple[float, str]]:
        """The first waits and kinds that this seed gives; every kind comes once before any comes again."""
        drawn, found = random.Random(self.seed), list[tuple[float, str]]()
        while len(found) < count:
            kinds = drawn.sample(self.kinds, len(self.kinds))
            found += [(self.every * (0.5 + drawn.random()), kind) for kind in kinds]
        return found[:count]

    def haunt(self, ended: threading.Event) -> None:
        """Until the run or the plan has ended."""
        began = time.monotonic()
        drawn, due = random.Random(f"{self.seed} whom"), 0.0
        for wait, kind in self.plan(self.most):
            due += wait  # a fault that takes a while does not put off the next one
            if ended.wait(max(0.0, began + due - time.monotonic())):
                return
            fault = Fault(kind, time.monotonic() - began)
            if self._strike(fault, drawn, ended):
                self.faults.append(fault)
                print(f"{fault.at:6.0f} s  {kind}  {fault.whom}", file=sys.stderr, flush=True)

    def _strike(self, fault: Fault, drawn: random.Random, ended: threading.Event) -> bool:
        """Whether the fault came about; there may be nobody to kill."""
        match fault.kind:
            case "node":
                node = drawn.choice(self.members)
                self.nodes.kill(node)
                self.members.remove(node)
                self.members.append(self.nodes.add(num_cpus=2))
                fault.whom = node[:8]
                return True
            case "worker" | "actor" | "driver":
                return self._kill(fault, drawn, ended)
            case "flow":
                process = self.flow()
                if process is None:
                    return False
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                return True
        what, weather = ("storage", _WEATHERS[fault.kind]) if fault.kind in _WEATHERS else (fault.kind[:-5], "cut")
        self.proxies[what].weather = weather
        ended.wait(OUTAGE)
        self.proxies[what].weather = "fair"
        return True

    def _kill(self, fault: Fault, drawn: random.Random, ended: threading.Event) -> bool:
        began = time.monotonic()
        until = began + _PATIENCE
        while time.monotonic() < until and not ended.is_set():
            if found := self._at_work(fault.kind):
                process = drawn.choice(sorted(found, key=lambda each: each.pid))
                with suppress(psutil.Error):
                    fault.whom = " ".join(process.cmdline()).strip()[:60]
                    process.kill()
                    fault.at += time.monotonic() - began
                    return True
            ended.wait(0.2)
        return False

    def _at_work(self, kind: str) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.nodes.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                said = " ".join(child.cmdline())
                training = "TrainWorker" in said
                busy = said.startswith("ray::") and not said.startswith(_NO_WORK)
                if {"worker": busy and training, "actor": busy and not training, "driver": "tasks.job" in said}[kind]:
                    found.append(child)
        return found
