"""How fast a training step of `train_vavae` is in bf16, channels last and compiled, against eager float32.

    python -m benchmarks.tokenizer_step [--recipe vavae_tiny] [--batch 32] [--turns 6] [--steps 3]
    python -m benchmarks.tokenizer_step --recipe vavae_f16d32 --batch 8        # on one GPU

Both are the recipe's own objective in the real engine, with the discriminator from the first image on, as for most of
a published training, and with every frozen network; weights are random, and so are the images, of which each side
trains on one batch, read by the real loader, again and again. They differ in `train_vavae.precision`,
`compute.train.channels_last` and `compute.train.compile` alone; what each of these does by itself is measured too. All
take turns, so that they feel the same neighbours. `vs_eager` is eager's seconds over those of all three together, the
median over turns; where there is no accelerator it comes in processor time as well. Compiling, which happens once, is
not in it: `first_seconds` has it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from benchmarks.tokenizers.data import put_shards
from benchmarks.train_step import Clock
from configs import Recipe, load_recipe
from infra.device import default_device, group_of_one
from infra.storage import Storage
from models.execution import prepare
from tasks.stage import Context, Job
from tasks.train_vavae import Tokenizer
from tasks.training.adversary import AdversarialTraining
from tasks.training.engine import build_engine

SETTINGS = {
    "bf16": "train_vavae.precision=bf16",
    "channels_last": "compute.train.channels_last=true",
    "compile": "compute.train.compile=true",
}
EAGER, ALL = "eager", "all"
WARM_TURNS = 1


class Side:
    """One way to train: the trainee and its adversary in an engine, and the seconds of its turns."""

    def __init__(self, recipe: Recipe, context: Context, device: torch.device) -> None:
        section, compute = recipe.train_vavae, recipe.compute.train
        torch.manual_seed(section.seed)
        self._trainee, self._device = Tokenizer(context), device
        module = self._trainee.module.to(device).train()
        prepare(self._trainee.network, compile=compute.compile, channels_last=compute.channels_last)
        engine = build_engine(module, section, compute, device)
        self._advance = engine.advance
        if self._trainee.adversary is not None:
            self._advance = AdversarialTraining(engine, self._trainee.adversary, section, compute, device).advance
        self._batch = next(self._trainee.loader.stream(0, 0, 1))
        self.seconds: list[tuple[float, float]] = []
        self.memory_mib = 0.0
        began = time.perf_counter()
        self.turn(1)
        self.first_seconds = time.perf_counter() - began
        self.seconds.clear()

    def turn(self, steps: int) -> None:
        cuda = self._device.type == "cuda"
        held = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with Clock(self.seconds, self._device):
            for _ in range(steps):
                self._advance(self._trainee.inputs(self._batch, self._device))
        if cuda:
            self.memory_mib = max(self.memory_mib, (torch.cuda.max_memory_allocated() - held) / 2**20)


def ratio(eager: Side, other: Side, clock: int) -> float:
    """Median over turns of eager's time over the other's; clock 0 is wall time, 1 processor time."""
    pairs = list(zip(eager.seconds, other.seconds, strict=True))[WARM_TURNS:]
    return median(slow[clock] / fast[clock] for slow, fast in pairs)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", default="vavae_tiny")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--turns", type=int, default=6)
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--threads", type=int, default=1, help="of a CPU")
    options.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    device = default_device()
    changes = [
        *given.set, f"train_vavae.batch={given.batch}", "train_vavae.stages=[]", "train_vavae.objective.gan_start=0",
        "train_vavae.objective.lpips_weights=random", "foundation.weights=random", "compute.train.workers=1",
        "compute.train.engine=plain", "compute.train.zero_stage=0", "compute.train.micro_batch=null",
    ]  # fmt: skip
    ways = {EAGER: [], **{name: [change] for name, change in SETTINGS.items()}, ALL: list(SETTINGS.values())}
    group_of_one(torch.device("cpu"))
    sides: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Storage.at(str(Path(folder).absolute())).url
        size = load_recipe(given.recipe, changes).image.size

        def noise(split: str, _count: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
            random = np.random.default_rng(len(split))
            for _ in range(given.batch):
                yield 0, random.integers(0, 256, (size, size, 3), dtype=np.uint8)

        shards = put_shards(root, "noise", noise)
        for name, change in ways.items():
            recipe = load_recipe(given.recipe, [*changes, *change])
            job = Job("train_vavae", name, root, recipe.model_dump(mode="json"), {"shard": shards.fingerprint}, {})
            sides[name] = Side(recipe, Context(job), device)
            print(f"{name:>14}: first step {sides[name].first_seconds:.1f} s", flush=True)
        for _ in range(WARM_TURNS + given.turns):
            for side in sides.values():
                side.turn(given.steps)
    dist.destroy_process_group()
    table: dict[str, dict[str, float]] = {}
    for name, side in sides.items():
        images = given.steps * given.batch
        found = table[name] = {
            "images_per_second": images / median(wall for wall, _ in side.seconds[WARM_TURNS:]),
            "vs_eager": ratio(sides[EAGER], side, 0),
            "first_seconds": side.first_seconds,
        }
        found |= {"memory_mib": side.memory_mib} if device.type == "cuda" else {}
        found |= {"vs_eager_processor": ratio(sides[EAGER], side, 1)} if device.type == "cpu" else {}
        print(f"{name:>14}: " + "  ".join(f"{key} {value:.3g}" for key, value in found.items()), flush=True)
    result: dict[str, Any] = {
        "benchmark": "tokenizer_step",
        "recipe": given.recipe,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "batch": given.batch,
        "threads": given.threads,
        "vs_eager": table[ALL]["vs_eager"],
        **table,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
