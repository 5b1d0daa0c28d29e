"""`latentforge reproduce NAME`: from the authors' files to their number, with ours beside it: of pictures, or of a
tokenizer's reconstructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefect import flow

from configs import Recipe
from configs.load import read_recorded
from configs.published import Beside, beside, departures, scores_of
from configs.reproduction import reproduction
from flows.run import open_run
from flows.sfd_full import dag
from infra.artifacts import Manifest
from tasks.dag import REPRODUCE, reproducing, stages_of


@flow(name="reproduce", flow_run_name="{recipe}")
def reproduce(
    recipe: str,
    unguided: bool = False,
    images: int | None = None,
    overrides: list[str] | None = None,
    root: str | None = None,
) -> str:
    """Score what a recipe's authors released as they did. Returns the URI of the report, of a tokenizer of its scores.

    Args:
        recipe: a recipe's name or a path to a YAML file, with `published.released`.
        unguided: without guidance, for the unguided score.
        images: so many instead of the published number, for a first look.
        overrides: `section.field=value` strings laid upon the recipe.
        root: where artifacts live, a folder or a bucket URL; None is this machine's default.
    """
    changes = reproduction(recipe, unguided, images, overrides or [])
    flow = reproducing(recipe, changes)
    with open_run("reproduce", stages_of(flow), recipe, changes, root) as run:
        return dag(run) if flow == REPRODUCE else run.all()


@dataclass(frozen=True)
class Result:
    """A finished reproduction: published scores beside ours, and what they depend on."""

    rows: list[Beside]
    verdict: str
    """One line."""


def result_of(scored: Manifest) -> Result:
    """What a run came to whose scoring stage left this manifest."""
    recipe = read_recorded(scored.recipe)
    rows = beside(scores_of(scored.stage, recipe), scored.scores)
    return Result(rows, verdict(recipe, scored.scores, scored.stage))


def verdict(recipe: Recipe, scores: Mapping[str, float], stage: str = "evaluate") -> str:
    """One line: how far the first score is from the published one, and what both depend on."""
    rows = [row for row in beside(scores_of(stage, recipe), scores) if row.here is not None]
    if rows:
        first = rows[0]
        said = f"{first.name} {first.here:.2f}, published {first.published:.2f} ({first.difference:+.2f})"
    else:
        said = "no score with a published name: the Inception weights are not the published file"
    how = _of_reconstructions(recipe) if stage == "evaluate_tokenizer" else _depends_on(recipe)
    return f"{said}; with {how}. {_compared(departures(recipe))}"


def _of_reconstructions(recipe: Recipe) -> str:
    section = recipe.evaluate_tokenizer
    parts = (
        f"posterior {section.posterior}",
        f"crop {section.crop}",
        f"precision {recipe.evaluate.precision}",
        f"{section.images:,} images",
    )
    return ", ".join(parts)


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
