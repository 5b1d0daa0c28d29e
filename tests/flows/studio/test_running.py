"""What is running, from MLflow's own records: how far, how long still, its picture, and that it was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.studio.running import Running, prices, running
from infra import open_runs, tracking
from infra.open_runs import OpenRun


@pytest.fixture(autouse=True)
def database(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.getbasetemp() / 'running.db'}")


def test_a_training_under_way_and_after_it_was_killed() -> None:
    parent = tracking.start_run("running", "demo guidance.scale=4", {"root": "file:///artifacts"})
    with open_runs.listed(OpenRun(uri=parent.uri, run=parent.run)):
        (found,) = running()
        assert (found.name, found.root, found.alive, found.told) == (
            *("demo guidance.scale=4", "file:///artifacts", True, "between stages"),
        )
        stage = tracking.start_run("running", "train_dit", {"stage": "train_dit"}, parent)
        stage.params({"train_dit": {"images": 1000}})
        stage.series([("images_per_second", 90.0, 100), ("loss/total", 2.0, 100), ("loss/total", 1.5, 200)])
        stage.series([("images_per_second", 80.0, 200)])
        stage.file("preview/00000000000100.png", b"first")
        stage.file("preview/00000000000200.png", b"second")
        (found,) = running()
        assert (found.stage, found.images, found.total, found.rate) == ("train_dit", 200, 1000, 80.0)
        assert found.seconds_left == 10.0 and found.share == 0.2 and found.preview == b"second"
        assert found.curves == {"total": [(100.0, 2.0), (200.0, 1.5)]}
        assert found.told == "train_dit · 200 of 1,000 images · 80/s · 10 s left of this stage"
    (found,) = running()
    assert found.alive is None, "another machine's, or a job's"
    parent.finish()
    assert running() == []


def test_money_and_the_dead() -> None:
    run = Running("id", "name", "root", True, seconds=1800.0)
    assert run.dollars(3.0) == 1.5 and run.seconds_left is None and run.share == 0.0
    assert "killed" in Running("id", "name", "root", False, 1.0, "encode").told
    known = prices()
    assert next(iter(known.items())) == ("this machine", 0.0) and any(name.startswith("aws: ") for name in known)
    assert all(price > 0 for name, price in known.items() if name != "this machine")
