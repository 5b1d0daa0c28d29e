"""What MLflow and Prefect show of a run: scores, report, picture, name, and how far a stage is."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import shown
from flows.titles import title_of
from infra import progress, tracking
from infra.artifacts import Artifact
from infra.progress import Bar, share
from infra.tracking import Tracker
from tests.helpers.builders import at, put, small_recipe

NAME = "demo_tiny guidance.scale=4"


def test_the_run_itself_has_report_picture_note_and_is_found_by_its_changes(tmp_path: Path, home: Path) -> None:
    from mlflow import MlflowClient

    root, recipe = at(tmp_path), small_recipe()
    scores = {"frechet_x": 12.345, "floor_frechet_x": 1.5, "judge_accuracy": 0.75}
    put(root, recipe, "evaluate", [], scores=scores)
    storage = Artifact(root, "report", "report").storage
    files = [storage.write_bytes(name, b"page") for name in ("generated.png", "report.html", "curves.png")]
    report = put(root, recipe, "report", files, inputs={"evaluate": "evaluate"})
    tags = {"flow": "sfd-full", **shown.differing("demo_tiny", ["sample.guidance.scale=4"])}
    run = tracking.start_run("latentforge", NAME, tags)
    shown.conclude(report.uri, NAME, run, "")
    run.finish()
    client = MlflowClient(tracking.tracking_uri())
    found = client.get_run(run.run)
    assert {file.path for file in client.list_artifacts(run.run)} == {"generated.png", "report.html"}
    said = found.data.tags["mlflow.note.content"]
    assert NAME in said and "| frechet_x | 12.35 | 1.5 |" in said and "| judge_accuracy | 0.75 | – |" in said
    assert report.uri in said
    experiment = client.get_experiment(found.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    chosen = client.search_runs([experiment.experiment_id], "tags.`changed.sample.guidance.scale` = '4.0'")
    assert [each.info.run_name for each in chosen] == [NAME]


def test_a_run_that_ends_before_its_scores_says_nothing_of_them(tmp_path: Path) -> None:
    artifact = put(at(tmp_path), small_recipe(), "encode", [])
    shown.conclude(artifact.uri, NAME, Tracker(), "")


def test_only_what_counts_is_on_the_whole_runs_page() -> None:
    assert shown.counting("evaluate", {"fid": 2.0}) == {"evaluate/fid": 2.0}
    assert shown.counting("train_dit", {"final/loss": 1.0, "images_per_second": 9.0}) == {
        "train_dit/images_per_second": 9.0
    }


def test_how_far_work_is_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_bars", [])  # work that failed before is still told how far it came
    assert share() is None
    with Bar("encode", total=8) as bar:
        bar.advance(2)
        assert share() == 0.25
        with Bar("source", None):
            assert share() is None
    assert share() is None


def test_prefect_calls_a_run_as_mlflow_does() -> None:
    assert title_of({"recipe": "demo_tiny", "overrides": ["sample.guidance.scale=4"]}) == NAME
    assert title_of({"recipe": "demo_tiny", "overrides": None}) == "demo_tiny"
    assert title_of({"recipe": "no_such"}) == "no_such"
