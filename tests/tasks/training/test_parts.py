"""Parts of the loop by themselves: inputs prepared ahead, and what a tracker that is slow or lost does to training."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from configs.training import Training, Validation
from infra.device import group_of_one
from infra.tracking import Tracker
from tasks.loading.loader import Batch
from tasks.randomness import ImageNumbers
from tasks.training.callbacks import Scores, StepSpan
from tasks.training.device_feed import Feed, tensors
from tasks.training.metrics import peak_flops
from tasks.training.tracking import Sender
from tasks.training.trainee import HELD_OUT_NUMBERS
from tests.helpers.toy_training import BATCH, Interrupted, Numbers, Run, ToyTrainee, perform, result, same, section

CPU = torch.device("cpu")


class Threaded(ToyTrainee):
    """Notes which thread prepares its inputs."""

    threads: ClassVar[set[str]] = set()

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        self.threads.add(threading.current_thread().name)
        return super().inputs(batch, device)


def test_inputs_prepared_ahead_are_the_same() -> None:
    trainee = Threaded(section(), Run("ahead", "ahead"))
    numbers = Numbers(BATCH)
    plain = list(islice(Feed(trainee, numbers.stream(), 4, CPU), 3))
    assert trainee.threads == {"MainThread"}
    ahead = list(islice(Feed(trainee, numbers.stream(), 4, CPU, ahead=True), 3))
    assert len(trainee.threads) == 2
    for one, other in zip(plain, ahead, strict=True):
        np.testing.assert_array_equal(one.batch.positions, other.batch.positions)
        assert len(one.inputs) == len(other.inputs) == BATCH // 4
        for a, b in zip(one.inputs, other.inputs, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_error_of_inputs_ahead_comes_to_the_loop_and_the_loader_can_be_closed() -> None:
    closed = []

    def batches() -> Iterator[Batch]:
        try:
            yield from Numbers(BATCH).stream()
        finally:
            closed.append(True)

    loader = batches()
    stream = Feed(ToyTrainee(section(), Run("ahead", "ahead", stop_at=2 * BATCH)), loader, BATCH, CPU, ahead=True)
    assert [next(stream).batch.images_seen for _ in range(2)] == [BATCH, 2 * BATCH]
    with pytest.raises(Interrupted):
        next(stream)
    loader.close()  # type: ignore[attr-defined]
    assert closed


def test_random_numbers_are_those_of_a_generator_of_each_image() -> None:
    numbers, positions = ImageNumbers(3, "noise"), np.array([5, 9, HELD_OUT_NUMBERS + 3, 0])
    key = 3 << 32 | zlib.crc32(b"noise")

    def fresh() -> list[np.random.Generator]:
        return [np.random.Generator(np.random.Philox(key=[key, int(position)])) for position in positions]

    expected = np.stack([generator.standard_normal((3, 5), dtype=np.float32) for generator in fresh()])
    np.testing.assert_array_equal(numbers.normal(positions, (3, 5)).numpy(), expected)
    np.testing.assert_array_equal(numbers.normal(positions[[2]], (3, 5)).numpy(), expected[[2]])
    uniform = np.array([(generator.integers(0, 1 << 23) + 0.5) / (1 << 23) for generator in fresh()], np.float32)
    np.testing.assert_array_equal(numbers.uniform(positions).numpy(), uniform)


@dataclass(frozen=True)
class Faulty(Tracker):
    """Waits for `gate`, and fails as often as `failures` says."""

    gate: threading.Event = field(default_factory=threading.Event)
    failures: list[int] = field(default_factory=lambda: [0])
    sent: list[tuple[str, float, int]] = field(default_factory=list)

    def series(self, points: list[tuple[str, float, int]]) -> None:
        self.gate.wait(60)
        if self.failures[0]:
            self.failures[0] -= 1
            raise ConnectionError("no server")
        self.sent.extend(points)


def test_a_slow_tracker_holds_nobody_up_and_loses_nothing() -> None:
    tracker = Faulty()
    sender = Sender(tracker)
    points = [("loss", 0.5, number) for number in range(4)]
    for point in points:
        sender.points([point])  # would never return if it waited for the gate
    tracker.gate.set()
    sender.finish()
    assert tracker.sent == points


def test_points_that_failed_are_sent_with_the_next(capfd: pytest.CaptureFixture[str]) -> None:
    tracker = Faulty(failures=[2])
    tracker.gate.set()
    sender = Sender(tracker)
    points = [("loss", 0.5, number) for number in range(3)]
    for point in points:
        sender.points([point])
    sender.finish()
    sender.finish()
    assert sorted(tracker.sent) == points
    assert capfd.readouterr().out.count("training goes on (no server)") == 1


def test_a_lost_tracker_does_not_end_training(capfd: pytest.CaptureFixture[str]) -> None:
    tracker = Faulty(failures=[1000])
    tracker.gate.set()
    sender = Sender(tracker)
    sender.points([("loss", 0.5, 1)])
    sender.finish()
    assert "1 logged values did not reach the tracker" in capfd.readouterr().out


def test_curves_begin_anew_where_the_guard_goes_back_to_the_beginning(tmp_path: Path) -> None:
    rewind, broken = {"guard": {"policy": "rewind"}}, frozenset({3 * BATCH})
    group_of_one(CPU)
    try:
        perform(Run("rewind", "rewind", {"checkpoint_every": 12 * BATCH}, rewind, broken=broken), tmp_path)
    finally:
        dist.destroy_process_group()
    images = result(tmp_path, "rewind")["curve"][:, 0]
    assert images.tolist() == [number * BATCH for number in range(1, 13) if number != 4]


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_utilisation_is_of_the_devices_own_peak(
    monkeypatch: pytest.MonkeyPatch, name: str, teraflops: int | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (None if teraflops is None else teraflops * 1e12)


class Forgetful(ToyTrainee):
    """With dropout, whose numbers are torch's own."""

    def __init__(self, section: Training, run: Run) -> None:
        super().__init__(section, run)
        layers: Any = self.module.net
        layers.insert(2, nn.Dropout(0.5))


def test_dropout_is_the_same_after_a_resume(tmp_path: Path) -> None:
    group_of_one(CPU)
    try:
        for run in (
            Run("whole", "whole", trainee=Forgetful),
            Run("stopped", "resumed", stop_at=9 * BATCH, trainee=Forgetful),
            Run("resumed", "resumed", trainee=Forgetful),
            Run("plain", "plain"),
        ):
            perform(run, tmp_path)
            torch.rand(7)  # what else draws in the process is no matter
    finally:
        dist.destroy_process_group()
    assert (tmp_path / "stopped.error").read_text().startswith("Interrupted")
    whole = result(tmp_path, "whole")
    assert same(result(tmp_path, "resumed"), whole)
    assert not torch.equal(whole["curve"], result(tmp_path, "plain")["curve"]), "something is dropped"


def test_every_tensor_of_inputs_is_handed_over() -> None:
    one, two, three = (torch.full((1,), float(number)) for number in range(3))
    given = [{"images": one, "seen": [two, (three,)], "weight": 1.0, "discriminator": None}]
    assert [float(each) for each in tensors(given)] == [0.0, 1.0, 2.0]


def test_a_score_that_is_no_number_is_not_the_best() -> None:
    found = iter([np.nan, 2.0, np.inf, 1.0])
    scores = Scores(lambda trainee: {"total": next(found)}, Validation(every=1))  # type: ignore[arg-type]
    kept = SimpleNamespace(log=lambda values, images: None)
    state: Any = SimpleNamespace(averaged=nullcontext, trainee=None, metrics=kept, best=None)
    best = []
    for images in range(1, 5):
        scores(StepSpan(images - 1, images, 9), state)
        best.append(state.best and state.best.images_seen)
    assert best == [None, 2, 2, 4]
