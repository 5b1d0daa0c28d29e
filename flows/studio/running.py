"""What is running now, as MLflow and this machine know it: stage, images, time left, preview and dollars so far."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.cluster import CLUSTERS, load_cluster
from flows.plan import duration
from infra import open_runs
from infra.tracking import reader

_SPEED = "images_per_second"
LOSSES = {"total": "loss/total", "validation/total": "validation/total"}
"""Curves that are looked at first: what a training's artifact calls them, and what MLflow does."""
Curves = dict[str, list[tuple[float, float]]]
"""(images seen, value) points by name."""


@dataclass(frozen=True)
class Running:
    """A run that MLflow has as running."""

    id: str
    name: str
    root: str
    alive: bool | None
    """Whether its process is; None where that is not this machine's."""
    seconds: float
    """Since it began."""
    stage: str = ""
    images: int = 0
    total: int = 0
    rate: float = 0.0
    silent: float = 0.0
    """Seconds since its last figure."""
    preview: bytes | None = None
    curves: Curves = field(default_factory=dict)

    @property
    def share(self) -> float:
        return min(1.0, self.images / self.total) if self.total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Of this stage, at its present speed."""
        return (self.total - self.images) / self.rate if self.rate and self.total else None

    def dollars(self, per_hour: float) -> float:
        return self.seconds / 3600 * per_hour

    @property
    def told(self) -> str:
        """`train_dit · 3,200 of 32,000 images · 410/s · 70 s left of this stage`."""
        if self.alive is False:
            return f"{self.stage or 'its process'}: killed; the same command goes on, and closes this run"
        parts = [self.stage or "between stages"]
        if self.total:
            parts.append(f"{self.images:,} of {self.total:,} images")
        if self.rate:
            parts.append(f"{self.rate:,.0f}/s")
        if (left := self.seconds_left) is not None:
            parts.append(f"{duration(left)} left of this stage")
        return " · ".join(parts)


def running() -> list[Running]:
    """Runs of flows that have not ended, the newest first."""
    client = reader()
    experiments = [each.experiment_id for each in client.search_experiments()]
    if not experiments:
        return []
    wanted = "attributes.status = 'RUNNING' and tags.root != ''"
    alive = open_runs.living()
    found = client.search_runs(experiments, wanted, max_results=20, order_by=["start_time DESC"])
    return [_of(client, run, alive.get(run.info.run_id)) for run in found]


def prices() -> dict[str, float]:
    """Dollars an hour of one machine, by `cluster: pool, machine`; what is one's own is free."""
    found = {"this machine": 0.0}
    for path in sorted(CLUSTERS.glob("*.yaml")):
        for name, pool in load_cluster(path.stem).pools.items():
            if pool.dollars_per_hour:
                found[f"{path.stem}: {name}, {pool.machine}"] = pool.dollars_per_hour
    return found


def _of(client: Any, run: Any, alive: bool | None) -> Running:
    now, tags = time.time(), run.data.tags
    whole = run.info.run_id, run.info.run_name or "", tags["root"], alive, now - run.info.start_time / 1000
    mine = f"tags.`mlflow.parentRunId` = '{run.info.run_id}' and attributes.status = 'RUNNING'"
    children = client.search_runs([run.info.experiment_id], mine, order_by=["start_time DESC"], max_results=1)
    if not children:
        return Running(*whole)
    child = children[0]
    stage, made = child.data.tags.get("stage", ""), child.info.run_id
    speeds = client.get_metric_history(made, _SPEED) if _SPEED in child.data.metrics else []
    last = max(speeds, key=lambda point: point.step, default=None)
    return Running(
        *whole,
        stage=stage,
        images=0 if last is None else last.step,
        total=_total(child.data.params, stage),
        rate=0.0 if last is None else last.value,
        silent=0.0 if last is None else now - last.timestamp / 1000,
        preview=_preview(client, made),
        curves={
            name: [(float(point.step), point.value) for point in client.get_metric_history(made, tracked)]
            for name, tracked in LOSSES.items()
            if tracked in child.data.metrics
        },
    )


def _total(params: Mapping[str, str], stage: str) -> int:
    given = params.get(f"{stage}.images", "")
    return int(given) if given.isdigit() else 0


def _preview(client: Any, run: str) -> bytes | None:
    """The newest picture of what the network in training makes; None where there is none yet."""
    names = sorted(each.path for each in client.list_artifacts(run, "preview"))
    if not names:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Path(client.download_artifacts(run, names[-1], folder)).read_bytes()
