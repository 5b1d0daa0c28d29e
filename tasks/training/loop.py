"""The training loop, one for all trained stages. What differs is a :class:`Trainee`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from configs.compute import TrainCompute
from infra import logs
from infra.attention import fastest_attention
from infra.compiled import keep_compiled
from infra.metrics import count
from infra.storage import Storage
from models.execution import has_blocks, prepare
from tasks.loading.loader import Loader
from tasks.randomness import ImageNumbers
from tasks.training.adversary import AdversarialTraining
from tasks.training.callbacks import Asked, Callback, KeptAverages, Pictures, Scores, Snapshots, StepSpan
from tasks.training.checkpoints import Checkpoint, Checkpoints
from tasks.training.device_feed import Feed
from tasks.training.ema import averages
from tasks.training.engine import Split, build_engine
from tasks.training.guard import Guard, Rewind
from tasks.training.metrics import Curves, Metrics
from tasks.training.profiling import Profiler
from tasks.training.requests import Left, Requests
from tasks.training.schedule import learning_rate
from tasks.training.state import ADVERSARY, WEIGHTS, State, check
from tasks.training.trainee import Preview, Trainee
from tasks.training.validation import Validation


class Finished(Protocol):
    """What rank 0 does with the end.

    end, best: of the last step and of the best validation score, where there was one; tensors by part (`weights`,
        `ema`, …) and name of the module's parameters.
    """

    def __call__(self, end: Checkpoint, best: Checkpoint | None, curves: Curves) -> None: ...


@dataclass(frozen=True)
class Setting:
    """Where and how one worker trains; all but the device alike in all workers."""

    out: Storage
    compute: TrainCompute
    device: torch.device
    metrics: Metrics
    finished: Finished
    stamp: Callable[[Trainee], Callable[[bytes, str], bytes]] = lambda trainee: lambda data, name: data
    """What files of the artifact that are stored meanwhile say of themselves."""
    warned: Callable[[], bool] = lambda: False
    """Whether this worker's machine is about to be taken away."""
    held_out: Callable[[Trainee], Loader] = lambda trainee: trainee.held_out()
    preview: Callable[[Trainee], Preview] | None = None


def fit(trainee: Callable[[], Trainee], setting: Setting) -> None:
    """One worker from start to end, in the process group that is already there.

    Started again after any failure, it goes on from the newest whole checkpoint in `setting.out`; the rest is as if
    nothing had happened.

    Raises:
        UserError: the guard gives up, or a checkpoint was made for other data.
        Left: training saved and left, as it was asked to.
    """
    guard = Guard()
    while True:
        try:
            with fastest_attention(setting.device):
                return _train(trainee(), setting, guard)
        except Rewind as rewind:
            guard = rewind.guard


def _train(trainee: Trainee, setting: Setting, guard: Guard) -> None:
    # Set up
    section, compute, device, metrics = trainee.section, setting.compute, setting.device, setting.metrics
    rank, world = dist.get_rank(), dist.get_world_size()
    checkpoints = Checkpoints(setting.out, compute.keep_checkpoints, compute.keep_every, setting.stamp(trainee))
    module, adversary = trainee.module.to(device).train(), trainee.adversary
    found = checkpoints.newest()
    if found is not None:
        check(found, trainee.facts, setting.out)
        module.load_state_dict(found.tensors[WEIGHTS], strict=False)
        if adversary is not None:
            adversary.module.load_state_dict(found.tensors[ADVERSARY + WEIGHTS])
    if compute.compile:
        keep_compiled()
    prepare(
        trainee.network,
        tell=logs.say if rank == 0 else lambda _line: None,
        compile=compute.compile,
        checkpoint_activations=compute.recompute and has_blocks(trainee.network),
        channels_last=compute.channels_last and (compute.compile or device.type != "cuda"),
    )
    engine = build_engine(module, section, compute, device)
    split = Split.of(section.batch, world, compute.micro_batch)
    emas = averages(section, engine.local())
    state, advance = State(trainee, engine, emas, guard, metrics), engine.advance
    if adversary is not None:
        both = AdversarialTraining(engine, adversary, section, compute, device)
        state.adversary, advance = both.engine, both.advance
    profiler = Profiler(setting.out, metrics.sender) if rank == 0 else None
    callbacks = _callbacks(trainee, setting, checkpoints, profiler)
    images_seen = 0

    # Resume
    metrics.resume(0, {})  # also where the guard went back to the beginning
    if found is not None:
        images_seen = found.images_seen
        state.restore(found)
        if rank == 0:
            count("latentforge_retries", 1, what=metrics.stage)
            logs.say(f"going on from the checkpoint at {images_seen:,} images", images=images_seen)

    # Train
    batches = trainee.loader.stream(images_seen, rank, world)
    stream, dropout = Feed(trainee, batches, split.micro, device), ImageNumbers(section.seed, "dropout")
    since_looked = 0
    now = StepSpan(images_seen, images_seen, section.images)
    metrics.begin()
    try:
        while not (now.last or now.stop or now.leave):
            here = next(stream)
            before, images_seen = images_seen, here.batch.images_seen
            if before not in guard.left_out:
                rate = learning_rate(section, before)
                for group in engine.optimizer.param_groups:
                    group["lr"] = rate
                terms = []
                for first, inputs in zip(here.batch.positions[:: split.micro], here.inputs, strict=True):
                    torch.manual_seed(dropout.seed(first))  # what layers draw is no state to keep either
                    terms.append(advance(inputs))
                for ema in emas.values():
                    ema.update(before, images_seen, engine.optimizer.bad)
                guard.watch(before, engine.optimizer.event)
                metrics.step(images_seen, section.batch, terms, engine.optimizer.figures(), rate, here.waited)
            if images_seen in section.start_from_average_at:
                state.take_average()
            if profiler is not None:
                profiler.step(images_seen)

            # Look, now and then: only here is anything read from the device, and all workers do so together
            now = StepSpan(before, images_seen, section.images)
            now.save = now.passed(compute.checkpoint_every) and not now.last
            since_looked += section.batch
            due = [callback for callback in callbacks if now.passed(callback.every)]
            asked = now.save or now.last or any(callback.every for callback in due)
            if asked or since_looked >= compute.log_every:
                since_looked = 0
                guard.look(section.guard, trainee.loader)
                for callback in due:
                    callback(now, state)
                if now.save and (kept := state.gather(images_seen)) is not None:
                    checkpoints.save(kept, state.best_at)
    finally:
        stream.close()
        batches.close()
        metrics.finish()
        checkpoints.wait()
    if now.leave and not now.last:
        dist.barrier()
        raise Left(f"saved at {images_seen:,} images and left, as it was asked to; the next run goes on from there")

    # Finish
    if (end := state.gather(images_seen, moments=False)) is not None:
        setting.finished(end, checkpoints.at(state.best_at), metrics.curves)
    dist.barrier()


def _callbacks(
    trainee: Trainee, setting: Setting, checkpoints: Checkpoints, profiler: Profiler | None
) -> list[Callback]:
    """What the recipe asks for beside training; requests last, so that what they save is complete."""
    section, compute = trainee.section, setting.compute
    found: list[Callback] = []
    if section.validation is not None:
        micro = Split.of(section.batch, dist.get_world_size(), compute.micro_batch).micro
        validation = Validation(section.validation.images, setting.held_out(trainee), micro, setting.device)
        found.append(Scores(validation, section.validation))
    if setting.preview is not None and compute.preview_every is not None:
        found.append(Pictures(setting.preview(trainee), compute.preview_every))
    if section.snapshot_every is not None:
        found.append(Snapshots(checkpoints, section.snapshot_every, section.ema_sigmas))
    if section.keep_averages_at:
        found.append(KeptAverages(checkpoints, section.keep_averages_at))
    requests = Requests(setting.out, setting.device, setting.warned)
    return [*found, Asked(requests, profiler, compute.profile_at)]
