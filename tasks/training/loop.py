"""The training loop, one for all trained stages. What differs is a :class:`Trainee`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import TrainCompute, Training
from infra.storage import Storage
from models.execution import prepare
from tasks.loader import Batch, Loader
from tasks.training.checkpoints import FOLDER, Checkpoint, Checkpoints
from tasks.training.ema import Ema
from tasks.training.engine import MOMENTS, Engine, Split, build_engine
from tasks.training.guard import Guard, Rewind
from tasks.training.metrics import Metrics
from tasks.training.schedule import learning_rate

Curves = dict[str, list[list[float]]]


class Trainee(Protocol):
    """What one stage trains. Built alike in every worker, its initial weights from the seed alone."""

    section: Training
    module: nn.Module
    """Called as `module(**inputs)`; gives named scalars, of which `total` is minimised."""
    network: nn.Module
    """The part of it that is kept."""
    loader: Loader
    facts: dict[str, Any]
    """Goes into checkpoints, where another value is refused, and into the manifest."""

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """A worker's slice of a batch as arguments of `module`, on the device."""
        ...

    def scores(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        """Figures of the finished network for people."""
        ...


class Finished(Protocol):
    """What rank 0 does with the end: whole weights and averages by name of the module's parameters."""

    def __call__(self, weights: dict[str, Tensor], averages: dict[str, Tensor] | None, curves: Curves) -> None: ...


def fit(
    trainee: Callable[[], Trainee],
    out: Storage,
    compute: TrainCompute,
    device: torch.device,
    metrics: Metrics | None,
    finished: Finished,
) -> None:
    """One worker from start to end, in the process group that is already there; `metrics` are rank 0's.

    Started again after any failure, it goes on from the newest whole checkpoint in `out`; the rest is as if nothing
    had happened. Raises UserError when the guard gives up or a checkpoint was made for other data.
    """
    guard = Guard()
    while True:
        try:
            return _train(trainee(), out, compute, device, metrics, finished, guard)
        except Rewind as rewind:
            guard = rewind.guard


def _train(
    trainee: Trainee,
    out: Storage,
    compute: TrainCompute,
    device: torch.device,
    metrics: Metrics | None,
    finished: Finished,
    guard: Guard,
) -> None:
    # Set up
    section, rank, world = trainee.section, dist.get_rank(), dist.get_world_size()
    checkpoints = Checkpoints(out, compute.keep_checkpoints, compute.keep_every)
    module = trainee.module.to(device).train()
    state = checkpoints.newest()
    if state is not None:
        _check(state, trainee, out)
        module.load_state_dict(state.tensors["weights"], strict=False)
    if hasattr(trainee.network, "blocks"):
        prepare(trainee.network, compile=compute.compile, checkpoint_activations=compute.recompute)
    engine = build_engine(module, section, compute, device)
    split = Split.of(section.batch, world, compute.micro_batch)
    ema = Ema(engine.live(), section.ema_decay) if section.ema_decay is not None else None
    images_seen = 0

    # Resume
    if state is not None:
        images_seen = state.images_seen
        _restore(state, engine, ema)
        guard.resume(state.values["left_out"])
        if metrics is not None:
            metrics.resume(images_seen, state.values["curves"])
            print(f"going on from the checkpoint at {images_seen:,} images", flush=True)

    # Train
    stream = trainee.loader.stream(images_seen, rank, world)
    since_looked = 0
    try:
        while images_seen < section.images:
            asked = time.monotonic()
            batch = next(stream)
            waited = time.monotonic() - asked
            before, images_seen = images_seen, batch.images_seen
            if before not in guard.left_out:
                rate = learning_rate(section, before)
                for group in engine.optimizer.param_groups:
                    group["lr"] = rate
                terms = [
                    engine.advance(trainee.inputs(_rows(batch, part * split.micro, split.micro), device))
                    for part in range(split.accumulation)
                ]
                if ema is not None:
                    ema.update(engine.optimizer.bad)
                guard.watch(before, engine.optimizer.bad)
                if metrics is not None:
                    metrics.step(images_seen, section.batch, terms, engine.optimizer.norm, rate, waited)
            saves = images_seen // compute.checkpoint_every > before // compute.checkpoint_every
            since_looked += section.batch
            if saves or since_looked >= compute.log_every or images_seen >= section.images:
                since_looked = 0
                guard.look(section.guard, trainee.loader)
            if saves and images_seen < section.images:
                kept = _gather(images_seen, trainee, engine, ema, guard, metrics)
                if kept is not None:
                    checkpoints.save(kept)
    finally:
        stream.close()  # type: ignore[attr-defined]  # a generator
        checkpoints.wait()

    # Finish
    end = _gather(images_seen, trainee, engine, ema, guard, metrics, moments=False)
    if end is not None and metrics is not None:
        metrics.flush()
        finished(dict(end.tensors["weights"]), _or_none(end.tensors.get("ema")), metrics.curves)
    dist.barrier()


def _gather(
    images_seen: int,
    trainee: Trainee,
    engine: Engine,
    ema: Ema | None,
    guard: Guard,
    metrics: Metrics | None,
    moments: bool = True,
) -> Checkpoint | None:
    """Everything that goes on, copied to rank 0's memory so that training need not wait for storage."""
    kept: dict[str, dict[str, Tensor]] = {"weights": {}}

    def keep(part: str, name: str, whole: Tensor) -> None:
        if metrics is not None:
            kept.setdefault(part, {})[name] = whole.detach().to("cpu", copy=True).contiguous()

    for name, live in engine.live().items():
        keep("weights", name, engine.whole(name, live.detach()))
        if ema is not None:
            keep("ema", name, engine.whole(name, ema.averages[name]))
    if moments:
        for moment, name, whole in engine.moments():
            keep(moment, name, whole)
    if metrics is None:
        return None
    for name, buffer in trainee.module.named_buffers():
        keep("weights", name, buffer)
    values = {
        "facts": trainee.facts,
        "curves": {name: list(points) for name, points in metrics.curves.items()},
        "left_out": sorted(guard.left_out),
        "optimizer": engine.optimizer.guard_state(),
    }
    return Checkpoint(images_seen, kept, values)


def _restore(state: Checkpoint, engine: Engine, ema: Ema | None) -> None:
    engine.load_moments({moment: state.tensors[moment] for moment in MOMENTS})
    engine.optimizer.load_guard_state(state.values["optimizer"])
    if ema is not None:
        ema.load({name: engine.part(name, whole) for name, whole in state.tensors["ema"].items()})


def _rows(batch: Batch, start: int, count: int) -> Batch:
    """One accumulation step's rows of a worker's slice."""
    if count == len(batch.positions):
        return batch
    part = slice(start, start + count)
    arrays = {name: values[part] for name, values in batch.arrays.items()}
    return replace(
        batch, positions=batch.positions[part], keys=batch.keys[part], labels=batch.labels[part], arrays=arrays
    )


def _check(state: Checkpoint, trainee: Trainee, out: Storage) -> None:
    if state.values["facts"] != trainee.facts:
        raise UserError(
            f"the checkpoint in {out.url} was trained on other data ({state.values['facts']}, now {trainee.facts}): "
            f"delete {out.url}/{FOLDER} to begin anew"
        )


def _or_none(tensors: Any) -> dict[str, Tensor] | None:
    return None if tensors is None else dict(tensors)
