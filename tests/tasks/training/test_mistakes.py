"""What a worker's error means: a mistake and a defect end the run at once, anything else starts workers anew."""

from __future__ import annotations

import logging

import pyarrow as pa
import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError

from configs.errors import Unreachable, UserError
from tasks.training.ray_parts import Mistakes, meaning

_ONCE = [UserError("latents of another recipe"), ValueError("grid 3 does not fit"), KeyError("x"), ImportError("y")]
_AGAIN = [Unreachable("storage is away"), RuntimeError("CUDA"), OSError("reset"), pa.ArrowInvalid("cut short")]


@pytest.mark.parametrize("error", _ONCE, ids=lambda error: type(error).__name__)
def test_what_would_come_again_ends_the_run(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        Mistakes().after_exception(None, {1: error})
    assert raised.value is error


@pytest.mark.parametrize("error", _AGAIN, ids=lambda error: type(error).__name__)
def test_what_may_pass_does_not(error: Exception) -> None:
    Mistakes().after_exception(None, {0: error})


def test_the_account_of_a_storage_that_is_away_is_skipped_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = logging.getLogger("ray.train.v2._internal.execution.failure_handling.default")
    for name, value in (("disabled", False), ("propagate", True), ("level", logging.INFO)):
        monkeypatch.setattr(policy, name, value)
    with caplog.at_level(logging.INFO):
        Mistakes().after_exception(None, {0: Unreachable("storage is away")})
        policy.info("a traceback")
        policy.info("another failure")
    assert [record.message for record in caplog.records if record.name == policy.name] == ["another failure"]


def test_workers_that_memory_or_a_node_leaves_as_they_start_are_one_line_and_worth_another_attempt() -> None:
    full = OutOfMemoryError("2 worker(s) were killed due to the node running low on memory.\nTop 10 memory users: …")
    told = meaning(full)
    assert type(told) is Unreachable and "\n" not in str(told)
    assert "killed due to the node running low on memory" in str(told) and "compute.train.workers" in str(told)
    assert type(meaning(ActorDiedError())) is Unreachable
    mistake = UserError("latents of another recipe")
    assert meaning(mistake) is mistake and meaning(ValueError("grid 3 does not fit")) is None
