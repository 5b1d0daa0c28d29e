"""Trainees of stages with each switch of docs/training.md on, some ten thousand weights each, and what trains them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load
from torch import Tensor

from configs import Recipe, load_recipe
from infra.device import group_of_one
from tasks import train_dit, tune_fewstep
from tasks.loading.loader import Batch
from tasks.stage import Context
from tasks.training import launch
from tasks.training.loop import fit
from tasks.training.stage import TrainedStage
from tasks.training.trainee import Trainee
from tests.helpers.builders import at, context, put_networks
from tests.helpers.piles import put_latents
from tests.helpers.toy_training import Interrupted, begin_worker, start_workers

BATCH, STEPS = 8, 12
LATENTS, MAPS = "train_dit", "tune_fewstep"
NONE, FEWSTEP = "none", "few-step tuning"

_COMMON = (
    "train_dit.model={hidden_size: 32, depth: 4, heads: 2, align_depth: 1, align_hidden: 16}",
    f"train_dit.images={STEPS * BATCH}",
    f"train_dit.batch={BATCH}",
    f"train_dit.warmup_images={2 * BATCH}",
    "train_dit.ema_decay=0.8",
    "compute.train={workers: 1, cpus_per_worker: 1, engine: plain, zero_stage: 0}",
    f"compute.train.checkpoint_every={4 * BATCH}",
    f"compute.train.log_every={BATCH}",
)
_ROUTED = "train_dit.routing={first: 2, last: 3, drop: 0.5, dense_share: 0.25}"
_UNTIL = f"train_dit.objective.align_until={6 * BATCH}"
_CONTRASTIVE = "train_dit.objective.contrastive_weight=0.05"
_RESIDUAL = "train_dit.model.value_residual=true"
_MUON = "train_dit.optimizer=muon"
_AVERAGES = f"train_dit.start_from_average_at=[{3 * BATCH}, {8 * BATCH}]"

SWITCHES: dict[str, tuple[str, ...]] = {
    NONE: (),
    "muon": (_MUON,),
    # With many labels dropped: that is how the routed pass without a label, a guide, is trained.
    "routing": (_ROUTED, "train_dit.objective.label_dropout=0.5"),
    "routing in a cascade": (_ROUTED, "train_dit.cascade={sides: [2, 4], condition_dropout: 0.3}"),
    "value residual": (_RESIDUAL,),
    "alignment that stops": (_UNTIL,),
    "contrastive": (_CONTRASTIVE,),
    "starts from averages": (_AVERAGES,),
    "together": (_MUON, _ROUTED, _RESIDUAL, _UNTIL, _CONTRASTIVE, _AVERAGES),
    FEWSTEP: (
        f"tune_fewstep={{images: {STEPS * BATCH}, batch: {BATCH}, learning_rate: 0.001, ema_decay: 0.8, "
        "steps: 4, guidance: {method: classifier_free, scale: 2.0}}",
        "sample.guidance={method: none}",
        "sample.steps=2",
    ),
}
MATRICES_WHOLE = frozenset(name for name, switches in SWITCHES.items() if _MUON in switches)
"""What no ZeRO stage takes: it would cut matrices."""


@dataclass(frozen=True)
class Run:
    """One call of `fit` in all workers, for as long as it lives."""

    switch: str
    place: str
    """Runs of one switch and place go on from each other's checkpoints."""
    compute: tuple[str, ...] = ()
    section: tuple[str, ...] = ()
    """`field=value` of the stage's section."""
    killed_at: int | None = None
    """Steps after which it dies."""
    broken: int | None = None
    """The step whose first image is no number."""


def put_inputs(folder: Path) -> None:
    """What all runs begin with: latents with targets to align with, and a trained network for its map."""
    recipe = recipe_of(Run(NONE, ""))
    side, groups = recipe.latent_size, recipe.channel_groups
    assert recipe.foundation is not None
    shapes = {"z": (groups["texture"], side, side), "s": (groups["semantic"], side, side)}
    shapes["f"] = (recipe.foundation.feature_dim, side, side)
    put_latents(at(folder / LATENTS), (40, 32), shapes)
    torch.manual_seed(0)
    put_networks(at(folder / MAPS), recipe)


def recipe_of(run: Run) -> Recipe:
    own = [f"{_stage(run).name}.{change}" for change in run.section]
    return load_recipe("demo_tiny", [*_COMMON, *SWITCHES[run.switch], *own, *run.compute])


def train_here(folder: Path, runs: Sequence[Run]) -> None:
    """In this process, as one worker."""
    torch.set_num_threads(1)
    group_of_one(torch.device("cpu"))
    try:
        for run in runs:
            _perform(run, folder)
    finally:
        dist.destroy_process_group()


def train(world: int, folder: Path, runs: Sequence[Run]) -> None:
    """In `world` gloo workers."""
    start_workers(world, str(folder), list(runs), _worker)


def trained(folder: Path, run: Run) -> dict[str, Tensor]:
    """Weights and averages at the end, by file and name."""
    made = _context(folder, run)
    files = {name: load(made.out.read_bytes(f"{name}.safetensors")) for name in ("model", "ema")}
    return {f"{file}/{name}": value for file, found in files.items() for name, value in found.items()}


def _worker(rank: int, world: int, port: int, folder: str, runs: list[Run]) -> None:
    begin_worker(rank, world, port)
    for run in runs:
        _perform(run, Path(folder))
    dist.destroy_process_group()


def _perform(run: Run, folder: Path) -> None:
    made = _context(folder, run)
    with suppress(Interrupted):
        fit(lambda: _disturbed(launch.build(made), run), launch._setting(made))
    dist.barrier()


def _disturbed(trainee: Trainee, run: Run) -> Trainee:
    whole = trainee.inputs

    def inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
        if run.killed_at is not None and batch.images_seen > run.killed_at * BATCH:
            raise Interrupted
        given = whole(batch, device)
        if run.broken is not None and run.broken * BATCH in batch.positions:
            latents = "x_BCHW" if run.switch == FEWSTEP else "x1_BCHW"
            given[latents] = given[latents] * torch.nan
        return given

    trainee.inputs = inputs  # type: ignore[method-assign]
    return trainee


def _context(folder: Path, run: Run) -> Context:
    stage = _stage(run)
    needed = "encode" if stage is train_dit.STAGE else "train_dit"
    job = context(at(folder / stage.name), recipe_of(run), stage, needed).job
    return Context(replace(job, fingerprint=f"{run.switch} {run.place}".replace(" ", "-")))


def _stage(run: Run) -> TrainedStage:
    return tune_fewstep.STAGE if run.switch == FEWSTEP else train_dit.STAGE
