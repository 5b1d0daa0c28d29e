"""A sweep: one trained model sampled under many settings and scored, as one job that loads every network once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product

import yaml
from prefect import flow

from configs import Recipe, UserError, load_recipe
from flows.inputs import sample_job, shards_of
from flows.publish import publish
from flows.race import run_jobs
from flows.run import preflight_storage
from flows.tracked import tracked
from infra import tracking
from infra.artifacts import Artifact, Manifest
from infra.logs import say
from tasks.comparing import comparison
from tasks.comparing.comparison import Axis, ComparedRun
from tasks.comparing.frontier import COST, Frontier, frontier
from tasks.comparing.trial import SHEET, TrialActor, trial_job
from tasks.drawing import charts
from tasks.scoring.real_images import RealImages, ScoringInputs, real_images
from tasks.sources import one_look
from tasks.stage import Context, Job

PAGE = "sweep.html"


@flow(name="sweep", flow_run_name="{recipe}")
def sweep(over: list[str], recipe: str = "demo", overrides: list[str] | None = None, root: str | None = None) -> str:
    """Sample and score a trained recipe under every combination of settings. Returns the URI of the page's artifact.

    Args:
        over: `sample.field=value,value…` strings; with several fields, all combinations.
        recipe: a recipe's name or a path to a YAML file, trained already.
        overrides: `section.field=value` strings laid upon the recipe.
        root: where artifacts live, a folder or a bucket URL; None is this machine's default.
    """
    with one_look():
        settings, jobs = settings_of(recipe, over, overrides or [], root)
        first, storage = next(iter(settings.values())), preflight_storage(root)
        tags = {"flow": "sweep", "recipe": first.name, "root": storage.url}
        with tracked(first.tracking.experiment, f"sweep {first.name}", tags) as tracker:
            tracker.params({"over": over, "overrides": " ".join(overrides or [])})
            return _run(settings, jobs, over, tracker).uri


def settings_of(
    recipe: str, over: Sequence[str], overrides: Sequence[str], root: str | None
) -> tuple[dict[str, Recipe], dict[str, Job]]:
    """The recipes by the name of their setting, and the jobs that would sample them.

    Raises:
        UserError: a field that is not of `sample`, a setting that is impossible, or a recipe that is not trained here.
    """
    fields = [_values(text) for text in over]
    if not fields:
        raise UserError("nothing to sweep over: give --over sample.field=value,value, e.g. sample.guidance.scale=1.5,2")
    settings: dict[str, Recipe] = {}
    for values in product(*(values for _, values in fields)):
        chosen = list(zip((field for field, _ in fields), values, strict=True))
        name = ", ".join(f"{field.rsplit('.', 1)[-1]} {value}" for field, value in chosen)
        settings[name] = load_recipe(recipe, [*overrides, *(f"{field}={value}" for field, value in chosen)])
    return settings, {name: sample_job(each, recipe, root) for name, each in settings.items()}


def _run(settings: dict[str, Recipe], jobs: dict[str, Job], over: Sequence[str], tracker: tracking.Tracker) -> Artifact:
    first, job = next(iter(settings.values())), next(iter(jobs.values()))
    real = real_images(ScoringInputs(first, job.root, shards_of(first, job)))
    trials = {name: _trial(settings[name], jobs[name], real) for name in settings}
    missing = [each for each in trials.values() if not Context(each).artifact.is_complete()]
    run_jobs("sweep", TrialActor, missing, first.compute.actors, len(missing) * first.sample.images)
    made = {name: Context(each).artifact for name, each in trials.items()}
    found = [_standing(name, artifact) for name, artifact in made.items()]
    known = comparison.score_columns(found)
    shown = comparison.chosen_scores(known, first.evaluate.features.label)
    advised = frontier(found, shown)
    say(f"sweep: {advised.why}")
    written = partial(
        comparison.write,
        page_name=PAGE,
        title=f"{first.name}: {' × '.join(text.partition('=')[0] for text in over)}",
        lead=f"{len(found)} settings of one model, {first.sample.images:,} images each, of the same seeds.",
        compared_runs=found,
        network=first.evaluate.features.label,
        floor=real.floor,
        details={"Sampling": first.section("sample")},
        axis=_axis(over),
        further={"frontier.png": _frontier_chart(found, advised, real.floor)},
        advice=advised.why,
    )
    inputs = {name: artifact.fingerprint for name, artifact in made.items()}
    return publish("sweep", written, job.root, first, {"over": list(over)}, inputs, tracker)


def _trial(recipe: Recipe, job: Job, real: RealImages) -> Job:
    inputs = {name: Context(job).input(name) for name in job.inputs}
    return trial_job(recipe, job.root, inputs, real, None)


def _standing(name: str, made: Artifact) -> ComparedRun:
    manifest = made.manifest
    return ComparedRun(
        name,
        manifest.scores,
        figures={COST: manifest.facts[COST], **_speed(manifest)},
        intervals=manifest.facts["intervals"],
        sheet=made.read(SHEET),
        facts={"trial": made.uri},
    )


def _speed(manifest: Manifest) -> dict[str, float]:
    """Images per second of the process that sampled them; trials of before did not measure it."""
    seconds = manifest.facts.get("sampling_seconds")
    return {"images_per_second": manifest.rows / seconds} if seconds else {}


def _frontier_chart(runs: Sequence[ComparedRun], advised: Frontier, floor: Mapping[str, float]) -> bytes:
    """Every setting as a point of cost and score, and a line through those that nothing dominates."""
    panels = []
    for score, names in advised.undominated.items():
        points = {each.name: (each.figures[COST], each.scores[score]) for each in runs}
        line = charts.spread_at([points[name] for name in names])
        panels.append(charts.Panel(score, {"nothing dominates": line}, floor.get(score), points))
    return charts.lines(panels, "effective evaluations of an image")


def _values(text: str) -> tuple[str, list[str]]:
    """`sample.steps=10,20` → the field and its values."""
    field, separator, values = text.partition("=")
    # Commas within brackets belong to a value: sample.times=[0, 0.4, 1],[0, 0.6, 1].
    found = [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", values) if value.strip()]
    if not separator or not field.startswith("sample.") or not found:
        raise UserError(f"--over {text}: expected sample.field=value,value, for example sample.guidance.scale=1.5,2,3")
    return field, found


def _axis(over: Sequence[str]) -> Axis | None:
    """The first field along the axis, if it is a number; a line for each setting of the others."""
    fields = [_values(text) for text in over]
    places: dict[str, tuple[float, str]] = {}
    for values in product(*(values for _, values in fields)):
        parts = [f"{field.rsplit('.', 1)[-1]} {value}" for (field, _), value in zip(fields, values, strict=True)]
        number = yaml.safe_load(values[0])
        if not isinstance(number, (int, float)):
            return None
        places[", ".join(parts)] = (float(number), ", ".join(parts[1:]))
    return Axis(fields[0][0], places)
