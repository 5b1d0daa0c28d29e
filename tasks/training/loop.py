"""The training loop, one for all trained stages. What differs is a :class:`Trainee`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from importlib import import_module
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save as to_safetensors
from torch import nn

from configs.errors import UserError
from configs.schema import Training
from infra.storage import Storage
from tasks.loader import Batch, Loader
from tasks.networks import EMA_WEIGHTS, WEIGHTS, default_device
from tasks.stage import Context, Job
from tasks.training import checkpoints
from tasks.training.ema import Ema
from tasks.training.engine import build_engine, build_optimizer, deepspeed_config
from tasks.training.metrics import Metrics
from tasks.training.schedule import learning_rate

RESULT = "result.json"


class Trainee(Protocol):
    """What one stage trains. Built alike in every worker, its initial weights from the seed alone."""

    section: Training
    module: nn.Module
    """Called as `module(**inputs)`; gives named scalars, of which `total` is minimised."""
    network: nn.Module
    """The part of it that is kept and averaged."""
    loader: Loader
    facts: dict[str, Any]
    """Goes into checkpoints, where another value is refused, and into the manifest."""

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """A worker's slice of a batch as arguments of `module`, on the device."""
        ...

    def scores(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        """Figures of the finished network for people."""
        ...


def build(context: Context) -> Trainee:
    """The trainee of the job's stage, with the initial weights that its seed says."""
    stage = import_module(f"tasks.{context.job.stage}")
    torch.manual_seed(stage.section(context.recipe).seed)
    trainee: Trainee = stage.trainee(context)
    return trainee


def work(config: dict[str, Any]) -> None:
    """One worker from start to end. Restarted after a failure, it goes on from the newest checkpoint."""
    # Set up
    context = Context(Job(**config["job"]))
    compute = context.recipe.compute.train
    rank, world = dist.get_rank(), dist.get_world_size()
    device = default_device()
    if device.type == "cpu":
        torch.set_num_threads(compute.cpus_per_worker)
    trainee = build(context)
    section = trainee.section
    trainee.module.to(device).train()
    optimizer = build_optimizer(trainee.module, section, device)
    settings = deepspeed_config(section, compute, world)
    engine = build_engine(trainee.module, optimizer, settings)
    ema = Ema(trainee.network, section.ema_decay) if section.ema_decay is not None else None
    metrics = (
        Metrics(context.job.stage, section.images, compute.log_every, context.tracker, device) if rank == 0 else None
    )
    images_seen = 0

    # Resume
    state = checkpoints.restore(engine, context.out)
    if state is not None:
        _check(state, trainee, context.out)
        images_seen = state["images_seen"]
        if metrics is not None:
            metrics.resume(images_seen, state["curves"])
        if ema is not None:
            ema.load(state["ema"])

    # Train
    micro, accumulation = settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]
    stream = trainee.loader.stream(images_seen, rank, world)
    due = images_seen + compute.checkpoint_every
    while images_seen < section.images:
        asked = time.monotonic()
        batch = next(stream)
        waited = time.monotonic() - asked
        rate = learning_rate(section, images_seen)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for part in range(accumulation):
            terms = engine(**trainee.inputs(_rows(batch, part * micro, micro), device))
            engine.backward(terms["total"])
            engine.step()
        if ema is not None:
            ema.update()
        images_seen = batch.images_seen
        if metrics is not None:
            metrics.step(images_seen, section.batch, terms, rate, waited)
        if images_seen >= due and images_seen < section.images:
            due = images_seen + compute.checkpoint_every
            kept = {
                "images_seen": images_seen,
                "facts": trainee.facts,
                "curves": metrics.curves if metrics is not None else {},
                "ema": ema.state() if ema is not None else {},
            }
            checkpoints.save(engine, context.out, images_seen, kept, compute.keep_checkpoints)

    # Finish
    stream.close()  # type: ignore[attr-defined]  # a generator
    if metrics is not None:
        metrics.flush()
        export(context, trainee, ema, metrics.curves, device)
    dist.barrier()


def export(
    context: Context, trainee: Trainee, ema: Ema | None, curves: dict[str, list[list[float]]], device: torch.device
) -> None:
    """Write weights, scores and facts to storage; `result.json` last."""
    files = [_write(context.out, WEIGHTS, trainee.network)]
    if ema is not None:
        trainee.network.load_state_dict(ema.state(), strict=False)
        files.append(_write(context.out, EMA_WEIGHTS, trainee.network))
    trainee.network.to(device).eval()
    with torch.no_grad():
        scores = trainee.scores(trainee.network, device)
    scores |= {f"final/{name}": points[-1][1] for name, points in curves.items() if points}
    result = {
        "files": [asdict(entry) for entry in files],
        "scores": scores,
        "facts": {**trainee.facts, "curves": curves},
    }
    context.out.write_bytes(RESULT, json.dumps(result).encode())


def _write(out: Storage, name: str, network: nn.Module) -> Any:
    tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    return out.write_bytes(name, to_safetensors(tensors))


def _rows(batch: Batch, start: int, count: int) -> Batch:
    """One accumulation step's rows of a worker's slice."""
    if count == len(batch.positions):
        return batch
    part = slice(start, start + count)
    arrays = {name: values[part] for name, values in batch.arrays.items()}
    return Batch(batch.images_seen, batch.positions[part], batch.keys[part], batch.labels[part], arrays)


def _check(state: dict[str, Any], trainee: Trainee, out: Storage) -> None:
    if state["facts"] != trainee.facts:
        raise UserError(
            f"the checkpoint in {out.url} was trained on other data ({state['facts']}, now {trainee.facts}): "
            f"delete {out.url}/{checkpoints.FOLDER} to begin anew"
        )
