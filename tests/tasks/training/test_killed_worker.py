"""A training worker that is killed: Ray Train starts it again, and nobody can tell from the weights."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch.distributed as dist

from configs import Recipe
from infra.artifacts import Artifact
from tasks.data.statistics import ChannelSums, statistics_hash
from tasks.data.tensors import WRITE_OPTIONS, latent_table
from tasks.networks import EMA_WEIGHTS, WEIGHTS
from tasks.train_dit import STAGE
from tasks.training import launch, requests
from tasks.training.loop import fit
from tests.helpers.builders import at, context, put, small_recipe
from tests.helpers.toy_training import begin_worker, start_workers

ROWS, ROWS_PER_GROUP = 96, 16


def put_latents(root: str, recipe: Recipe) -> Artifact:
    """An `encode` artifact of random latents, in its real format."""
    random = np.random.default_rng(0)
    side, groups = recipe.latent_size, recipe.channel_groups
    shapes = {"z": (groups["texture"], side, side), "s": (groups["semantic"], side, side)}
    columns = {name: random.normal(size=(ROWS, *shape)).astype(np.float16) for name, shape in shapes.items()}
    table = latent_table([str(row) for row in range(ROWS)], np.arange(ROWS) % recipe.data.classes, columns)
    place = Artifact(root, "encode", "encode").storage
    entry = place.write_table("train/part-00000.parquet", table, ROWS_PER_GROUP, **WRITE_OPTIONS)
    statistics = {name: ChannelSums.of(values).mean_and_std() for name, values in columns.items()}
    facts = {
        "statistics": statistics,
        "statistics_hash": statistics_hash(statistics),
        "shapes": shapes,
        "rows_per_group": ROWS_PER_GROUP,
    }
    return put(root, recipe, "encode", [entry], facts=facts)


def _undisturbed(rank: int, world: int, port: int, root: str, recipe: Recipe) -> None:
    """A worker as Ray Train's are, without Ray, which takes longer to start than they to train."""
    begin_worker(rank, world, port)
    made = context(root, recipe, STAGE, "encode")
    fit(lambda: launch.build(made), launch._setting(made))
    dist.destroy_process_group()


def test_training_survives_a_killed_worker(tmp_path: Path, local_ray: None) -> None:
    """To the same bits as training that nothing happened to, by workers of another start."""
    recipe = small_recipe("train_dit.images=1280", "compute.train.checkpoint_every=320", "compute.train.log_every=32")
    whole, root = at(tmp_path / "whole"), at(tmp_path / "root")
    for each in (whole, root):
        put_latents(each, recipe)
    start_workers(recipe.compute.train.workers, whole, recipe, _undisturbed)
    undisturbed = context(whole, recipe, STAGE, "encode").out
    weights = {name: undisturbed.read_bytes(name) for name in (WEIGHTS, EMA_WEIGHTS)}

    disturbed = context(root, recipe, STAGE, "encode")
    requests.ask(disturbed.out, requests.LEAVE)  # as an earlier attempt left it that did not live to see it
    victims: list[int] = []
    killer = threading.Thread(target=_kill_one_after_a_checkpoint, args=(tmp_path / "root", victims), daemon=True)
    killer.start()
    STAGE.run(disturbed)
    killer.join(timeout=5)
    assert victims, "no worker was killed: the training was over before its first checkpoint was seen"
    for name, expected in weights.items():
        assert disturbed.out.read_bytes(name) == expected, name


def _kill_one_after_a_checkpoint(root: Path, victims: list[int]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if list(root.glob("train_dit/*/checkpoints/*/complete.json")):
            workers = [child for child in psutil.Process().children(recursive=True) if _is_worker(child)]
            if workers:
                os.kill(workers[-1].pid, signal.SIGKILL)
                victims.append(workers[-1].pid)
                return
        time.sleep(0.01)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


@pytest.mark.parametrize("changed", [[0.5] * 8])
def test_other_statistics_are_refused(tmp_path: Path, changed: list[float]) -> None:
    from configs import UserError
    from tasks.training.launch import build

    recipe = small_recipe()
    root = at(tmp_path)
    facts = dict(put_latents(root, recipe).manifest.facts)
    facts["statistics"]["z"]["mean"] = changed
    place = Artifact(root, "encode", "encode")
    put(root, recipe, "encode", list(place.manifest.files), facts=facts)
    with pytest.raises(UserError, match="statistics"):
        build(context(root, recipe, STAGE, "encode"))
