"""Sweeps: every combination is sampled and scored by one job; what is no setting of sampling is refused."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs import Recipe, UserError
from flows import inputs, sweep
from flows.__main__ import app
from flows.race import run_jobs
from infra.artifacts import MANIFEST, Artifact
from infra.storage import Storage
from infra.tracking import Tracker
from tasks.sample import STAGE
from tasks.sources import folder
from tasks.sources.walk import walk
from tasks.stage import Job
from tests.helpers.builders import at, context, put_networks, put_shard, small_recipe
from tests.helpers.piles import SMALL_BATCHES, folder_of_classes

OVER = ("sample.guidance.scale=1.5,3", "sample.steps=2,4")
SMALL = ("sample.images=40", "evaluate.images=60", "evaluate.bootstrap=0")


@pytest.mark.slow  # trials have tests of their own
def test_one_model_is_sampled_and_scored_under_all_settings(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "run_jobs", run_jobs.fn)  # without Prefect's server around it
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


@pytest.mark.parametrize(
    "command",
    [
        ["sweep", "--over", "sample.steps=3,4,5"],
        ["sample", "--classes", "1"],
        ["sample", "--npz", "out.npz"],
        ["export", "--to", "there"],
        ["weights", "probe"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_command_lists_its_source_once(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that start from what a run made, as they look for it; `run` has a test beside its stage."""
    pile = folder_of_classes(tmp_path / "pile", {"a": 4, "b": 4})
    listings: list[str] = []
    monkeypatch.setattr(folder, "walk", lambda at: (listings.append(at.url), walk(at))[1])

    def stops(settings: dict[str, Recipe], jobs: dict[str, Job], *rest: object) -> Artifact:
        assert len(jobs) == 3
        inputs.shards_of(next(iter(settings.values())), next(iter(jobs.values())))
        raise UserError("as far as this test goes")

    for name, replaced in {
        "flows.inputs.needs": lambda *given: None,
        "flows.__main__._check_environment": lambda: None,
        "flows.__main__._running": nullcontext,
        "flows.sweep.tracked": lambda *given: nullcontext(Tracker()),
        "flows.sweep.sweep": sweep.sweep.fn,
        "flows.sweep._run": stops,
    }.items():
        monkeypatch.setattr(name, replaced)
    monkeypatch.chdir(tmp_path)
    options = ["--recipe", "demo_tiny", "--root", str(tmp_path / "root")]
    changes = [f"data.source={{kind: folder, path: '{pile}'}}", "data.classes=2", "sample.labels=random"]
    for change in [*changes, *SMALL_BATCHES]:
        options += ["--set", change]
    ended = CliRunner().invoke(app, [*command, *options])
    assert isinstance(ended.exception, UserError | FileNotFoundError), ended.exception  # nothing has been trained
    assert listings == [Storage.at(str(pile)).url]
