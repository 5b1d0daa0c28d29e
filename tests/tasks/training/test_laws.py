"""Laws of the training loop on gloo workers: exact resume, elasticity, batch splits, the guard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.toy_training import BATCH, LAYOUTS, Run, near, result, same, train

BROKEN = frozenset({6 * BATCH + 3})


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one worker."""
    folder = tmp_path_factory.mktemp("one")
    runs = [Run("whole", "whole"), Run("micro4", "micro4", {"micro_batch": 4})]
    for stop in range(1, 21):
        runs += [Run(f"stop{stop}", f"stop{stop}", stop_at=(stop * 7 % 12) * BATCH), Run(f"go{stop}", f"stop{stop}")]
    runs += [
        Run("stopped", "damaged", stop_at=9 * BATCH),
        Run("damaged", "damaged", damage=True),
        Run("skip", "skip", broken=BROKEN),
        Run("rewind", "rewind", section={"guard": {"policy": "rewind"}}, broken=BROKEN),
        Run("stop", "stop", section={"guard": {"policy": "stop"}}, broken=BROKEN),
        Run("all bad", "all bad", section={"guard": {"patience": 3}}, broken=frozenset(range(12 * BATCH))),
        Run("odd", "odd", {"micro_batch": 5}),
        Run("plain zero", "plain zero", {"zero_stage": 2}),
        Run("kept", "kept", {"keep_checkpoints": 1, "checkpoint_every": 2 * BATCH, "keep_every": 5 * BATCH}),
    ]
    train(1, folder, runs)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two workers, with every engine; and one that goes on where another left."""
    folder = tmp_path_factory.mktemp("two")
    runs = []
    for name, knobs in LAYOUTS.items():
        runs += [
            Run(name, name, knobs),
            Run(f"{name} stopped", f"{name} resumed", knobs, stop_at=9 * BATCH),
            Run(f"{name} resumed", f"{name} resumed", knobs),
            Run(f"{name} micro", f"{name} micro", knobs | {"micro_batch": 2}),
            Run(f"{name} broken", f"{name} broken", knobs, broken=BROKEN),
        ]
    order = list(LAYOUTS)
    for before, after in zip(order, order[1:] + order[:1], strict=True):
        runs.append(Run(f"to {after} stopped", f"to {after}", LAYOUTS[before], stop_at=9 * BATCH))
        runs.append(Run(f"to {after}", f"to {after}", LAYOUTS[after] | {"micro_batch": 4}))
    runs.append(Run("by two stopped", "shared", stop_at=9 * BATCH))
    train(2, folder, runs)
    train(1, folder, [Run("by one", "shared")])
    return folder


def test_training_lowers_the_error(one: Path) -> None:
    curve = result(one, "whole")["curve"][:, 1]
    assert curve[-1] < 0.8 * curve[0]


@pytest.mark.parametrize("stop", range(1, 21))
def test_interrupted_and_resumed_is_the_same_in_every_bit(one: Path, stop: int) -> None:
    assert (one / f"stop{stop}.error").read_text().startswith("Interrupted")
    assert same(result(one, f"go{stop}"), result(one, "whole"))


def test_a_damaged_newest_checkpoint_is_named_and_skipped(one: Path) -> None:
    assert same(result(one, "damaged"), result(one, "whole"))
    said = (one / "said.txt").read_text()
    assert f"damaged/checkpoints/{8 * BATCH:014d} is damaged" in said and "weights.safetensors" in said


def test_old_checkpoints_go_and_every_nth_stays(one: Path) -> None:
    found = sorted(int(path.name) for path in (one / "kept" / "checkpoints").iterdir())
    assert found == [6 * BATCH, 10 * BATCH], "the first at or after 5 and 10 batches"


def test_accumulation_does_not_change_the_gradient(one: Path) -> None:
    near(result(one, "micro4"), result(one, "whole"))
    torch.testing.assert_close(result(one, "micro4")["curve"], result(one, "whole")["curve"], rtol=1e-4, atol=1e-6)


def test_a_bad_batch_is_left_out_and_logged_with_its_keys(one: Path) -> None:
    skipped = result(one, "skip")
    assert all(value.isfinite().all() for name, value in skipped.items() if name != "curve")
    said = (one / "said.txt").read_text()
    assert f"guard: skip: loss or gradient not finite or exploding at image {6 * BATCH:,}" in said
    assert f"image-{6 * BATCH}" in said
    assert same(result(one, "rewind"), skipped), "after going back, the same batches but the bad one are trained on"
    assert f"guard: rewind: loss or gradient not finite or exploding at image {6 * BATCH:,}" in said


@pytest.mark.parametrize("name", ["stop", "all bad"])
def test_a_guard_that_gives_up_says_what_to_do(one: Path, name: str) -> None:
    said = (one / f"{name}.error").read_text()
    assert said.startswith("UserError: training diverged") and "learning_rate" in said


def test_impossible_layouts_are_refused(one: Path) -> None:
    assert "micro_batch 5 does not divide" in (one / "odd.error").read_text()
    assert "zero_stage is 2" in (one / "plain zero.error").read_text()


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_engine_trains_alike(one: Path, two: Path, name: str) -> None:
    near(result(two, name), result(one, "whole") | {"curve": result(two, name)["curve"]})
    near(result(two, f"{name} micro"), result(two, name))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_engine_resumes_in_every_bit(two: Path, name: str) -> None:
    assert same(result(two, f"{name} resumed"), result(two, name))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_goes_on_in_another_layout(one: Path, two: Path, name: str) -> None:
    near(result(two, f"to {name}"), result(one, "whole"))


def test_a_checkpoint_of_two_workers_goes_on_with_one(one: Path, two: Path) -> None:
    near(result(two, "by one"), result(one, "whole"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_bad_image_of_one_worker_stops_the_step_in_all(one: Path, two: Path, name: str) -> None:
    near(result(two, f"{name} broken"), result(one, "skip"))


@pytest.mark.slow
def test_a_training_grows_from_one_worker_to_four_and_from_zero_0_to_3_on_the_way(one: Path, tmp_path: Path) -> None:
    """Its weights and its loss are those of the undisturbed one, but for the order of sums."""
    ways = [(1, "zero0", 4), (2, "zero1", 7), (4, "zero3", None)]
    for workers, layout, stop in ways:
        train(workers, tmp_path, [Run(f"with {workers}", "grows", LAYOUTS[layout], stop_at=stop and stop * BATCH)])
    grown, whole = result(tmp_path, "with 4"), result(one, "whole")
    near(grown, whole | {"curve": grown["curve"]})
    last = len(grown["curve"])
    torch.testing.assert_close(grown["curve"][:, :2], whole["curve"][-last:, :2], rtol=1e-4, atol=1e-6)
