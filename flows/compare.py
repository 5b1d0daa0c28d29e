"""`latentforge compare RUN RUN …`: finished runs side by side, in a table, charts and one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from configs import UserError, naming
from configs.load import read_recorded
from configs.published import departures, scores_of_pictures
from flows.finding import evaluation_of
from flows.publish import publish
from infra import tracking
from infra.artifacts import Artifact
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
        runs: each as :func:`flows.finding.evaluation_of` takes it.
        root: where the page goes; None is this machine's default.

    Raises:
        UserError: a run that is not there or has no scores, or runs that nothing can be compared of.
    """
    evaluated = [evaluation_of(run) for run in runs]
    if len({artifact.uri for artifact in evaluated}) < 2:
        raise UserError(f"a comparison needs two different evaluations at least, found {len(set(evaluated))}")
    names = _names(evaluated)
    found = [_standing(*each) for each in zip(names, runs, evaluated, strict=True)]
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


# -------------------------------------------------------------------------------------------- what it says


def _names(evaluated: Sequence[Artifact]) -> list[str]:
    """What sets each run apart from the others, behind its recipe's name."""
    flat = [naming.flat(read_recorded(each.manifest.recipe).model_dump(mode="json")) for each in evaluated]
    fields = dict.fromkeys(name for values in flat for name in values)
    differ = [name for name in fields if len({json.dumps(values.get(name)) for values in flat}) > 1]
    names = [naming.said(each["name"], {name: each[name] for name in differ if name in each}) for each in flat]
    return [
        name if names.count(name) == 1 else f"{name} {each.fingerprint[:6]}"
        for name, each in zip(names, evaluated, strict=True)
    ]


def _standing(name: str, run: str, evaluated: Artifact) -> ComparedRun:
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
        name,
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
    flat = {each.name: naming.flat(recipe) for each, recipe in zip(found, recipes, strict=True)}
    fields = dict.fromkeys(name for values in flat.values() for name in values)
    seen = {name: {run: values.get(name) for run, values in flat.items()} for name in fields}
    return {name: values for name, values in seen.items() if len({json.dumps(v) for v in values.values()}) > 1}
