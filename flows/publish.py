"""Pages over several runs as artifacts: comparisons, sweeps and races."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from configs.recipe import Recipe
from infra import tracking
from infra.artifacts import Artifact
from tasks.stage import Context, Outcome, Stage, anew, perform, side_job


def publish(
    kind: str,
    written: Callable[[Context], Outcome],
    root: str,
    recipe: Recipe,
    sections: dict[str, Any],
    inputs: dict[str, str],
    tracker: tracking.Tracker,
) -> Artifact:
    """A page about several runs as an artifact; drawn anew each time, so that a changed page is not
    taken for an old one, which stays until the new one is whole."""
    job = anew(side_job(kind, 1, recipe, root, sections, inputs, asdict(tracker)))
    return perform(Stage(kind, 1, (), (), written), job)
