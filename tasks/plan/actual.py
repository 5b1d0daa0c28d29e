"""What finished runs really took, from manifests under a root or from MLflow, and rates that follow from it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs import Recipe, UserError
from configs.cluster import Cluster
from configs.load import read_recorded
from infra.artifacts import MANIFEST, Manifest
from infra.storage import Storage
from tasks.plan.data import images_of
from tasks.plan.schedule import Rate, devices
from tasks.plan.stages import STAGES, work_of

_SIDES = ("judge", "reference", "floor", "reconstruction")
"""Artifacts that `evaluate` makes beside its own."""


@dataclass(frozen=True)
class Actual:
    """One finished stage."""

    rows: int
    bytes: int | None
    """Of the artifact's files; None where only the tracker was asked and the artifact is not under the root."""
    seconds: float
    recipe: Recipe
    source: str


def actuals(where: str, root: str | None = None, recipe: str | None = None) -> dict[str, Actual]:
    """The newest finished run of each stage.

    Args:
        where: an MLflow run id (32 hex digits) of a flow run, or a root of artifacts.
        root: where artifacts lie whose run id was given; their manifests know the bytes.
        recipe: prefer runs of the recipe with this name.

    Raises:
        UserError: there is no such run, or no finished stage.
    """
    found = _tracked(where, root) if re.fullmatch(r"[0-9a-f]{32}", where) else _under(where, recipe)
    if not found:
        raise UserError(f"{where}: no finished stage there; give a root of artifacts or an MLflow run id")
    return found


def rates(found: Mapping[str, Actual], cluster: Cluster) -> dict[str, Rate]:
    """Rates of finished stages, had they run on this cluster: the caller says so by asking."""
    result: dict[str, Rate] = {}
    for stage, actual in found.items():
        if stage not in STAGES or not actual.seconds:
            continue
        work = work_of(stage, actual.recipe, images_of(actual.recipe), cluster.assumed.dopri5_evaluations)
        units = work.flops.value or work.decodes
        count, gpu = devices(work, cluster)
        if units and count:
            unit = "GFLOP/s" if work.flops.value else "images/s"
            rate = units / (actual.seconds * count)
            shown = rate / 1e9 if work.flops.value else rate
            kind = "GPU" if gpu else "CPU"
            source = f"measured: {shown:.3g} {unit} a {kind}, {actual.source} ({actual.seconds:.0f} s)"
            result[stage] = Rate(rate, gpu, source)
    return result


def _under(root: str, recipe: str | None) -> dict[str, Actual]:
    storage = Storage.at(root)
    manifests: dict[str, list[Manifest]] = {}
    for name in storage.names():
        if name.count("/") == 2 and name.endswith(f"/{MANIFEST}"):
            manifest = Manifest.from_json(storage.read_bytes(name), f"{storage.url}/{name}")
            manifests.setdefault(manifest.stage, []).append(manifest)
    newest = {
        stage: max(each, key=lambda manifest: (manifest.recipe.get("name") == recipe, manifest.created))
        for stage, each in manifests.items()
    }
    sides = sum(newest.pop(name).size for name in _SIDES if name in newest)
    found = {stage: _of(manifest) for stage, manifest in newest.items()}
    if "evaluate" in found:
        own = found["evaluate"]
        found["evaluate"] = Actual(own.rows, (own.bytes or 0) + sides, own.seconds, own.recipe, own.source)
    return found


def _of(manifest: Manifest) -> Actual:
    source = f"artifact {manifest.stage}/{manifest.fingerprint}"
    return Actual(manifest.rows, manifest.size, manifest.seconds, read_recorded(manifest.recipe), source)


def _tracked(run: str, root: str | None) -> dict[str, Actual]:
    from mlflow.exceptions import MlflowException

    from infra.tracking import reader, tracking_uri

    client = reader()
    try:
        parent = client.get_run(run)
    except MlflowException:
        raise UserError(f"MLflow at {tracking_uri()} has no run {run}; give another id, or a root") from None
    recipe = read_recorded(_nested(parent.data.params), f"MLflow run {run}")
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run}'", max_results=1_000
    )
    found: dict[str, Actual] = {}
    for child in children:
        stage, metrics = child.data.tags.get("stage", ""), child.data.metrics
        if "seconds" not in metrics:
            continue
        print_ = child.data.tags.get("fingerprint", "")
        size = _size(root, stage, print_)
        source = f"MLflow run {child.info.run_id[:8]}"
        found[stage] = Actual(int(metrics.get("rows", 0)), size, metrics["seconds"], recipe, source)
    return found


def _size(root: str | None, stage: str, fingerprint: str) -> int | None:
    if root is None:
        return None
    storage, name = Storage.at(root), f"{stage}/{fingerprint}/{MANIFEST}"
    if not storage.exists(name):
        return None
    return Manifest.from_json(storage.read_bytes(name), f"{storage.url}/{name}").size


def _nested(flat: Mapping[str, str]) -> dict[str, Any]:
    """MLflow's flat `section.field` parameters as the recipe they were."""
    values: dict[str, Any] = {}
    for name, text in flat.items():
        *parents, last = name.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        try:
            target[last] = json.loads(text)
        except ValueError:
            target[last] = text
    return values
