"""What is asked for while the stage before still works: other accelerators than it has."""

from __future__ import annotations

import pytest

from configs import load_recipe
from flows.ahead import needed_next
from tasks.dag import stages_of

STAGES = {each.name: each for each in stages_of("sfd-full")}
GPUS = ("compute.train.gpus_per_worker=1", "compute.actors.gpus_per_actor=1", "compute.actors.actors=3")


@pytest.mark.parametrize(
    ("stage", "following", "wanted"),
    [
        ("shard", "train_vavae train_semvae encode", "train"),
        ("train_vavae", "train_semvae encode", None),  # the same machines
        ("train_semvae", "encode train_dit", "infer"),
        ("encode", "train_dit sample", "train"),
        ("train_dit", "sample evaluate", "infer"),
        ("sample", "evaluate report", None),
        ("evaluate", "report", None),  # the head has what it needs
        ("encode", "", None),
    ],
)
def test_the_next_stage_with_other_accelerators(stage: str, following: str, wanted: str | None) -> None:
    recipe = load_recipe("demo", [*GPUS, "compute.train.cpus_per_worker=8"])
    needs = {"train": [{"CPU": 8, "GPU": 1}] * 2, "infer": [{"CPU": 1, "GPU": 1.0}] * 3, None: []}
    assert needed_next(STAGES[stage], [STAGES[name] for name in following.split()], recipe) == needs[wanted]


def test_more_of_the_same_machines_are_asked_for_without_those_that_are_there() -> None:
    alike = load_recipe("demo", [*GPUS, "compute.train.workers=2", "compute.train.cpus_per_worker=1"])
    assert needed_next(STAGES["train_dit"], [STAGES["sample"]], alike) == [{"CPU": 1, "GPU": 1}]
    assert needed_next(STAGES["encode"], [STAGES["train_dit"]], alike) == [], "fewer are needed than there are"


def test_given_networks_are_passed_over() -> None:
    """They are taken in seconds, so that what follows them is what takes machines."""
    recipe = load_recipe("lightningdit_xl_64ep")
    assert recipe.train_vavae.images == 0
    later = [STAGES[name] for name in ("train_vavae", "encode", "train_dit")]
    actors = recipe.compute.actors
    assert (
        needed_next(STAGES["shard"], later, recipe)
        == [{"CPU": actors.cpus_per_actor, "GPU": actors.gpus_per_actor}] * actors.actors
    )


def test_a_long_stage_without_accelerators_is_not_passed_over() -> None:
    recipe = load_recipe("demo", ["compute.actors.gpus_per_actor=1"])
    later = [STAGES[name] for name in ("train_semvae", "encode")]
    assert needed_next(STAGES["train_vavae"], later, recipe) == []
    assert len(needed_next(STAGES["train_semvae"], later[1:], recipe)) == 2


def test_a_recipe_without_accelerators_asks_for_none() -> None:
    recipe = load_recipe("demo")
    stages = [each for each in STAGES.values() if each.present(recipe)]
    for number, stage in enumerate(stages):
        assert needed_next(stage, stages[number + 1 :], recipe) == []
