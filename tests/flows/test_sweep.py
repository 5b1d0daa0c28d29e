"""Sweeps: every combination is sampled and scored by one job; what is no setting of sampling is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from configs import UserError
from flows import sweep
from flows.race import run_jobs
from infra.artifacts import MANIFEST, Artifact
from infra.tracking import Tracker
from tasks.sample import STAGE
from tests.helpers.builders import at, context, put_networks, put_shard, small_recipe

OVER = ("sample.guidance.scale=1.5,3", "sample.steps=2,4")
SMALL = ("sample.images=40", "evaluate.images=60", "evaluate.bootstrap=0")


@pytest.mark.slow  # trials have tests of their own
def test_one_model_is_sampled_and_scored_under_all_settings(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "all_of", run_jobs.fn)  # without Prefect's server around it
    root, recipe = at(tmp_path), small_recipe(*SMALL)
    put_shard(root, recipe)
    put_networks(root, recipe)
    latents = Artifact(root, "encode", "encode")
    latents.storage.write_bytes(MANIFEST, replace(latents.manifest, inputs={"shard": "shard"}).to_json())
    settings = {
        f"scale {scale}, steps {steps}": small_recipe(*SMALL, f"sample.guidance.scale={scale}", f"sample.steps={steps}")
        for scale in (1.5, 3)
        for steps in (2, 4)
    }
    jobs = {
        name: context(root, each, STAGE, "train_vavae", "encode", "train_dit").job for name, each in settings.items()
    }
    made = sweep._run(settings, jobs, OVER, Tracker())
    assert made.manifest.rows == 4 and "scale 1.5, steps 2/class_consistency" in made.manifest.scores
    assert {entry.path for entry in made.files()} == {"sweep.html", "scores.csv", "sweep.png", "frontier.png"}
    trials = sorted(Path(tmp_path).glob("trial/*/manifest.json"))
    assert len(trials) == 4
    before = [path.stat().st_mtime_ns for path in trials]
    again = sweep._run(dict(list(settings.items())[:2]), jobs, OVER[1:], Tracker())
    assert again.manifest.rows == 2 and [path.stat().st_mtime_ns for path in trials] == before, "nothing is tried twice"


def test_settings_are_all_combinations_and_the_first_field_is_the_axis() -> None:
    axis = sweep._axis(OVER)
    assert axis is not None and axis.label == "sample.guidance.scale"
    assert axis.places == {
        "scale 1.5, steps 2": (1.5, "steps 2"),
        "scale 1.5, steps 4": (1.5, "steps 4"),
        "scale 3, steps 2": (3.0, "steps 2"),
        "scale 3, steps 4": (3.0, "steps 4"),
    }
    assert sweep._axis(["sample.solver=euler,heun"]) is None


def test_commas_in_brackets_belong_to_a_value() -> None:
    field, values = sweep._values("sample.times=[0, 0.4, 1],[0, 0.6, 1]")
    assert field == "sample.times" and values == ["[0, 0.4, 1]", "[0, 0.6, 1]"]
    assert sweep._values("sample.labels={1: 2, 3: 4},balanced")[1] == ["{1: 2, 3: 4}", "balanced"]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ([], "nothing to sweep over"),
        (["train_dit.images=1,2"], r"train_dit\.images=1,2: expected sample\.field=value,value"),
        (["sample.steps="], "expected sample.field=value,value"),
        (["sample.guidance.scale=0.5"], "greater than or equal to 1"),
        (["sample.steps=3"], "is not complete, so there is nothing to sample from"),
    ],
)
def test_mistakes_are_named(over: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        sweep.settings_of("demo_tiny", over, [], at(tmp_path))
