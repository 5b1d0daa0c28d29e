"""The contract of a stage that trains: beside what every stage has, its section, its trainee and its preview."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from configs.recipe import Recipe
from configs.training import Training
from tasks.dag import load_stage
from tasks.stage import Context, Stage
from tasks.training.trainee import Preview, Trainee


@dataclass(frozen=True, kw_only=True)
class TrainedStage(Stage):
    """A stage whose function is the one training loop."""

    section: Callable[[Recipe], Training]
    """What it trains for how long. Raises UserError where the recipe does not have it."""
    trainee: Callable[[Context], Trainee]
    """Builds what is trained, alike in every worker; its initial weights come from torch's seed."""
    preview: Callable[[Context, Any], Preview] | None = None
    """Builds what draws pictures of the trainee while it trains; None draws none."""


def trained_stage(name: str) -> TrainedStage:
    """The trained stage of a name. Raises TypeError for a stage that trains nothing."""
    stage = load_stage(name)
    if not isinstance(stage, TrainedStage):
        raise TypeError(f"stage {name} trains nothing")
    return stage
