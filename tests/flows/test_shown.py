"""What MLflow and Prefect show of a run: scores, report, picture, name, and how far a stage is."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import run as flow_runs
from flows import shown
from flows.titles import title_of
from flows.tracked import tracked
from infra import progress, tracking
from infra.artifacts import Artifact
from infra.logs import Line
from infra.progress import Bar, share
from infra.tracking import Tracker
from tasks.stage import Job, Stage
from tests.helpers.builders import at, put, small_recipe

NAME = "demo_tiny guidance.scale=4"


def test_the_run_itself_has_report_picture_note_and_is_found_by_its_changes(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    root, recipe = at(tmp_path), small_recipe()
    scores = {"frechet_x": 12.345, "floor_frechet_x": 1.5, "judge_accuracy": 0.75}
    put(root, recipe, "evaluate", [], scores=scores)
    storage = Artifact(root, "report", "report").storage
    files = [storage.write_bytes(name, b"page") for name in ("generated.png", "report.html", "curves.png")]
    report = put(root, recipe, "report", files, inputs={"evaluate": "evaluate"})
    changed = shown.differing("demo_tiny", ["sample.guidance.scale=4"])
    assert changed == {"sample.guidance.scale": "4.0"}
    run = tracking.start_run("latentforge", NAME, {"flow": "sfd-full", "changed.sample.guidance.scale": "4.0"})
    run.params({"name": "demo_tiny", "sample": {"steps": 2, "guidance": {"scale": 4.0}}}, first=changed)
    shown.conclude(report.uri, NAME, run, "")
    run.finish()
    client = MlflowClient(tracking.tracking_uri())
    found = client.get_run(run.run)
    assert {file.path for file in client.list_artifacts(run.run)} == {"generated.png", "report.html"}
    said = found.data.tags["mlflow.note.content"]
    assert NAME in said and "| frechet_x | 12.35 | 1.5 |" in said and "| judge_accuracy | 0.75 | – |" in said
    assert report.uri in said and run.run in said
    monkeypatch.setattr(Tracker, "page", lambda self, file="": f"#/run/{file}")
    there = shown.note(NAME, report.manifest, report.uri, Tracker("http://server:5000/", run.run))
    assert "[run](http://server:5000/#/run/), [report](http://server:5000/#/run/report.html)" in there
    assert list(found.data.params) == ["sample.guidance.scale", "name", "sample.steps"], "what differs comes first"
    experiment = client.get_experiment(found.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    chosen = client.search_runs([experiment.experiment_id], "tags.`changed.sample.guidance.scale` = '4.0'")
    assert [each.info.run_name for each in chosen] == [NAME]


def test_a_run_that_ends_before_its_scores_says_nothing_of_them(tmp_path: Path) -> None:
    artifact = put(at(tmp_path), small_recipe(), "encode", [])
    shown.conclude(artifact.uri, NAME, Tracker(), "")


def test_a_whole_run_does_not_fail_where_mlflow_is_away_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(self: Tracker, *_: object, **__: object) -> str:
        raise ConnectionError("no answer")

    for name in ("page", "tag", "finish"):
        monkeypatch.setattr(Tracker, name, away)
    monkeypatch.setattr("flows.tracked.disconnect", lambda: None)
    monkeypatch.setattr("infra.tracking.start_run", lambda *_: Tracker("http://server", "a"))
    evaluated = put(at(tmp_path), small_recipe(), "evaluate", [], scores={"fid": 2.0})
    with tracked("latentforge", NAME, {}) as tracker:
        shown.conclude(evaluated.uri, NAME, tracker, "")
    report, end = capsys.readouterr().out.splitlines()
    assert "did not take the run's report and note (no answer)" in report and "did not take its end" in end


def test_only_what_counts_is_on_the_whole_runs_page() -> None:
    counting = shown.counting("evaluate", {"floor_fid": 1.0, "fid": 2.0})
    assert list(counting.items()) == [("evaluate/fid", 2.0), ("evaluate/floor_fid", 1.0)], "real images last"
    assert shown.counting("train_dit", {"final/loss": 1.0, "images_per_second": 9.0}) == {}


def test_the_last_point_of_a_curve_is_no_chart_of_its_own(tmp_path: Path) -> None:
    scores = {"final/loss": 1.0, "images_per_second": 9.0}
    made = put(at(tmp_path), small_recipe(), "train_dit", [], scores=scores).manifest
    assert made.scores == scores
    assert made.figures == {"images_per_second": 9.0, "seconds": 1.5, "rows": 0.0}


def test_how_far_work_is_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_bars", [])  # work that failed before is still told how far it came
    assert share() is None
    with Bar("encode", total=8) as bar:
        bar.advance(2)
        assert share() == 0.25
        with Bar("source", None):
            assert share() is None
    assert share() is None


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What Prefect is told of bars."""
    told: list[float] = []
    monkeypatch.setattr(shown, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr("prefect.artifacts.create_progress_artifact", lambda at, description: told.append(at) or "bar")
    monkeypatch.setattr("prefect.artifacts.update_progress_artifact", lambda bar, at, description: told.append(at))
    return told


def waited(moves: list[float], value: float) -> None:
    deadline = time.monotonic() + 20
    while value not in moves and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_stages_bar_ends_where_the_stage_does(moves: list[float]) -> None:
    with shown.moving("encode", lambda: 0.37):
        waited(moves, 37.0)
    assert moves[0] == 37.0 and moves[-1] == 100.0
    moves.clear()
    with pytest.raises(RuntimeError), shown.moving("encode", lambda: 0.37):
        waited(moves, 37.0)
        raise RuntimeError
    assert set(moves) == {37.0}, "a stage that fails did not come to its end"
    moves.clear()
    with shown.moving("shard", lambda: None):
        pass
    assert moves == [100.0], "a short stage has a bar, too"


def test_looks_that_take_long_are_seldom(moves: list[float]) -> None:
    """After days of training each reads all of its curve from MLflow."""
    looks: list[int] = []

    def slow() -> float:
        looks.append(1)
        time.sleep(0.05)
        return 0.5

    with shown.moving("train_dit", slow):
        waited(moves, 50.0)
        time.sleep(0.5)
    assert len(looks) == 1


def test_a_trainings_bar_is_what_its_workers_told_mlflow(home: Path) -> None:
    run = tracking.start_run("latentforge", "train_dit", {})
    share = partial(run.seen_of, 640)
    assert share() is None
    run.metrics({"images_per_second": 9.0}, step=160)
    assert share() == 0.25


@pytest.mark.parametrize("name", ["encode", "train_dit"])
def test_stages_that_are_jobs_have_a_bar_as_others_have(
    name: str, moves: list[float], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    run = tracking.start_run("latentforge", name, {})
    artifact = SimpleNamespace(manifest=SimpleNamespace(fingerprint="made"))
    context: Any = SimpleNamespace(
        recipe=small_recipe(), artifact=artifact, is_done=False, tracker=run, job=Job(name, "", "", {}, {}, {})
    )

    def job(artifact: Any, description: bytes, cluster: Any, tell: Callable[[Line], None]) -> None:
        tell(Line("encode: 37 of 100", "info", {"images": 37, "total": 100}))
        if name == "train_dit":
            run.metrics({"images_per_second": 9.0}, step=context.recipe.train_dit.images * 37 // 100)
        waited(moves, 37.0)

    monkeypatch.setattr(flow_runs.jobs, "address", lambda cluster: "http://cluster")
    monkeypatch.setattr(flow_runs.jobs, "run", job)
    monkeypatch.setattr(flow_runs, "get_run_logger", lambda: logging.getLogger("test"))
    assert flow_runs._made(Stage(name, 1, (), (), None), context) == "made"  # type: ignore[arg-type]
    assert moves[0] == pytest.approx(37, abs=1) and moves[-1] == 100.0


def test_prefect_calls_a_run_as_mlflow_does() -> None:
    assert title_of({"recipe": "demo_tiny", "overrides": ["sample.guidance.scale=4"]}) == NAME
    assert title_of({"recipe": "demo_tiny", "overrides": None}) == "demo_tiny"
    assert title_of({"recipe": "no_such"}) == "no_such"
