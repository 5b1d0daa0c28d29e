"""Which accelerators the next stage will ask for, to be started while this one still works."""

from __future__ import annotations

from collections.abc import Sequence

from configs import Recipe
from tasks.stage import Stage

_BY_ACTORS = ("encode", "sample", "evaluate", "evaluate_tokenizer")


def accelerators(stage: Stage, recipe: Recipe) -> list[dict[str, float]]:
    """What each worker or actor of a stage asks Ray for; empty where it is no accelerator."""
    train, actors = recipe.compute.train, recipe.compute.actors
    if stage.trains and not _given(stage, recipe) and train.gpus_per_worker:
        return [{"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker}] * train.workers
    if stage.name in _BY_ACTORS and actors.gpus_per_actor:
        return [{"CPU": actors.cpus_per_actor, "GPU": actors.gpus_per_actor}] * actors.actors
    return []


def needed_next(stage: Stage, following: Sequence[Stage], recipe: Recipe) -> list[dict[str, float]]:
    """What the stage that follows asks for beyond the same machines that this one leaves it.

    Given networks are taken as they are within seconds: what follows them is what counts.
    """
    own = accelerators(stage, recipe)
    found = next((accelerators(each, recipe) for each in following if not _given(each, recipe)), [])
    return found[len(own) :] if found[:1] == own[:1] else found


def _given(stage: Stage, recipe: Recipe) -> bool:
    return stage.trains and not getattr(recipe, stage.name).images
