"""`latentforge compare RUN RUN …`: finished runs side by side, in a table, charts and one page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from configs import UserError
from configs.load import read_recorded
from configs.published import departures, scores_of_pictures
from flows.publish import publish
from infra import tracking
from infra.artifacts import MANIFEST, Artifact
from infra.home import default_root
from infra.storage import Storage
from tasks.comparing import comparison
from tasks.comparing.comparison import ComparedRun, Curve
from tasks.sample import GRID
from tasks.training.metrics import SECONDS

PAGE = "comparison.html"
_FLOOR = "floor_"
_LOSSES = {"total": "training loss", "validation/total": "validation loss"}
_EXPERIMENT = "latentforge"


def compare(runs: Sequence[str], root: str | None = None) -> Artifact:
    """Put finished runs side by side; the page is an artifact in `root` and in an MLflow run of its own.

    Args:
        runs: each an MLflow run of a flow, the folder or URL of an `evaluate` or `report` artifact, or a root that
            holds a single evaluation.
        root: where the page goes; None is this machine's default.

    Raises:
        UserError: a run that is not there or has no scores, or runs that nothing can be compared of.
    """
    evaluated = [_evaluated(run) for run in runs]
    if len({artifact.uri for artifact in evaluated}) < 2:
        raise UserError(f"a comparison needs two different evaluations at least, found {len(set(evaluated))}")
    found = [_standing(run, artifact) for run, artifact in zip(runs, evaluated, strict=True)]
    if not comparison.score_columns(found):
        raise UserError(
            "the runs have no score in common: they were scored by other networks; use the same evaluate section"
        )
    first = read_recorded(evaluated[0].manifest.recipe)
    sets = {json.dumps(artifact.manifest.sections["evaluate"], sort_keys=True) for artifact in evaluated}
    warning = " They were not evaluated alike (see the differences), so their scores may not compare."
    lead = f"{len(found)} runs.{warning if len(sets) > 1 else ''}"
    floors = [_with_prefix(artifact) for artifact in evaluated]
    tracker = tracking.start_run(_EXPERIMENT, f"compare {len(found)} runs", {"flow": "compare"})
    written = partial(
        comparison.write,
        page_name=PAGE,
        title="Comparison",
        lead=lead,
        compared_runs=found,
        network=first.evaluate.features.label,
        floor=floors[0] if all(floor == floors[0] for floor in floors) else {},
        details={"Differences between the recipes": _differences(found, evaluated)},
    )
    inputs = {each.name: artifact.fingerprint for each, artifact in zip(found, evaluated, strict=True)}
    try:
        made = publish("comparison", written, Storage.at(root or default_root()).url, first, {}, inputs, tracker)
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish()
    return made


# ------------------------------------------------------------------------------------------------ finding a run


def _evaluated(run: str) -> Artifact:
    """The evaluation that a run, an artifact or a root leads to."""
    place = Storage.at(run) if "/" in run else None
    if place is None:
        return _of_mlflow(run)
    if place.exists(MANIFEST):
        root, stage, name = place.url.rstrip("/").rsplit("/", 2)
        artifact = Artifact(root, stage, name)
        if stage == "report":
            artifact = Artifact(root, "evaluate", artifact.manifest.inputs["evaluate"])
        if artifact.stage != "evaluate":
            raise UserError(f"{run} is an artifact of stage {stage}, which has no scores: name its evaluate artifact")
        artifact.manifest  # noqa: B018  # which raises where it is not complete
        return artifact
    names = {name.split("/")[1] for name in place.names("evaluate") if name.endswith(MANIFEST)}
    if len(names) != 1:
        known = ", ".join(f"{place.url}/evaluate/{name}" for name in sorted(names))
        raise UserError(
            f"{run} holds {len(names)} evaluations, expected one: " + (f"name one of {known}" if known else "run one")
        )
    return Artifact(place.url, "evaluate", names.pop())


def _of_mlflow(run: str) -> Artifact:
    tags = tracking.run_tags(run)
    if tags is None:
        raise UserError(f"no run {run!r} in MLflow at {tracking.tracking_uri()}, and no folder or URL (which has a /)")
    made = tags.get("stage.evaluate")
    if made is None or "root" not in tags:
        raise UserError(
            f"MLflow run {run} has no evaluation: name the run of a flow that finished it, or its evaluate artifact"
        )
    artifact = Artifact(tags["root"], "evaluate", made.split()[-1])
    artifact.manifest  # noqa: B018
    return artifact


# -------------------------------------------------------------------------------------------- what it says


def _standing(run: str, evaluated: Artifact) -> ComparedRun:
    manifest = evaluated.manifest
    sample = Artifact(evaluated.root, "sample", manifest.inputs["sample"])
    model = Artifact(evaluated.root, "train_dit", sample.manifest.inputs["train_dit"])
    curves, made = model.manifest.facts.get("curves", {}), sample.manifest
    figures = {"training_seconds": model.manifest.seconds, "images_trained": float(model.manifest.rows)}
    if "images_per_second" in made.scores:
        figures["images_per_second"] = made.scores["images_per_second"]
    recipe = read_recorded(manifest.recipe)
    published, departed = scores_of_pictures(recipe), departures(recipe)
    return ComparedRun(
        f"{manifest.recipe['name']} {evaluated.fingerprint[:6]}",
        {name: value for name, value in manifest.scores.items() if not name.startswith((_FLOOR, "judge_"))},
        curves={
            label: _timed(curves[name], curves.get(SECONDS, [])) for name, label in _LOSSES.items() if curves.get(name)
        },
        figures=figures,
        intervals=manifest.facts.get("intervals", {}),
        published={} if published is None else published.named,
        sheet=sample.read(GRID) if sample.files(GRID) else None,
        facts={
            "given": run,
            "evaluate": evaluated.uri,
            "model": model.uri,
            **({} if published is None else {"not as published": "; ".join(departed) or "nothing"}),
            **manifest.runs,
        },
    )


def _timed(curve: Sequence[Sequence[float]], clock: Sequence[Sequence[float]]) -> Curve:
    """(images, seconds, value) points; no seconds where the training did not keep them."""
    places = comparison.interpolated([images for images, _ in curve], clock)
    return [(images, seconds, value) for (images, value), seconds in zip(curve, places, strict=True)]


def _with_prefix(evaluated: Artifact) -> dict[str, float]:
    """Scores of real images, without the prefix."""
    scores = evaluated.manifest.scores
    return {name.removeprefix(_FLOOR): value for name, value in scores.items() if name.startswith(_FLOOR)}


def _differences(found: Sequence[ComparedRun], evaluated: Sequence[Artifact]) -> dict[str, dict[str, Any]]:
    """Fields that differ, with each run's value."""
    recipes = (read_recorded(artifact.manifest.recipe).model_dump(mode="json") for artifact in evaluated)
    flat = {each.name: _flat(recipe) for each, recipe in zip(found, recipes, strict=True)}
    fields = dict.fromkeys(name for values in flat.values() for name in values)
    seen = {name: {run: values.get(name) for run, values in flat.items()} for name in fields}
    return {name: values for name, values in seen.items() if len({json.dumps(v) for v in values.values()}) > 1}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
