"""Comparisons: runs found by MLflow run, artifact and root; what differs is shown; what cannot compare is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import Recipe, UserError
from flows import finding
from flows.compare import compare
from infra import tracking
from infra.artifacts import MANIFEST, Artifact
from tasks.drawing.pictures import png
from tasks.training.metrics import SECONDS
from tests.helpers.builders import at, put, small_recipe

FRECHET = "frechet_efficientnet_lite0"


def evaluated(root: str, name: str, value: float, *overrides: str, **scores: float) -> Artifact:
    """A made-up evaluation with the sample and the training that it leads back to."""
    recipe = small_recipe(*overrides)
    curves = {"total": [[100, 2.0], [200, 1.0]], SECONDS: [[100, 3.0], [200, 7.0]]}
    put(root, recipe, "train_dit", [], name, facts={"curves": curves})
    storage = Artifact(root, "sample", name).storage
    sheet = storage.write_bytes("grid.png", png(np.zeros((4, 4, 3), np.uint8)))
    linked(root, recipe, "sample", name, {"train_dit": name}, files=(sheet,), scores={"images_per_second": 50.0})
    found = {FRECHET: value, f"floor_{FRECHET}": 1.5, **scores}
    return linked(root, recipe, "evaluate", name, {"sample": name}, scores=found)


def linked(root: str, recipe: Recipe, stage: str, name: str, inputs: dict[str, str], **found: Any) -> Artifact:
    artifact = put(root, recipe, stage, [], name)
    sections = {"evaluate": recipe.section("evaluate")}
    changed = replace(artifact.manifest, inputs=inputs, sections=sections, **found)
    artifact.storage.write_bytes(MANIFEST, changed.to_json())
    return Artifact(root, stage, name)


def test_runs_are_found_however_they_are_named(tmp_path: Path, home: Path) -> None:
    one = evaluated(at(tmp_path / "one"), "aaaaaaaa", 12.0)
    two = evaluated(at(tmp_path / "two"), "bbbbbbbb", 8.0, "sample.guidance.scale=4.5")
    third = evaluated(at(tmp_path / "three"), "cccccccc", 9.0)
    run = tracking.start_run("tests", "third", {"root": third.root, "stage.evaluate": "made cccccccc"})
    run.finish()
    made = compare([one.uri, two.root, run.run], str(tmp_path / "pages"))
    assert made.manifest.rows == 3 and len(made.manifest.scores) == 3
    page = made.read("comparison.html").decode()
    assert page.count("demo_tiny") >= 3 and "sample.guidance.scale" in page and "4.5" in page
    assert 'number best">8<' in page and "real images" in page and "were not evaluated alike" not in page
    assert {entry.path for entry in made.files()} >= {
        "comparison.html",
        "by_images.png",
        "by_seconds.png",
        "scores.csv",
    }


def test_runs_are_called_by_names_and_by_the_beginning_of_ids(tmp_path: Path, home: Path) -> None:
    root = at(tmp_path)
    ids = []
    for name, scale in (("aaaaaaaa", 2), ("bbbbbbbb", 4), ("cccccccc", 4)):
        evaluated(root, name, float(scale), f"sample.guidance.scale={scale}")
        tags = {"root": root, "stage.evaluate": f"made {name}"}
        run = tracking.start_run("tests", f"demo_tiny guidance.scale={scale}", tags)
        run.finish()
        ids.append(run.run)
    assert finding.evaluation_of("demo_tiny guidance.scale=2").fingerprint == "aaaaaaaa"
    assert finding.evaluation_of(ids[1][:8]).fingerprint == "bbbbbbbb"
    assert finding.newest(2) == ids[1:]
    with pytest.raises(UserError, match=f"may be {ids[1][:8]} .*{ids[2][:8]}|may be {ids[2][:8]} .*{ids[1][:8]}"):
        finding.evaluation_of("demo_tiny guidance.scale=4")
    with pytest.raises(UserError, match=f"no run 'other'.*there are .*{ids[0][:8]}"):
        finding.evaluation_of("other")
    with pytest.raises(UserError, match=r"3 different evaluations are known .* wanted the last 4"):
        finding.newest(4)
    page = compare([ids[0][:6], ids[1]], root).read("comparison.html").decode()
    assert "demo_tiny guidance.scale=2" in page and "demo_tiny guidance.scale=4" in page


def test_the_comparison_is_in_mlflow_as_table_and_page(tmp_path: Path, home: Path) -> None:
    from mlflow import MlflowClient

    root = at(tmp_path)
    runs = [evaluated(root, "aaaaaaaa", 12.0).uri, evaluated(root, "bbbbbbbb", 8.0).uri]
    compare(runs, root)
    client = MlflowClient(tracking_uri=tracking.tracking_uri())
    experiment = client.get_experiment_by_name("latentforge")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"comparison.html", "scores.json"}


def test_unlike_evaluations_are_marked(tmp_path: Path, home: Path) -> None:
    root = at(tmp_path)
    runs = [evaluated(root, "aaaaaaaa", 12.0).uri, evaluated(root, "bbbbbbbb", 8.0, "evaluate.images=99").uri]
    assert "were not evaluated alike" in compare(runs, root).read("comparison.html").decode()


def test_what_cannot_be_compared_is_refused(tmp_path: Path, home: Path) -> None:
    root = at(tmp_path)
    one = evaluated(root, "aaaaaaaa", 12.0)
    with pytest.raises(UserError, match="two different evaluations at least, found 1"):
        compare([one.uri, root])
    evaluated(root, "bbbbbbbb", 8.0)
    with pytest.raises(UserError, match=r"holds 2 evaluations, expected one: name one of .*aaaaaaaa"):
        compare([one.uri, root])
    with pytest.raises(UserError, match="artifact of stage sample, which has no scores"):
        compare([one.uri, f"{root}/sample/bbbbbbbb"])
    with pytest.raises(UserError, match="no run 'deadbeef' in MLflow"):
        compare([one.uri, "deadbeef"])
    half = tracking.start_run("tests", "half", {"root": root})
    with pytest.raises(UserError, match=f"{half.run} has no evaluation"):
        compare([one.uri, half.run])
