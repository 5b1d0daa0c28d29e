"""The laws of training with each switch on: exact resume, elasticity, batch splits, the guard."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.switched_training import (
    FEWSTEP,
    MATRICES_WHOLE,
    NONE,
    STEPS,
    SWITCHES,
    Run,
    put_inputs,
    train,
    train_here,
    trained,
)
from tests.helpers.toy_training import near, same

Trained = dict[str, dict[str, Tensor]]
Whole = Callable[[str], dict[str, Tensor]]
MICRO, TWO = ("compute.train.micro_batch=2",), ("compute.train.workers=2",)
ZERO = {stage: (*TWO, "compute.train.engine=deepspeed", f"compute.train.zero_stage={stage}") for stage in range(4)}
each_switch = pytest.mark.parametrize("switch", SWITCHES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("switches")
    put_inputs(made)
    return made


@pytest.fixture(scope="module")
def whole(folder: Path) -> Whole:
    """What one undisturbed worker makes of a switch."""

    @cache
    def of(switch: str) -> dict[str, Tensor]:
        train_here(folder, [Run(switch, "whole")])
        return trained(folder, Run(switch, "whole"))

    return of


@pytest.fixture(scope="module")
def by_two(folder: Path) -> Trained:
    runs = [Run(switch, "by two", TWO) for switch in SWITCHES]
    train(2, folder, runs)
    return {run.switch: trained(folder, run) for run in runs}


@pytest.fixture(scope="module")
def by_engines(folder: Path) -> dict[int, Trained]:
    """What two workers make of each in the ZeRO stages that take it."""
    stages = {stage: [s for s in SWITCHES if not (stage and s in MATRICES_WHOLE)] for stage in ZERO}
    runs = {stage: [Run(s, f"zero{stage}", ZERO[stage]) for s in switches] for stage, switches in stages.items()}
    train(2, folder, [run for each in runs.values() for run in each])
    return {stage: {run.switch: trained(folder, run) for run in each} for stage, each in runs.items()}


@pytest.mark.parametrize("switch", sorted(SWITCHES.keys() - {FEWSTEP, NONE}))
def test_a_switch_changes_what_is_trained(whole: Whole, switch: str) -> None:
    assert not same(whole(switch), whole(NONE))


def resumes(folder: Path, switch: str, killed_at: int) -> dict[str, Tensor]:
    place = f"killed at {killed_at}"
    train_here(folder, [Run(switch, place, killed_at=killed_at), Run(switch, place)])
    return trained(folder, Run(switch, place))


@each_switch
def test_killed_and_resumed_is_the_same_in_every_bit(folder: Path, whole: Whole, switch: str) -> None:
    assert same(resumes(folder, switch, 5), whole(switch))


@pytest.mark.slow
@each_switch
def test_it_may_be_killed_at_any_step(folder: Path, whole: Whole, switch: str) -> None:
    for killed_at in set(range(STEPS)) - {5}:
        assert same(resumes(folder, switch, killed_at), whole(switch)), killed_at


@each_switch
def test_accumulation_does_not_change_the_gradient(folder: Path, whole: Whole, switch: str) -> None:
    run = Run(switch, "micro", MICRO)
    train_here(folder, [run])
    near(trained(folder, run), whole(switch))


@each_switch
def test_two_workers_train_what_one_trains(whole: Whole, by_two: Trained, switch: str) -> None:
    near(by_two[switch], whole(switch))


@pytest.mark.slow
@each_switch
@pytest.mark.parametrize("stage", ZERO)
def test_every_engine_trains_alike(whole: Whole, by_engines: dict[int, Trained], stage: int, switch: str) -> None:
    if stage and switch in MATRICES_WHOLE:
        assert switch not in by_engines[stage]
        return
    near(by_engines[stage][switch], whole(switch))


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_another_number_of_workers(folder: Path, whole: Whole) -> None:
    for before, after in ((2, 1), (1, 2)):
        place = f"{before} to {after}"
        workers = {n: (f"compute.train.workers={n}",) for n in (before, after)}
        train(before, folder, [Run(switch, place, workers[before], killed_at=7) for switch in SWITCHES])
        runs = [Run(switch, place, workers[after]) for switch in SWITCHES]
        train(after, folder, runs)
        for run in runs:
            near(trained(folder, run), whole(run.switch))


@pytest.mark.slow
@each_switch
def test_a_bad_batch_is_left_out(folder: Path, whole: Whole, switch: str) -> None:
    """To the same bits by leaving it out at once and by going back."""
    skip = Run(switch, "skip", broken=6)
    rewind = Run(switch, "rewind", section=("guard={policy: rewind}",), broken=6)
    train_here(folder, [skip, rewind])
    skipped = trained(folder, skip)
    assert all(bool(torch.isfinite(value).all()) for value in skipped.values())
    assert not same(skipped, whole(switch))
    assert same(trained(folder, rewind), skipped)
