"""A training that is stopped says how far it is, whatever Ray makes of the interruption."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import ray.train.torch

from infra import stopping
from tasks.train_dit import STAGE
from tasks.training import launch
from tests.helpers.builders import at, context, small_recipe


@pytest.mark.parametrize("raised", [KeyboardInterrupt, lambda: stopping.Stopped(signal.SIGINT)])
@pytest.mark.parametrize("asked", [signal.SIGINT, 0])
def test_where_it_goes_on_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Any, asked: int) -> None:
    class Trainer:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def fit(self) -> None:
            raise raised()

    for name in ("connect", "require_gpus"):
        monkeypatch.setattr(launch, name, lambda *_: None)
    monkeypatch.setattr(launch.checkpoints, "whole", lambda out: [640, 1344])
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    monkeypatch.setattr(stopping._State, "number", int(asked))
    monkeypatch.setattr(stopping._State, "where", "")
    with pytest.raises(KeyboardInterrupt):
        launch._fit(context(at(tmp_path), small_recipe(), STAGE, "encode"))
    assert stopping.where() == ("1,344 images" if asked else "")
