"""Figures of running stages for Prometheus, through Ray's own exporter on every node; nothing outside Ray.

Their names there begin with `ray_latentforge_`. Figures carry the stage, retries what was retried; Ray adds node,
worker and job.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

COUNTERS = {
    "latentforge_rows": "Rows (images) that a stage has finished, those of an earlier attempt left out.",
    "latentforge_retries": "What was tried again: requests to `storage`, or a stage's training from a checkpoint.",
}
"""Prometheus sees them with `_total` at the end."""
GAUGES = {
    "latentforge_rows_left": "Rows (images) that a stage has still to do.",
    "latentforge_images_per_second": "Of all workers of a stage together, since it last said so.",
    "latentforge_mfu": "Share of the devices' peak that training uses; where the peak is known.",
    "latentforge_data_wait_share": "Share of training's time without data.",
}


def count(name: str, amount: float, **tags: str) -> None:
    """Add to one of COUNTERS."""
    if amount > 0 and _in_ray():
        _metric(name, tuple(tags)).inc(amount, tags=tags)


def gauge(name: str, value: float, **tags: str) -> None:
    """Set one of GAUGES."""
    if _in_ray():
        _metric(name, tuple(tags)).set(value, tags=tags)


def progress(stage: str, done: float, left: float, per_second: float) -> None:
    """What every stage has: rows done since the last call, rows left, and speed."""
    count("latentforge_rows", done, stage=stage)
    gauge("latentforge_rows_left", left, stage=stage)
    gauge("latentforge_images_per_second", per_second, stage=stage)


def _in_ray() -> bool:
    """Whether this process belongs to a Ray cluster; a process that never imported Ray does not import it here."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


@cache
def _metric(name: str, tags: tuple[str, ...]) -> Any:
    from ray.util.metrics import Counter, Gauge

    kind, about = (Counter, COUNTERS[name]) if name in COUNTERS else (Gauge, GAUGES[name])
    return kind(name, description=about, tag_keys=tags)
