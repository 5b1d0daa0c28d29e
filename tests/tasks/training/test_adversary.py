"""Laws of two optimizers in one loop: the adversary resumes, splits and is guarded as the trainee is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.toy_duel import BEGIN, BLIND, AdversarialTrainee, BlindAdversarialTrainee
from tests.helpers.toy_training import BATCH, LAYOUTS, Run, near, result, same, train

BROKEN = frozenset({6 * BATCH + 3})
EVERY_STEP = {"checkpoint_every": BATCH, "keep_checkpoints": 100}
STOPS = (1, 2, 3, 7, 11)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    fp16 = {"precision": "fp16"}
    validated = {"validation": {"every": 2 * BATCH, "images": 40}}
    runs = [
        Run("whole", "whole", EVERY_STEP, trainee=AdversarialTrainee),
        Run("alone", "alone"),
        Run("micro4", "micro4", {"micro_batch": 4}, trainee=AdversarialTrainee),
        Run("validated", "validated", section=validated, trainee=AdversarialTrainee),
        Run("broken", "broken", EVERY_STEP, broken=BROKEN, trainee=AdversarialTrainee),
        Run("blind", "blind", EVERY_STEP, trainee=BlindAdversarialTrainee),
        Run("rewind", "rewind", section={"guard": {"policy": "rewind"}}, trainee=BlindAdversarialTrainee),
        Run("stop", "stop", section={"guard": {"policy": "stop"}}, trainee=BlindAdversarialTrainee),
        Run("fp16", "fp16", section=fp16, trainee=AdversarialTrainee),
        Run("fp16 overflow", "fp16 overflow", section=fp16, broken=BROKEN, factor=30.0, trainee=AdversarialTrainee),
    ]
    for stop in STOPS:
        runs += [
            Run(f"stop{stop}", f"stop{stop}", EVERY_STEP, stop_at=stop * BATCH, trainee=AdversarialTrainee),
            Run(f"go{stop}", f"stop{stop}", EVERY_STEP, trainee=AdversarialTrainee),
        ]
    train(1, folder, runs)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    runs, order = [], list(LAYOUTS)
    for name, after in zip(order, order[1:] + order[:1], strict=True):
        runs += [
            Run(name, name, LAYOUTS[name], trainee=AdversarialTrainee),
            Run(f"{name} stopped", f"to {after}", LAYOUTS[name], stop_at=9 * BATCH, trainee=AdversarialTrainee),
            Run(f"to {after}", f"to {after}", LAYOUTS[after] | {"micro_batch": 4}, trainee=AdversarialTrainee),
            Run(f"{name} broken", f"{name} broken", LAYOUTS[name], broken=BROKEN, trainee=AdversarialTrainee),
        ]
    train(2, folder, runs)
    return folder


def checkpoint(folder: Path, place: str, images: int, part: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / place / "checkpoints" / f"{images:014d}" / f"{part}.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_the_adversary_begins_when_it_is_told_and_changes_what_is_made(one: Path) -> None:
    weights = [checkpoint(one, "whole", batches * BATCH, "rival-weights") for batches in (1, 2, 3)]
    assert BEGIN == 2 * BATCH and equal(weights[0], weights[1]) and not equal(weights[1], weights[2])
    assert all(value.eq(0).all() for value in checkpoint(one, "whole", BEGIN, "rival-exp_avg").values())
    assert not same(result(one, "alone"), {k: v for k, v in result(one, "whole").items() if "rival" not in k})


@pytest.mark.parametrize("stop", STOPS)
def test_interrupted_and_resumed_is_the_same_in_every_bit(one: Path, stop: int) -> None:
    assert (one / f"stop{stop}.error").read_text().startswith("Interrupted")
    assert any(name.startswith("rival-weights/") for name in result(one, f"go{stop}"))
    assert same(result(one, f"go{stop}"), result(one, "whole"))
    for part in ("rival-exp_avg", "rival-exp_avg_sq"):
        assert equal(*(checkpoint(one, place, 11 * BATCH, part) for place in (f"stop{stop}", "whole")))


def test_looking_at_held_out_images_changes_neither(one: Path) -> None:
    validated = {name: value for name, value in result(one, "validated").items() if name != "validation"}
    assert same({k: v for k, v in validated.items() if not k.startswith("best/")}, result(one, "whole"))


def test_a_batch_left_out_for_one_is_left_out_for_both(one: Path) -> None:
    before, after = (checkpoint(one, "broken", batches * BATCH, "rival-weights") for batches in (6, 7))
    assert equal(before, after)
    said = (one / "said.txt").read_text()
    assert said.count(f"guard: skip: loss or gradient not finite or exploding at image {6 * BATCH:,}") == 1


def test_a_batch_bad_for_the_adversary_alone_leaves_the_adversary_as_it_was(one: Path) -> None:
    (image,) = BLIND
    begin = image // BATCH
    before, after = (checkpoint(one, "blind", batches * BATCH, "rival-weights") for batches in (begin, begin + 1))
    assert equal(before, after)
    made = [checkpoint(one, "blind", batches * BATCH, "weights") for batches in (begin, begin + 1)]
    assert not equal(*made)
    assert f"at image {begin * BATCH:,}" in (one / "said.txt").read_text()
    assert (one / "stop.error").read_text().startswith("UserError: training diverged")
    assert all(value.isfinite().all() for value in result(one, "rewind").values())


def test_a_float16_overflow_of_one_is_no_event(one: Path) -> None:
    assert all(value.isfinite().all() for value in result(one, "fp16").values())
    overflown = result(one, "fp16 overflow")
    assert all(value.isfinite().all() for name, value in overflown.items() if name != "curve")


def test_accumulation_changes_neither_gradient(one: Path) -> None:
    near(result(one, "micro4"), result(one, "whole"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_engine_trains_both_alike(one: Path, two: Path, name: str) -> None:
    near(result(two, name), result(one, "whole") | {"curve": result(two, name)["curve"]})
    near(result(two, f"{name} broken"), result(one, "broken"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_of_both_goes_on_in_another_layout(one: Path, two: Path, name: str) -> None:
    near(result(two, f"to {name}"), result(one, "whole"))
