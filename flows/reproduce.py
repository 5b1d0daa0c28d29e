"""`latentforge reproduce NAME`: from the authors' files to their number, with ours beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefect import flow

from configs import Recipe
from configs.load import read_recorded
from configs.published import Beside, beside, departures, scores_of_pictures
from configs.reproduction import reproduction
from flows.run import open_run
from flows.sfd_full import dag
from flows.stages import STAGES
from infra.artifacts import Manifest


@flow(name="reproduce", flow_run_name="{recipe}")
def reproduce(
    recipe: str,
    unguided: bool = False,
    images: int | None = None,
    overrides: list[str] | None = None,
    root: str | None = None,
) -> str:
    """Sample the weights that a recipe's authors released and score them as they did. Returns the report's URI.

    Args:
        recipe: a recipe's name or a path to a YAML file, with `published.released`.
        unguided: without guidance, for the unguided score.
        images: so many instead of the published number, for a first look.
        overrides: `section.field=value` strings laid upon the recipe.
        root: where artifacts live, a folder or a bucket URL; None is this machine's default.
    """
    changes = reproduction(recipe, unguided, images, overrides or [])
    with open_run("reproduce", STAGES, recipe, changes, root) as run:
        return dag(run)


@dataclass(frozen=True)
class Result:
    """A finished reproduction: published scores beside ours, and what they depend on."""

    rows: list[Beside]
    verdict: str
    """One line."""


def result_of(scored: Manifest) -> Result:
    """What a run came to whose stage `evaluate` left this manifest."""
    recipe = read_recorded(scored.recipe)
    return Result(beside(scores_of_pictures(recipe), scored.scores), verdict(recipe, scored.scores))


def verdict(recipe: Recipe, scores: Mapping[str, float]) -> str:
    """One line: how far the first score is from the published one, and what both depend on."""
    rows = [row for row in beside(scores_of_pictures(recipe), scores) if row.here is not None]
    if rows:
        first = rows[0]
        said = f"{first.name} {first.here:.2f}, published {first.published:.2f} ({first.difference:+.2f})"
    else:
        said = "no score with a published name: the Inception weights are not the published file"
    return f"{said}; with {_depends_on(recipe)}. {_compared(departures(recipe))}"


def _depends_on(recipe: Recipe) -> str:
    """The settings that move such a score."""
    sample, score = recipe.sample, recipe.evaluate
    steps = sample.intervals
    solver = f"{sample.solver}, its own steps" if sample.solver == "dopri5" else f"{sample.solver}, {steps} steps"
    parts = [
        solver,
        f"precision {sample.precision}",
        *([f"batch {sample.batch} (it shares a step size)"] if sample.solver == "dopri5" else []),
        f"guidance {sample.guidance.method}",
        f"labels {sample.labels if isinstance(sample.labels, str) else 'given'}",
        f"{min(sample.images, score.images):,} images against {score.reference.rsplit('/', 1)[-1]}",
    ]
    return ", ".join(parts)


def _compared(departed: list[str]) -> str:
    if not departed:
        return "All as published."
    return f"Not as published: {'; '.join(departed)}."
