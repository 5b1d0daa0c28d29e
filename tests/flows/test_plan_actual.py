"""The plan against what a run left: real artifacts and a real tracker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from configs import UserError, load_recipe
from flows.plan import make_plan
from tasks.plan import sizes
from tasks.plan.actual import actuals
from tasks.plan.data import images_of
from tests.flows.conftest import Workplace
from tests.flows.test_plan import stage


def test_bytes_and_rows_of_a_real_run(finished: Workplace) -> None:
    """Every stage within 5 %; pictures of a sample and a report are compressed, so there the plan is an upper bound."""
    plan, found = make_plan("demo_tiny"), actuals(finished.undisturbed, recipe="demo_tiny")
    assert set(found) == {each.work.stage for each in plan.stages}
    for each in plan.stages:
        actual, name = found[each.work.stage], each.work.stage
        assert actual.bytes is not None
        if name == "report":
            continue  # its curves and text are no formula's
        assert each.work.rows.value == actual.rows, name
        if name == "sample":
            assert actual.bytes <= each.work.written.value
        else:
            assert each.work.written.value == pytest.approx(actual.bytes, rel=0.05), name


def test_bytes_of_mirrored_latents_and_moments(tmp_path: Path) -> None:
    """What the tiny run does not store: flips and standard deviations, written by the stage's own table."""
    from infra.storage import Storage
    from tasks.data.tensors import WRITE_OPTIONS, latent_table

    given = ["train_dit.images=0", "train_dit.pretrained=given.safetensors"]  # moments are for another trainer
    recipe = load_recipe("demo_tiny", ["image.flips=true", "encode.posterior=moments", *given])
    images = images_of(recipe)
    cells, count = recipe.latent_size, images.train
    channels = {"z": 8, "z_std": 8, "s": 4, "s_std": 4, "f": 112}
    shapes = {name + flip: (channels[name], cells, cells) for name in channels for flip in ("", "_flip")}
    tensors = {name: np.zeros((count, *shape), np.float16) for name, shape in shapes.items()}
    keys = [f"train/{number:05d}" for number in range(count)]
    table = latent_table(keys, np.zeros(count, np.int32), tensors)
    entry = Storage.at(str(tmp_path)).write_table("part", table, recipe.encode.rows_per_group, **WRITE_OPTIONS)
    planned = sizes.latent_bytes(images, recipe) * images.train / images.all
    assert planned == pytest.approx(entry.bytes, rel=0.05)


def test_requests_to_write_are_the_files_of_a_real_run(finished: Workplace) -> None:
    """Files that are left, and the run's own file, which goes when the stage is done."""
    plan = make_plan("demo_tiny")
    for name in ("shard", "encode", "sample"):
        folder = Path(finished.undisturbed) / name / finished.first[name]
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert stage(plan, name).work.writes.value == len(files) + 1, name


def test_measured_rates_give_back_the_measured_time_and_scale(finished: Workplace) -> None:
    found = actuals(finished.undisturbed, recipe="demo_tiny")
    plan = make_plan("demo_tiny", measured=finished.undisturbed)
    for name in ("shard", "train_vavae", "train_dit", "encode", "sample"):
        planned = stage(plan, name)
        assert planned.bound == "measured" and "measured" in planned.seconds.source
        assert planned.seconds.value == pytest.approx(found[name].seconds)
    twice = make_plan("demo_tiny", ["train_dit.images=1280"], measured=finished.undisturbed)
    ratio = stage(twice, "train_dit").seconds.value / stage(plan, "train_dit").seconds.value
    assert ratio == pytest.approx(2)


def test_plan_against_a_tracked_run(finished: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run id of MLflow is as good as a root: its parameters are the recipe, its children the stages."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{finished.home / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("latentforge")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.flow = 'sfd-full'", order_by=["start_time ASC"])
    run = next(run for run in runs if run.data.tags.get("stage.shard", "").startswith("made"))
    tracked, under = actuals(run.info.run_id, finished.undisturbed), actuals(finished.undisturbed, recipe="demo_tiny")
    assert set(tracked) == set(under)
    assert tracked["encode"].rows == under["encode"].rows
    assert tracked["encode"].bytes == under["encode"].bytes
    assert tracked["encode"].recipe == load_recipe("demo_tiny")
    assert actuals(run.info.run_id)["encode"].bytes is None, "nobody said where the artifact lies"
    with pytest.raises(UserError, match="no run"):
        actuals("0" * 32)


def test_the_command_prints_every_stage_with_sources(finished: Workplace) -> None:
    arguments = [
        "sfd-full",
        "--recipe",
        "demo_tiny",
        "--against",
        finished.undisturbed,
        "--measured",
        finished.undisturbed,
    ]
    done = finished.flows("plan", *arguments)
    for name in (each.work.stage for each in make_plan("demo_tiny").stages):
        assert name in done.stdout
    assert "plan against actual" in done.stdout and "its own rate" in done.stdout
    assert "models/flops" in done.stdout or "tasks/plan/networks.py" in done.stdout
