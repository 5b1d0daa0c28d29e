"""The project's whole loop on the device: does it hold, is it the same twice, is it ever left waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.records import Records
from benchmarks.gpu.steps import Step, context_of, recipe_of
from benchmarks.gpu.training import COMPILED, EAGER, SFD, XL
from benchmarks.train_step import latents
from configs import Recipe
from infra.device import set_determinism, set_precision
from infra.tracking import Tracker
from tasks.train_dit import Diffusion
from tasks.training.device_feed import Feed
from tasks.training.guard import Guard
from tasks.training.loop import Setting, fit
from tasks.training.metrics import Metrics
from tasks.training.state import State


def stability(records: Records, scratch: str) -> None:
    """The loop on B/1; whether two runs, or a resumed one, end in the same bits; how long a checkpoint takes."""
    set_precision("bf16")

    def loop() -> None:
        batch, steps = (4, 6) if records.small else (128, 300)
        size = () if records.small else ("train_dit.model.size=B",)
        recipe = recipe_of(XL, batch, batch * steps, records.small, COMPILED, "train_dit.warmup_images=0", *size)
        _, points = trained(records, recipe, f"{scratch}/loop")
        records.figure("stability/finite", sum(points["left_out"]))
        records.figure("stability/loop", median(points["images_per_second"]))
        records.figure("stability/wait", 100 * median(points["data_wait_share"]))
        losses = points["loss/total"]
        records.note("stability/loop", first_loss=losses[0], last_loss=losses[-1])

    spent: dict[bool, float] = {}

    def twice(deterministic: bool) -> None:
        suffix = "_deterministic" if deterministic else ""
        few, count = (4, 4) if records.small else (32, 40)
        size = () if records.small else ("train_dit.model.size=S",)
        recipe = recipe_of(XL, few, few * count, records.small, EAGER, *size)
        compute = recipe.compute.train.model_copy(update={"checkpoint_every": few * count // 2})
        recipe = recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"train": compute})})
        with _determinism(deterministic):
            began = time.monotonic()
            one, _ = trained(records, recipe, f"{scratch}/one{suffix}")
            spent[deterministic] = time.monotonic() - began
            two, _ = trained(records, recipe, f"{scratch}/two{suffix}")
            with suppress(_Stopped):
                trained(records, recipe, f"{scratch}/cut{suffix}", few * count * 3 // 4)
            cut, _ = trained(records, recipe, f"{scratch}/cut{suffix}")
        records.figure(f"stability/twice{suffix}", _gap(one, two))
        records.figure(f"stability/resumed{suffix}", _gap(one, cut))
        if len(spent) == 2:
            records.figure("stability/price", spent[True] / spent[False])

    def checkpoint() -> None:
        batch = 4 if records.small else 32
        step = Step(recipe_of(XL, batch, 64 * batch, records.small, EAGER), f"{scratch}/kept", records.device, batch)
        step()
        metrics = Metrics("train_dit", 1, 1, Tracker(), records.device)
        state = State(step.trainee, step.engine, step.averages, Guard(), metrics)
        records.sync()
        began = time.perf_counter()
        kept = state.gather(batch)
        seconds = time.perf_counter() - began
        assert kept is not None
        size = sum(each.nbytes for part in kept.tensors.values() for each in part.values())
        records.figure("stability/checkpoint", seconds)
        records.note("stability/checkpoint", gb=size / 1e9, gb_s=size / seconds / 1e9)

    records.attempt("stability/loop", loop)
    records.attempt("stability/twice", lambda: twice(False), 10)
    records.attempt("stability/twice_deterministic", lambda: twice(True), 10)
    records.attempt("stability/checkpoint", checkpoint, 10)


def loading(records: Records, scratch: str) -> None:
    """Rows into the device: the loader alone, with the inputs of a step, and as the loop is fed."""

    def fed(name: str) -> None:
        rows, batch = (64, 8) if records.small else (4096, 512) if name == XL else (1024, 128)
        recipe = recipe_of(name, batch, 64 * batch, True)  # the network is not asked
        root = f"{scratch}/fed_{name}"
        latents(recipe, root, rows)
        trainee = Diffusion(context_of(recipe, root, "run"))
        short = name.partition("_")[0]
        for way in ("loader", "inputs", "feed"):
            batches = trainee.loader.stream(0, 0, 1)
            feed = Feed(trainee, batches, batch, records.device, ahead=True) if way == "feed" else None
            try:
                speed = _speed(records, trainee, feed or batches, batch, 2 + rows // batch, way == "inputs")
            finally:
                if feed is not None:
                    feed.close()
                batches.close()  # type: ignore[attr-defined]
            records.note(f"loading/{short}", way=way, images_s=round(speed))
            if way == "feed":
                records.figure(f"loading/{short}", speed)

    for name in (XL, SFD):
        records.attempt(f"loading/{name.partition('_')[0]}", lambda name=name: fed(name), 8)


def _speed(records: Records, trainee: Diffusion, source: Iterator[Any], batch: int, warm: int, inputs: bool) -> float:
    """Images a second; the first epoch, which checks every page, is left out."""
    for _ in range(warm):
        next(source)
    records.sync()
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < (0.3 if records.small else 2.0):
        given = next(source)
        if inputs:
            trainee.inputs(given, records.device)
        images += batch
    records.sync()
    return images / (time.perf_counter() - began)


@dataclass(frozen=True)
class _Notes(Tracker):
    """Keeps what is tracked."""

    points: dict[str, list[float]] = field(default_factory=dict)

    def series(self, points: list[tuple[str, float, int]]) -> None:
        for name, value, _ in points:
            self.points.setdefault(name, []).append(value)


class _Stopped(Exception):
    """Stands for a worker that dies."""


def trained(
    records: Records, recipe: Recipe, root: str, stop_at: int | None = None, made_before: bool = False
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Final weights (averaged ones where there are some) and tracked figures of a training through the project's
    whole loop; it dies at the first batch beyond `stop_at` images.

    made_before: the latents are there; else they are random ones.
    """
    if not made_before:
        latents(recipe, root, max(64, recipe.train_dit.batch))
    context, notes, kept = context_of(recipe, root, "run"), _Notes(), dict[str, Any]()
    section = recipe.train_dit
    metrics = Metrics("train_dit", section.images, section.batch, notes, records.device)

    def finished(end: Any, best: Any, curves: Any) -> None:
        kept.update(end.tensors["weights"] | end.tensors.get("ema", {}))

    def made() -> Diffusion:
        torch.manual_seed(0)
        trainee = Diffusion(context)
        usual = trainee.inputs

        def inputs(batch: Any, device: torch.device) -> dict[str, Any]:
            if stop_at is not None and batch.images_seen > stop_at:
                raise _Stopped
            return usual(batch, device)

        trainee.inputs = inputs  # type: ignore[method-assign]
        return trainee

    with (records.folder / "loop.log").open("a") as log, redirect_stdout(log):
        fit(made, Setting(context.out, recipe.compute.train, records.device, metrics, finished))
    return kept, notes.points


def _gap(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    set_determinism(wanted)
    try:
        yield
    finally:
        set_determinism(False)
