"""Training steps of the published networks, compiled and not, beside a plain loop."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.kernels import kernels
from benchmarks.gpu.records import Left, Records
from benchmarks.gpu.steps import OnlineStep, PlainStep, Sizes, Step, recipe_of
from configs import Recipe
from infra.device import set_precision
from models.foundation import FoundationModel
from models.layers import RMSNorm
from models.lightningdit import LightningDiT
from tasks.networks import build_network
from tasks.training.metrics import peak_flops

XL, SFD = "lightningdit_xl_64ep", "sfd_xl_80ep"
COMPILED, EAGER = "compute.train.compile=true", "compute.train.compile=false"


def training(records: Records, scratch: str) -> None:
    """Steps of LightningDiT-XL, SFD-XL and LightningDiT-B, and what each choice of a step is worth."""
    batch, device, small = (8 if records.small else 128), records.device, records.small
    less = batch // 4
    set_precision("bf16")
    given: dict[str, Any] = {}
    losses: dict[str, float] = {}

    def step_of(name: str, images: int, *changes: str) -> Step:
        recipe = recipe_of(name, images, 64 * images, small, *changes)
        return Step(recipe, f"{scratch}/{name}{images}{len(changes)}", device, 2 * images)

    def measured(name: str, step: Step, images: int, times: int = 8) -> float:
        first = records.first(step)
        speed = images / records.steady(step, times)
        records.figure(f"training/{name}", speed)
        records.note(f"training/{name}", first_s=round(first, 1), gb=round(records.peak_gb(), 1))
        return speed

    def compiled() -> None:
        step = step_of(XL, batch, COMPILED)
        speed = measured("xl", step, batch)
        losses["float32"] = step.loss()
        if (peak := peak_flops(device)) is not None:
            records.figure("training/xl_mfu", 100 * speed * step.flops / peak)
        if records.cuda:
            records.figure("training/xl_memory", records.peak_gb())
        places = records.waits(step)
        records.note("training/waits", places=places)
        records.figure("training/xl_waits", len(places))
        given.update(step.given)
        found = kernels(records, step)
        records.note("training/kernels", launches=found["launches"], **_rounded(found["kinds"]))
        for name, spent, count in found["longest"]:
            records.note("training/kernel", what=name, ms=round(spent, 3), launches=count)
        optimizer = step.engine.optimizer
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        parts = {"guard_and_adamw": records.seconds(optimizer.step) * 1e3}
        parts["averages"] = records.seconds(lambda: step.average()) * 1e3
        records.note("training/parts_ms", **_rounded(parts))

    def plain() -> None:
        if not given:
            raise Left("there is no step of ours to compare with")
        recipe = recipe_of(XL, batch, 64 * batch, small, COMPILED)
        step = PlainStep(recipe, given, device, sizes_of(recipe))
        speed = batch / records.steady(step, 8)
        records.figure("training/against_plain", records.figures["training/xl"] / speed)
        records.note("training/plain_kernels", **_rounded(kernels(records, step)["kinds"]))

    def few() -> None:
        measured("xl_32", step_of(XL, less, COMPILED), less)

    def eager() -> None:
        step = step_of(XL, less, EAGER)
        measured("xl_eager", step, less, 6)
        records.note("training/eager_kernels", **_rounded(kernels(records, step, 2)["kinds"]))

    def online() -> None:
        part = batch // 2  # whose stored targets of 400 KB a row still fit into a minute
        sfd = recipe_of(SFD, part, 64 * part, small, COMPILED)
        assert sfd.foundation is not None
        section = sfd.foundation
        foundation = FoundationModel(section.name, input_size=section.input_size).to(device).eval()
        step = OnlineStep(sfd, f"{scratch}/sfd", device, part, foundation)
        measured("sfd", step, part, 6)

    def base() -> None:
        changes = () if small else ("train_dit.model.size=B",)
        measured("b", step_of(XL, batch, COMPILED, *changes), batch)

    def half_stream() -> None:
        """Ours with tokens in bfloat16 from the first block on, and norms in torch's own kernel."""
        with _half_stream():
            step = step_of(XL, batch, COMPILED, "train_dit.seed=0")
            speed = measured("half_stream", step, batch)
        losses["bfloat16"] = step.loss()
        if "training/xl" in records.figures:
            records.figure("training/half_stream_gain", speed / records.figures["training/xl"])
        records.note("training/half_stream_loss", **losses)

    def accumulated() -> None:
        step = step_of(XL, batch, COMPILED, f"compute.train.micro_batch={less}")
        whole = step.given
        count = batch // less
        parts = [{k: v[n::count] if isinstance(v, Tensor) else v for k, v in whole.items()} for n in range(count)]

        def once() -> None:
            for step.given in parts:
                step.engine.advance(step.given)
            step.average()

        records.first(once)
        records.figure("training/accumulated", batch / records.steady(once, 4, 1))

    def recomputed() -> None:
        step = step_of(XL, batch, COMPILED, "compute.train.recompute=true")
        measured("recomputed", step, batch, 5)

    for name, run, need in (
        ("xl", compiled, 0.0), ("against_plain", plain, 25.0), ("xl_eager", eager, 15.0),
        ("sfd", online, 30.0), ("b", base, 15.0), ("half_stream", half_stream, 20.0),
        ("xl_32", few, 10.0), ("accumulated", accumulated, 15.0), ("recomputed", recomputed, 25.0),
    ):  # fmt: skip
        records.attempt(f"training/{name}", run, need)


def start(records: Records, scratch: str) -> None:
    """XL in a new process up to its first step, with the graphs that this run has compiled."""

    def again() -> None:
        batch = 8 if records.small else 128
        recipe = recipe_of(XL, batch, 64 * batch, records.small, COMPILED)
        (Path(scratch.removeprefix("file://")) / "recipe.json").write_text(recipe.model_dump_json())
        line = [sys.executable, "-m", "benchmarks.gpu.first_step", scratch, str(records.device)]
        began = time.monotonic()
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-300:])
        seconds = json.loads(done.stdout.splitlines()[-1])
        records.note("start/parts", whole_s=round(time.monotonic() - began, 1), **seconds)
        records.figure("start/first_step", seconds["first_step"])

    records.attempt("start/first_step", again, 20)


def zero(records: Records, scratch: str) -> None:
    """The same step in DeepSpeed, which one GPU does not need: what its engine costs."""
    if importlib.util.find_spec("deepspeed") is None:
        raise Left("No module named 'deepspeed'")
    batch = 4 if records.small else 32
    set_precision("bf16")

    def stage(number: int) -> None:
        recipe = recipe_of(
            XL, batch, 64 * batch, records.small, EAGER,
            "compute.train.engine=deepspeed", f"compute.train.zero_stage={number}",
        )  # fmt: skip
        step = Step(recipe, f"{scratch}/zero", records.device, 2 * batch)
        records.figure(f"zero/{number}", batch / records.steady(step, 4, 2))
        records.note(f"zero/{number}_waits", places=records.waits(step))

    for number in (0, 1, 2):
        records.attempt(f"zero/{number}", lambda number=number: stage(number), 10)


def sizes_of(recipe: Recipe) -> Sizes:
    """Of the recipe's network."""
    with torch.device("meta"):
        network: Any = build_network(recipe, recipe.train_dit.model)
    return network.hidden_size, len(network.blocks), network.blocks[0].attn.num_heads


@contextmanager
def _half_stream() -> Iterator[None]:
    """What the recipes would gain or lose by tokens in half precision; no recipe does so."""
    kept: tuple[Any, Any] = RMSNorm.forward, LightningDiT._through_blocks

    def norm(self: RMSNorm, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

    def through(self: LightningDiT, x_BND: Tensor, *given: Any) -> Any:
        return kept[1](self, x_BND.to(torch.bfloat16), *given)

    RMSNorm.forward, LightningDiT._through_blocks = norm, through  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        RMSNorm.forward, LightningDiT._through_blocks = kept  # type: ignore[method-assign]


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.3g}") for name, value in values.items()}
