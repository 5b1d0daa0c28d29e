"""What Ray Train is given and gives back: a stopped training says how far it is, and storage is ours alone."""

from __future__ import annotations

import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import ray.train.torch
from pyarrow.fs import FileType

from configs import UserError
from infra import stopping
from tasks.train_dit import STAGE
from tasks.training import launch
from tests.helpers.builders import at, context, small_recipe


class Trainer:
    """Ray Train's, without Ray."""

    def __init__(self, *_: Any, run_config: Any, **__: Any) -> None:
        self.run_config = run_config

    def fit(self) -> None: ...


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("connect", "require_gpus"):
        monkeypatch.setattr(launch, name, lambda *_: None)
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, lambda: stopping.Stopped(signal.SIGINT)])
@pytest.mark.parametrize("asked", [signal.SIGINT, 0])
def test_where_it_goes_on_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Any, asked: int) -> None:
    def fit(self: Trainer) -> None:
        raise raised()

    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.setattr(launch.checkpoints, "whole", lambda out: [640, 1344])
    monkeypatch.setattr(stopping._State, "number", int(asked))
    monkeypatch.setattr(stopping._State, "where", "")
    with pytest.raises(KeyboardInterrupt):
        launch._fit(context(at(tmp_path), small_recipe(), STAGE, "encode"))
    assert stopping.where() == ("1,344 images" if asked else "")


def test_ray_train_stores_nothing_that_an_outage_would_keep_it_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does of itself as its controller starts: it writes a file, and looks for it."""

    def fit(self: Trainer) -> None:
        place = pickle.loads(pickle.dumps(self.run_config)).storage_context
        assert place.storage_filesystem.get_file_info(place.experiment_fs_path).type != FileType.NotFound
        assert not list(tmp_path.rglob("*"))

    monkeypatch.setattr(Trainer, "fit", fit)
    with pytest.raises(UserError, match="asked to leave"):  # as nobody trained, there is no result
        launch._fit(context(at(tmp_path), small_recipe(), STAGE, "encode"))
