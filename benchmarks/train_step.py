"""How fast a training step of `train_dit` is, and what our loop adds to it.

    python -m benchmarks.train_step [--recipe demo] [--only eager deepspeed] [--turns 16] [--peak-tflops X]
    python -m benchmarks.train_step --flops      # exact FLOPs per image of every recipe, nothing is trained

One worker's share of a recipe's batch, on synthetic latents that the real loader reads, through the real loop. The
loop takes turns with two others on the same device, a few steps each, so that all feel the same noise:

- `eager`, what anyone would write first: torch's AdamW as it comes, one moving average tensor by tensor, noise by
  `torch.randn`, data in memory, nothing compiled, nothing recomputed;
- `bare`, the same with our network settings and our kernels (compile or recompute, fused AdamW, our average).

`vs_eager` is eager's seconds over ours, `engine_overhead` the share of our step that bare does without: the loader,
random numbers that belong to images, accumulation, guard, metrics with a log line every turn, callbacks. Each is the
median over turns of a ratio within one turn. Both come as wall time and, where there is no accelerator, as CPU time
of the whole process, which neighbours disturb less. Saving is not in it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from configs import Recipe, load_recipe
from configs.load import recipe_names
from infra.artifacts import Artifact, Manifest
from infra.device import HALVES, default_device, group_of_one
from infra.storage import Storage
from infra.tracking import Tracker
from models.execution import prepare
from models.flops import training_flops_per_image
from tasks.data.statistics import ChannelSums, statistics_hash
from tasks.data.tensors import FLIP, WRITE_OPTIONS, latent_table
from tasks.loading.loader import Batch
from tasks.stage import Context, Job
from tasks.train_dit import Diffusion
from tasks.training.ema import averages
from tasks.training.flops import flops_per_image
from tasks.training.loop import Setting, fit
from tasks.training.metrics import Metrics, peak_flops

WARM_TURNS = 2
COLUMNS = {"texture": "z", "semantic": "s"}


def variants(recipe: Recipe, device: torch.device) -> dict[str, list[str]]:
    """Changes to the recipe by name; the first is measured first and gives the headline."""
    engine, quick = "compute.train.engine=", ["compute.train.compile=true"]
    found = {
        "eager": [engine + "plain"],
        "deepspeed": [engine + "deepspeed"],
        "compile": quick,
        "recompute": ["compute.train.recompute=true"],
        "compile_recompute": [*quick, "compute.train.recompute=true"],
    }
    if device.type == "cuda" and recipe.train_dit.precision != "fp32":
        found["fp32"] = ["train_dit.precision=fp32"]
    return found


def latents(recipe: Recipe, root: str, rows: int) -> Artifact:
    """Random latents as an `encode` artifact that fits the recipe."""
    random, side = np.random.default_rng(0), recipe.latent_size
    shapes = {COLUMNS[group]: (channels, side, side) for group, channels in recipe.channel_groups.items()}
    if recipe.train_dit.objective.align_weight and recipe.foundation:
        shapes["f"] = (recipe.foundation.feature_dim, side, side)
    tensors = {
        name + suffix: random.standard_normal((rows, *shape), np.float32).astype(np.float16)
        for name, shape in shapes.items()
        for suffix in ("", FLIP)[: 1 + recipe.image.flips]
    }
    labels = random.integers(recipe.data.classes, size=rows)
    table = latent_table([f"{row:06d}" for row in range(rows)], labels, tensors)
    storage = Storage.at(root).child("encode", "benchmark")
    entry = storage.write_table("train/part-00000.parquet", table, recipe.encode.rows_per_group, **WRITE_OPTIONS)
    statistics = {
        name: ChannelSums.merged([ChannelSums.of(tensors[name])]).mean_and_std()
        for name in shapes
        if name in COLUMNS.values()
    }
    facts = {
        "statistics": statistics,
        "statistics_hash": statistics_hash(statistics),
        "shapes": {name: list(values.shape[1:]) for name, values in tensors.items()},
        "rows_per_group": recipe.encode.rows_per_group,
    }
    artifact = Artifact(root, "encode", "benchmark")
    artifact.complete(Manifest("encode", 1, "benchmark", {}, {}, {}, (entry,), rows, facts))
    return artifact


class Reference:
    """A training step without an engine, on inputs that lie in memory."""

    def __init__(self, trainee: Diffusion, device: torch.device, change: Callable[[nn.Module], None] | None) -> None:
        section, self._device = trainee.section, device
        self._module = copy.deepcopy(trainee.module).to(device).train()
        self._ours = change is not None
        if change is not None:
            change(self._module)
        live = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        self._clip, self._half = section.clip_norm, HALVES.get(section.precision)
        self._optimizer = torch.optim.AdamW(
            live.values(),
            lr=section.learning_rate,
            betas=section.betas,
            weight_decay=section.weight_decay,
            fused=True if self._ours else None,
        )
        self._emas = averages(section, live) if self._ours else {}
        self._decay, self._live = section.ema_decay, list(live.values())
        keeps = self._decay is not None and not self._ours
        self._average = [p.detach().clone() for p in self._live] if keeps else []
        self._zero = torch.zeros((), device=device)
        self._null, self._dropout = trainee.null_label, section.objective.label_dropout
        self._given: dict[str, Any] = {}

    def take(self, given: dict[str, Any]) -> None:
        self._given = dict(given)

    def step(self) -> None:
        x1, y = self._given["x1_BCHW"], self._given["y_B"]
        random = {
            "noise_BCHW": torch.randn_like(x1),
            "u_B": torch.rand(len(x1), device=x1.device),
            "y_B": torch.where(torch.rand(len(x1), device=x1.device) < self._dropout, self._null, y),
        }
        with self._autocast():
            terms = self._module(**(self._given | random))
        terms["total"].backward()
        if self._clip:
            nn.utils.clip_grad_norm_(self._live, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for average, parameter in zip(self._average, self._live, strict=False):
                average.lerp_(parameter, 1 - (self._decay or 0.0))
        for ema in self._emas.values():
            ema.update(0, len(x1), self._zero)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, self._half) if self._half else nullcontext()


@dataclass
class Turns:
    """Stands in for a trainee's loader: hands its batches on and clocks what happens between them."""

    trainee: Diffusion
    references: dict[str, Reference]
    steps: int
    device: torch.device
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """(wall, CPU) of each turn by name."""
    waited: list[float] = field(default_factory=list)
    memory_mib: float = 0.0

    def __post_init__(self) -> None:
        self._loader = self.trainee.loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def stream(self, cursor: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        batches = self._loader.stream(cursor, rank, world)
        given = self.trainee.inputs(next(batches), self.device)
        for reference in self.references.values():
            reference.take(given)
        cuda = self.device.type == "cuda"
        while True:
            held = torch.cuda.memory_allocated() if cuda else 0
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            with self._clocked("ours"):
                waited = 0.0
                for _ in range(self.steps):
                    asked = time.perf_counter()
                    batch = next(batches)
                    waited += time.perf_counter() - asked
                    yield batch
            self.waited.append(waited / self.seconds["ours"][-1][0])
            peak = (
                torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            )
            self.memory_mib = max(self.memory_mib, (peak - held) / 2**20 if cuda else peak / 2**20)
            for name, reference in self.references.items():
                with self._clocked(name):
                    for _ in range(self.steps):
                        reference.step()

    def _clocked(self, name: str) -> AbstractContextManager[None]:
        return Clock(self.seconds.setdefault(name, []), self.device)

    def ratio(self, name: str, clock: int) -> float:
        """Median over turns of a reference's time over ours; clock 0 is wall time, 1 CPU time."""
        pairs = list(zip(self.seconds[name], self.seconds["ours"], strict=False))[WARM_TURNS:]
        return median(theirs[clock] / ours[clock] for theirs, ours in pairs)


@dataclass
class Clock(AbstractContextManager[None]):
    """Appends (wall, CPU) seconds of its block, from an idle device to an idle device."""

    found: list[tuple[float, float]]
    device: torch.device

    def __enter__(self) -> None:
        self._settle()
        self._started = time.perf_counter(), time.process_time()

    def __exit__(self, kind: Any, *_: object) -> None:
        self._settle()
        if kind is None:
            self.found.append((time.perf_counter() - self._started[0], time.process_time() - self._started[1]))

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(name: str, recipe: Recipe, root: str, inputs: Artifact, turns: int, steps: int, peak: float) -> dict:
    """One variant: figures by name."""
    device, compute, section = default_device(), recipe.compute.train, recipe.train_dit
    job = Job("train_dit", name, root, recipe.model_dump(mode="json"), {"encode": inputs.fingerprint}, {})
    context = Context(job)
    torch.manual_seed(section.seed)
    trainee = Diffusion(context)

    def ours(module: nn.Module) -> None:
        prepare(module.model, compile=compute.compile, checkpoint_activations=compute.recompute)  # type: ignore[arg-type]

    flops = training_flops_per_image(trainee.network, alignment=trainee.aligned)
    references = {"eager": Reference(trainee, device, None), "bare": Reference(trainee, device, ours)}
    clocked = Turns(trainee, references, steps, device)
    trainee.loader = clocked  # type: ignore[assignment]
    metrics = Metrics("train_dit", section.images, compute.log_every, Tracker(), device, flops)
    fit(lambda: trainee, Setting(context.out, compute, device, metrics, lambda *_: None))

    kept = clocked.seconds["ours"][WARM_TURNS:]
    found: dict[str, float] = {
        "images_per_second": steps * section.batch / median(wall for wall, _ in kept),
        "vs_eager": clocked.ratio("eager", 0),
        "engine_overhead": 1 - clocked.ratio("bare", 0),
        "data_wait_share": median(clocked.waited[WARM_TURNS:]),
        "memory_mib": clocked.memory_mib,
    }
    if device.type == "cpu":
        found |= {"vs_eager_cpu": clocked.ratio("eager", 1), "engine_overhead_cpu": 1 - clocked.ratio("bare", 1)}
    found["mfu"] = found["images_per_second"] * flops / peak
    return found


def matmul_flops(device: torch.device, size: int = 2048) -> float:
    """What a large product reaches here, in FLOP/s: the best of a few."""
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    found: list[tuple[float, float]] = []
    for _ in range(6):
        with Clock(found, device):
            a @ b
    return 2 * size**3 / min(wall for wall, _ in found)


def flops_of_recipes() -> dict[str, dict[str, float]]:
    """GFLOPs of one image's training step by recipe and stage, without what is imported instead of trained."""
    found: dict[str, dict[str, float]] = {}
    for name in recipe_names():
        recipe = load_recipe(name)
        for stage in ("train_vavae", "train_semvae", "train_dit"):
            flops = flops_per_image(recipe, stage)
            if flops is not None and getattr(recipe, stage).images:
                found.setdefault(name, {})[stage] = round(flops / 1e9, 3)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", default="demo")
    options.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change the recipe")
    options.add_argument("--only", nargs="+", metavar="NAME", help="of the variants, e.g. eager compile")
    options.add_argument("--turns", type=int, default=16)
    options.add_argument("--steps", type=int, help="of a turn; 3 on a CPU, 10 on an accelerator")
    options.add_argument("--batch", type=int, help="images of one step; the share of one worker by default")
    options.add_argument("--threads", type=int, default=1, help="of a CPU")
    options.add_argument("--peak-tflops", type=float, help="of the device; known ones and CPUs need none")
    options.add_argument("--json", type=Path, help="write all figures there")
    options.add_argument("--flops", action="store_true", help="list FLOPs per image of every recipe, and end")
    chosen = options.parse_args()
    if chosen.flops:
        table_of_flops = flops_of_recipes()
        for name, stages in table_of_flops.items():
            print(f"{name:>28}: " + "  ".join(f"{stage} {value:,.3f} GFLOPs" for stage, value in stages.items()))
        print(json.dumps(table_of_flops))
        return
    torch.set_num_threads(chosen.threads)
    device = default_device()
    steps = chosen.steps or (10 if device.type == "cuda" else 3)
    base = load_recipe(chosen.recipe, chosen.set)
    batch = chosen.batch or min(
        base.train_dit.batch // base.compute.train.workers, base.compute.train.micro_batch or base.train_dit.batch
    )
    peak = chosen.peak_tflops * 1e12 if chosen.peak_tflops else peak_flops(device) or matmul_flops(device)
    images = batch * (steps * (chosen.turns + WARM_TURNS) + 2)
    changes = [
        f"train_dit.batch={batch}", f"train_dit.images={images}", "compute.train.workers=1",
        f"compute.train.log_every={batch * steps}", f"compute.train.checkpoint_every={10 * images}",
        "compute.train.micro_batch=null",
    ]  # fmt: skip
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    group_of_one(device)
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as root:
        inputs = latents(base, root, max(4 * batch, 256))
        for name, change in variants(base, device).items():
            if not chosen.only or name in chosen.only:
                recipe = load_recipe(chosen.recipe, [*chosen.set, *changes, *change])
                table[name] = measure(name, recipe, root, inputs, chosen.turns, steps, peak)
                shown = "  ".join(f"{key} {value:.4g}" for key, value in table[name].items())
                print(f"{name:>18}: {shown}", flush=True)
    dist.destroy_process_group()
    first = next(iter(table.values()))
    network_flops = first["mfu"] * peak / first["images_per_second"]
    result = {name: round(value, 4) for name, value in first.items()}
    result |= {f"{name}_vs_eager": round(values["vs_eager"], 3) for name, values in table.items()}
    result |= {"batch": batch, "gflops_per_image": round(network_flops / 1e9, 3), "peak_tflops": round(peak / 1e12, 3)}
    if chosen.json:
        chosen.json.write_text(json.dumps({"variants": table, **result}, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
