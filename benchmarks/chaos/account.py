"""Units of work that a run computed, those that stand in its artifacts, and what each fault cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.chaos.gremlin import Fault
from infra import inventory
from infra.storage import Storage

STAGES = ("shard", "train_vavae", "train_semvae", "encode", "train_dit", "sample")
"""What computes images, and gives the same bytes whatever happens on the way."""
_RETRY = 5.0
"""Seconds within which a second write of a file is the same work: storage asks again after an error."""


@dataclass(frozen=True)
class Done:
    """A piece of work that somebody saw done."""

    at: float
    """Seconds since the run began."""
    stage: str
    units: float
    """Images."""
    again: float
    """Of them, those that had been done before."""


def standing(root: str) -> dict[str, Any]:
    """Manifests by stage of what a run left."""
    entries = inventory.read(Storage.at(root).url).values()
    return {entry.artifact.stage: entry.manifest for entry in entries if entry.manifest is not None}


def parts_written(written: Iterable[tuple[float, str]], manifests: Mapping[str, Any], began: float) -> list[Done]:
    """Parts of artifacts among the files that were written, in images."""
    found, last = [], dict[str, float]()
    for at, path in written:
        stage = next((each for each in STAGES if f"/{each}/" in path), "")
        name = path.partition(f"/{stage}/")[2].partition("/")[2]
        rows = next((e.rows for e in manifests[stage].files if e.path == name), None) if stage in manifests else None
        if rows and "train" not in stage and at - last.get(path, -_RETRY) >= _RETRY:
            found.append(Done(at - began, stage, rows, rows if path in last else 0))
            last[path] = at
    return found


def images_trained(points: Iterable[tuple[float, str, int]], began: float) -> list[Done]:
    """Progress of trainings, from what they told the tracker; a step back is a restart from a checkpoint.

    points: when it was told, by which stage, and images seen; began: by the same clock.
    """
    reported, found = dict[str, list[int]](), []
    for at, stage, images in sorted(points):
        before = reported.setdefault(stage, [])
        step = min([b - a for a, b in zip([0, *before], before, strict=False) if b > a], default=images)
        new = images - before[-1] if before and images > before[-1] else min(step, images)
        again = min(new, max(0, max(before, default=0) - (images - new)))
        found.append(Done(at - began, stage, new, again))
        before.append(images)
    return found


def charge(faults: list[Fault], done: list[Done]) -> None:
    """Write at each fault how long it took until work went on, and the work done again before the next one."""
    ordered = sorted(done, key=lambda each: each.at)
    ends = [*(each.at for each in faults[1:]), float("inf")]
    for fault, end in zip(faults, ends, strict=False):  # without faults there is an end too many
        after = [each for each in ordered if each.at > fault.at]
        fault.recovered = round(after[0].at - fault.at, 1) if after else None
        fault.repeated = sum(each.again for each in after if each.at <= end)


def by_kind(faults: list[Fault]) -> dict[str, dict[str, float]]:
    """Number, images done again and mean seconds until work went on, of each kind."""
    found: dict[str, dict[str, float]] = {}
    for kind in sorted({fault.kind for fault in faults}):
        own = [fault for fault in faults if fault.kind == kind]
        waits = [fault.recovered for fault in own if fault.recovered is not None]
        found[kind] = {"faults": len(own), "images_again": sum(fault.repeated for fault in own)}
        if waits:
            found[kind]["seconds_to_recover"] = round(sum(waits) / len(waits), 1)
    return found
