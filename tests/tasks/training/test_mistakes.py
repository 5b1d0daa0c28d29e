"""What a worker's error means: a mistake and a defect end the run at once, anything else starts workers anew."""

from __future__ import annotations

import logging

import pyarrow as pa
import pytest

from configs.errors import Unreachable, UserError
from tasks.training.ray_parts import Mistakes

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
