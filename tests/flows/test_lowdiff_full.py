"""LowDiff end to end: the cascade on the latents of the demo's twin, and the same in pixels."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.plan import make_plan
from infra.artifacts import Artifact
from tests.flows.conftest import Workplace

SHARED = ("shard", "train_vavae", "train_semvae", "encode")


def run(workplace: Workplace, recipe: str, root: Path, *arguments: str) -> dict[str, Artifact]:
    """Artifacts by stage of `lowdiff-full`."""
    workplace.flows("run", "lowdiff-full", "--recipe", recipe, "--root", str(root), *arguments)
    found = {}
    for path in root.glob("*/*/manifest.json"):
        found[path.parts[-3]] = Artifact(f"file://{root}", path.parts[-3], path.parts[-2])
    return found


def _tracked(workplace: Workplace, artifact: Artifact) -> set[str]:
    """Names of the metrics of the MLflow run that made an artifact."""
    client = MlflowClient(f"sqlite:///{workplace.home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("latentforge")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.fingerprint = '{artifact.fingerprint}'")
    return set(run.data.metrics)


@pytest.mark.slow  # training, sampling and scores of a cascade are tested by stage
def test_a_cascade_is_trained_sampled_and_scored_on_latents_that_are_there(finished: Workplace, tmp_path: Path) -> None:
    for stage in SHARED:
        shutil.copytree(Path(finished.root) / stage, tmp_path / stage)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/manifest.json")}
    made = run(finished, "lowdiff_tiny", tmp_path)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items()), "the demo's own latents serve"
    assert made.keys() >= {"train_dit", "sample", "evaluate", "report"}
    model, images = made["train_dit"].manifest, made["sample"].manifest
    assert set(model.facts["averages"]) == {"2"} and images.rows == 40
    tracked = _tracked(finished, made["train_dit"])
    for group in ("2/texture", "2/semantic", "4/texture", "4/semantic"):
        assert any(name.startswith(f"when/{group}/") for name in tracked), group
    # 3 steps at 2 × 2 and 2 at 4 × 4, each with and without the label.
    assert images.scores["evaluations"] == 2 * (3 + 2)
    assert 2 * 2 < images.scores["effective_evaluations"] < 2 * (3 + 2)
    assert images.scores["images_per_second"] > 0 and images.scores["sampling_seconds"] > 0
    planned = {stage.work.stage: stage.work for stage in make_plan("lowdiff_tiny").stages}
    written = sum(entry.bytes for entry in model.files)
    assert planned["train_dit"].written.value == pytest.approx(written, rel=0.05)


def test_a_recipe_without_a_cascade_is_refused(workplace: Workplace, tmp_path: Path) -> None:
    refused = workplace.flows("run", "lowdiff-full", "--recipe", "demo_tiny", "--root", str(tmp_path), check=False)
    assert refused.returncode == 1 and "no train_dit.cascade" in refused.stderr


@pytest.mark.slow
def test_pixels_go_through_the_same_stages(workplace: Workplace, tmp_path: Path) -> None:
    made = run(workplace, "lowdiff_pixels_tiny", tmp_path)
    assert made["encode"].manifest.facts["shapes"]["z"] == [3, 16, 16]
    assert made["sample"].manifest.scores["evaluations"] == 2 * (5 + 3)
    assert "report.html" in {entry.path for entry in made["report"].manifest.files}
    picture = tmp_path / "one.png"
    arguments = [
        "--recipe",
        "lowdiff_pixels_tiny",
        "--root",
        str(tmp_path),
        "--classes",
        "1,2",
        "--output",
        str(picture),
    ]
    workplace.flows("sample", *arguments)
    assert picture.read_bytes().startswith(b"\x89PNG")
