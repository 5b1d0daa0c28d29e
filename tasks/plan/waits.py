"""Nodes that are paid for while they do not work: they start, and idle until they are used again or let go."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from configs.cluster import HEAD, Cluster

HEAD_STARTS = 30.0
"""Seconds until a stage works where its machines are there: processes alone."""


@dataclass(frozen=True)
class Start:
    """How the nodes of a stage come."""

    pool: str
    seen: float
    """Seconds of the stage until they work."""
    early: float = 0.0
    """Seconds that they start before it, while the stage before still works (`infra/early.py`)."""


class Nodes:
    """The nodes of a run, as one stage follows the other."""

    def __init__(self, cluster: Cluster, lead: float) -> None:
        """lead: `compute.cluster.lead_seconds`."""
        self._cluster, self._lead = cluster, lead
        self._now = self._worked = 0.0
        self._last: dict[str, tuple[str, int, float]] = {}
        """Stage that used a pool last, with how many nodes, and until when."""
        self.beside: defaultdict[str, float] = defaultdict(float)
        """Dollars by stage for what is not within its time: nodes that start early, or idle after."""
        self.waits: defaultdict[str, float] = defaultdict(float)
        """These, and those for nodes that start within it."""

    def start(self, pool: str, gpu: bool) -> Start:
        """How they come for a stage that begins now; accelerators early where the last stage is long enough."""
        whole = self._cluster.assumed.start_seconds
        processes = min(HEAD_STARTS, whole)
        if pool == HEAD or self._there(pool):
            return Start(pool, processes)
        early = self._lead if gpu and self._worked >= self._lead else 0.0
        return Start(pool, max(processes, whole - early), early)

    def work(self, stage: str, used: Mapping[str, int], seconds: float, start: Start) -> None:
        """A stage that takes so long on so many nodes of each pool but the head."""
        for pool, nodes in used.items():
            early = start.early if pool == start.pool else 0.0
            if not self._there(pool):
                self._pay(stage, pool, nodes, early)
                self.waits[stage] += self._dollars(pool, nodes, start.seen)
            self._idle(pool)
            self._last[pool] = stage, nodes, self._now + seconds
        self._now += seconds
        self._worked = seconds if used else self._worked

    def end(self) -> None:
        """The last nodes go."""
        self._now = float("inf")
        for pool in self._last:
            self._idle(pool)

    def _idled(self, pool: str) -> float:
        return self._now - self._last[pool][2]

    def _there(self, pool: str) -> bool:
        return pool in self._last and self._idled(pool) < self._cluster.assumed.idle_seconds

    def _idle(self, pool: str) -> None:
        if pool in self._last:
            stage, nodes, _ = self._last[pool]
            self._pay(stage, pool, nodes, min(self._idled(pool), self._cluster.assumed.idle_seconds))

    def _pay(self, stage: str, pool: str, nodes: int, seconds: float) -> None:
        self.beside[stage] += self._dollars(pool, nodes, seconds)
        self.waits[stage] += self._dollars(pool, nodes, seconds)

    def _dollars(self, pool: str, nodes: int, seconds: float) -> float:
        return seconds / 3600 * nodes * self._cluster.pools[pool].dollars_per_hour
