"""Scores and the page of a run that reads no image of its own: an `.npz` is all that it compares with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from configs import Recipe, UserError
from tasks import evaluate, report
from tasks.scoring.real_images import ScoringInputs, real_images
from tasks.stage import perform
from tests.helpers.builders import at, context, put_networks, put_sample, small_recipe
from tests.tasks.test_evaluate import pictures

GIVEN = (
    "train_vavae.images=0",
    "train_vavae.pretrained=v.pt",
    "train_dit.images=0",
    "train_dit.pretrained=d.pt",
    "train_dit.statistics.texture=a.pt",
    "train_dit.statistics.semantic=b.pt",
    "evaluate.classifier=null",
    "evaluate.images=60",
    "evaluate.bootstrap=0",
)


@pytest.fixture
def prepared(tmp_path: Path, actors_here: None) -> Recipe:
    labels = np.arange(60) % 10
    np.savez(tmp_path / "reference.npz", arr_0=pictures(labels, seed=1))
    recipe = small_recipe(*GIVEN, f"evaluate.reference={tmp_path}/reference.npz")
    put_networks(at(tmp_path), recipe)
    put_sample(at(tmp_path), recipe, pictures(labels, seed=2), labels)
    return recipe


def test_samples_are_scored_against_a_file_alone(prepared: Recipe, tmp_path: Path) -> None:
    made = perform(evaluate.STAGE, context(at(tmp_path), prepared, evaluate.STAGE, "train_vavae", "sample").job)
    scores = made.manifest.scores
    assert scores["frechet_efficientnet_lite0"] > 0 and "precision_efficientnet_lite0" in scores
    assert not [name for name in scores if name.startswith(("floor_", "reconstruction_", "judge_"))]
    assert made.manifest.facts["images"] == {"generated": 60, "test": 60, "floor": 0}
    inputs = {"evaluate": made.fingerprint}
    page = perform(
        report.STAGE, context(at(tmp_path), prepared, report.STAGE, "train_vavae", "train_dit", "sample", **inputs).job
    )
    text = page.read("report.html").decode()
    assert "60 of the reference" in text and "Reconstructed" not in text and "The floor is" not in text
    assert {entry.path for entry in page.manifest.files} >= {"report.html", "generated.png"}


def test_sweeps_know_no_floor_without_images(prepared: Recipe, tmp_path: Path) -> None:
    found = real_images(ScoringInputs(prepared, at(tmp_path), None))
    assert found.floor == {} and found.judge is None and found.reference.is_complete()


def test_statistics_alone_cannot_be_compared_with_other_networks_features(tmp_path: Path) -> None:
    width = 2048
    np.savez(tmp_path / "r.npz", mu=np.zeros(width), sigma=np.eye(width))
    recipe = small_recipe(*GIVEN, f"evaluate.reference={tmp_path}/r.npz", "evaluate.inception.weights=none.pth")
    with pytest.raises(UserError, match=r"holds statistics and no images.*take a file with images"):
        evaluate.STAGE.external(recipe)  # type: ignore[misc]
