"""What the dead leave open is closed by the next; what lives is left alone."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
from dataclasses import asdict
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import IO

import pytest

from infra import open_runs, tracking
from infra.open_runs import OpenRun


@pytest.fixture
def mlflow(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.getbasetemp() / 'open_runs.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def _hold(opened: OpenRun, listed: Event, cancelled: bool) -> None:
    with open_runs.listed(opened):
        if cancelled:
            open_runs.note_cancelled()
        listed.set()
        signal.pause()


def _status(run: tracking.Tracker) -> str:
    return str(run._client.get_run(run.run).info.status)


@pytest.mark.parametrize(("cancelled", "status"), [(False, "FAILED"), (True, "KILLED")])
def test_runs_of_a_killed_process_are_closed_by_the_next(mlflow: str, home: Path, cancelled: bool, status: str) -> None:
    parent = tracking.start_run("open runs", "flow", {})
    child = tracking.start_run("open runs", "stage", {}, parent)
    ended = tracking.start_run("open runs", "another stage", {}, parent)
    ended.finish()
    context = multiprocessing.get_context("spawn")
    listed = context.Event()
    opened = OpenRun(uri=parent.uri, run=parent.run)
    process = context.Process(target=_hold, args=(opened, listed, cancelled), daemon=True)
    process.start()
    assert listed.wait(60)

    assert open_runs.close_abandoned() == 0, "it lives"
    assert _status(parent) == "RUNNING"

    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert open_runs.close_abandoned() == 1
    assert [_status(run) for run in (parent, child, ended)] == [status, status, "FINISHED"]
    assert open_runs.close_abandoned() == 0 and not list((home / "open").iterdir())


def test_stages_that_go_on_as_jobs_are_left_alone(mlflow: str, home: Path) -> None:
    parent = tracking.start_run("open runs", "flow", {})
    child = tracking.start_run("open runs", "stage", {}, parent)
    with open_runs.listed(OpenRun(uri=parent.uri, run=parent.run, jobs=True)):
        (listed,) = (home / "open").iterdir()
        text = listed.read_text()
    assert not listed.exists(), "a run that ends takes itself off the list"
    listed.write_text(text)
    assert open_runs.close_abandoned() == 1
    assert [_status(run) for run in (parent, child)] == ["FAILED", "RUNNING"]


def test_a_flow_run_that_prefect_begins_again_stays_open(
    mlflow: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its dead process left in MLflow is closed, and so are other flow runs."""
    closed: list[str] = []
    monkeypatch.setattr(open_runs, "_close_prefect", lambda opened: closed.append(opened.flow_run))
    left = tracking.start_run("open runs", "flow", {})
    (home / "open").mkdir()
    for opened in (OpenRun("again", "", left.uri, left.run), OpenRun("another")):
        (home / "open" / f"{opened.flow_run}.json").write_text(json.dumps(asdict(opened)))
    assert open_runs.close_abandoned("again") == 2
    assert closed == ["another"] and _status(left) == "FAILED"


def test_a_run_is_listed_though_another_process_took_its_new_file_for_abandoned(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, at_first = fcntl.flock, [True]

    def flock(file: IO[str], kind: int) -> None:
        if at_first and at_first.pop():
            open_runs.close_abandoned()
        lock(file, kind)

    monkeypatch.setattr(open_runs.fcntl, "flock", flock)
    with open_runs.listed(OpenRun(run="abc")):
        assert open_runs.living() == {"abc": True}


def test_a_server_that_is_away_keeps_nobody_from_starting(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (home / "open").mkdir()
    damaged, away = home / "open" / "damaged.json", home / "open" / "away.json"
    damaged.write_text("{")
    away.write_text('{"uri": "nonsense://nowhere", "run": "1"}')
    assert open_runs.close_abandoned() == 0
    assert "cannot be closed yet" in capfd.readouterr().out
    assert away.exists() and not damaged.exists()


def test_whether_a_runs_process_lives_is_told_without_closing_it(mlflow: str, home: Path) -> None:
    listed = multiprocessing.get_context("fork").Event()
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(OpenRun(run="abc"), listed, False))
    process.start()
    assert listed.wait(60) and process.pid is not None
    assert open_runs.living() == {"abc": True} == open_runs.living()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (home / "open" / "half.json").write_text('{"run": ')
    assert open_runs.living() == {"abc": False} == open_runs.living()
