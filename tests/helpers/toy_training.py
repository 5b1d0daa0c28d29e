"""A trainee of a few hundred weights whose images are a pure function of their number, and gloo workers to train it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.s3_server import free_ports
from configs.compute import TrainCompute
from configs.training import Training
from infra.storage import Storage
from infra.tracking import Tracker
from tasks.loading.loader import Batch
from tasks.randomness import ImageNumbers
from tasks.training.checkpoints import Checkpoint
from tasks.training.loop import Setting, fit
from tasks.training.metrics import Metrics
from tasks.training.requests import ask, heed_signals
from tasks.training.trainee import Trainee

BATCH = 16
ZERO = [{"engine": "deepspeed", "zero_stage": stage} for stage in range(4)]
LAYOUTS: dict[str, dict[str, Any]] = {"plain": {"engine": "plain"}} | {
    f"zero{stage}": ZERO[stage] for stage in range(4)
}


class Interrupted(Exception):
    """Stands for whatever ends a worker."""


class Numbers:
    """Keeps a loader's contract on drawn vectors."""

    def __init__(
        self, batch: int, broken: frozenset[int] = frozenset(), factor: float = np.nan, split: str = "train"
    ) -> None:
        self.batch, self.broken, self.factor = batch, broken, factor
        self._draw = ImageNumbers(7, split)

    def stream(self, cursor: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        share = self.batch // world
        while True:
            positions = np.arange(cursor + rank * share, cursor + (rank + 1) * share)
            values = self._draw.normal(positions, (6,)).numpy()
            values[np.isin(positions, list(self.broken))] *= self.factor
            cursor += self.batch
            yield Batch(cursor, positions, [], np.zeros(share, np.int64), {"x": values})

    def keys_at(self, cursor: int) -> list[str]:
        return [f"image-{cursor + i}" for i in range(self.batch)]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6))
        self.offset = nn.Parameter(torch.zeros(3))  # no number of workers divides it
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        errors = (self.net(x + 0.1 * noise) + self.offset.repeat(2) - x.sin()).float().square().mean(dim=1)
        points = torch.stack([noise.mean(dim=1).sigmoid(), errors.detach()])
        return {"total": errors.mean(), "error": errors.mean().detach(), "by_time/error": points}


class ToyTrainee(Trainee):
    def __init__(self, section: Training, run: Run) -> None:
        torch.manual_seed(section.seed)
        self.section, self.run = section, run
        self.module: nn.Module = Toy()
        self.network: nn.Module = self.module
        self.loader: Any = Numbers(section.batch, run.broken, run.factor)
        self.facts: dict[str, Any] = {"data": "toy"}
        self.noise = ImageNumbers(section.seed, "noise")

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        if self.run.stop_at is not None and batch.images_seen > self.run.stop_at:
            raise Interrupted
        if self.run.signal_at == batch.images_seen and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"x": torch.from_numpy(batch.arrays["x"]), "noise": self.noise.normal(batch.positions, (6,))}

    def scores(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Run:
    """One call of `fit` in all workers."""

    name: str
    """Of the result; runs with the same `place` share checkpoints."""
    place: str
    compute: dict[str, Any] = field(default_factory=dict)
    section: dict[str, Any] = field(default_factory=dict)
    stop_at: int | None = None
    broken: frozenset[int] = frozenset()
    """Images whose values are multiplied by `factor`."""
    factor: float = np.nan
    damage: bool = False
    """Flip a byte of the newest checkpoint before the run."""
    signal_at: int | None = None
    """The last worker gets SIGTERM before its step that reaches this many images."""
    ask: str | None = None
    """A request that is there before the run."""
    trainee: type[ToyTrainee] = ToyTrainee


@dataclass(frozen=True)
class Notes(Tracker):
    """Keeps what is tracked in a file."""

    path: str = ""

    def series(self, points: list[tuple[str, float, int]]) -> None:
        with open(self.path, "a") as file:
            file.writelines(json.dumps(point) + "\n" for point in points)


def section(**changes: Any) -> Training:
    base = {"images": 12 * BATCH, "batch": BATCH, "learning_rate": 0.01, "warmup_images": 3 * BATCH, "ema_decay": 0.9}
    return Training(**(base | {"schedule": "cosine", "clip_norm": 0.5, "weight_decay": 0.01} | changes))


def compute(**changes: Any) -> TrainCompute:
    base = {"workers": 1, "gpus_per_worker": 0, "checkpoint_every": 4 * BATCH, "log_every": BATCH, "engine": "plain"}
    return TrainCompute(**(base | changes))


def perform(run: Run, folder: Path) -> None:
    out = Storage.at(str(folder / run.place))
    knobs = compute(**run.compute)
    if run.damage and dist.get_rank() == 0:
        newest = sorted(Path(out.path, "checkpoints").iterdir())[-1] / "weights.safetensors"
        data = bytearray(newest.read_bytes())
        data[-1] ^= 1
        newest.write_bytes(bytes(data))
    dist.barrier()
    settings = section(**run.section)
    device = torch.device("cpu")
    if run.ask is not None and dist.get_rank() == 0:
        ask(out, run.ask)
    dist.barrier()
    metrics = Metrics("toy", settings.images, knobs.log_every, Notes(path=str(folder / f"{run.name}.notes")), device)

    def finished(end: Checkpoint, best: Checkpoint | None, curves: Any) -> None:
        tensors = {f"{part}/{name}": value for part, found in end.tensors.items() for name, value in found.items()}
        tensors |= {f"best/{name}": value for name, value in (best.tensors["ema"] if best else {}).items()}
        tensors["curve"] = torch.tensor(curves["error"])
        if "validation/total" in curves:
            tensors["validation"] = torch.tensor(curves["validation/total"])
        save_file(tensors, folder / f"{run.name}.safetensors")

    try:
        held_out: Any = Numbers(settings.batch, split="held out")
        setting = Setting(out, knobs, device, metrics, finished, held_out=lambda trainee: held_out)
        fit(lambda: run.trainee(settings, run), setting)
    except Exception as error:
        traceback.print_exc()  # one of another rank is told nowhere else
        if dist.get_rank() == 0:
            (folder / f"{run.name}.error").write_text(f"{type(error).__name__}: {error}")
    dist.barrier()


def begin_worker(rank: int, world: int, port: int) -> None:
    """What Ray Train does in a worker before it trains: its place among the others, and their process group."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(world)
    torch.set_num_threads(1)
    heed_signals()
    # A worker that fails alone leaves the others waiting: not for half an hour.
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(minutes=3))


def _worker(rank: int, world: int, port: int, folder: str, runs: list[Run]) -> None:
    begin_worker(rank, world, port)
    if rank == 0:
        out = os.open(str(Path(folder) / "said.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
    for run in runs:
        perform(run, Path(folder))
    dist.destroy_process_group()


def train(world: int, folder: Path, runs: list[Run]) -> None:
    """Perform the runs one after another on `world` gloo workers."""
    start_workers(world, str(folder), runs, _worker)


def start_workers(world: int, place: str, given: Any, worker: Callable[[int, int, int, str, Any], None]) -> None:
    """Call `worker(rank, world, port, place, given)` in `world` processes and wait for them.

    They are forks of one process that has what they import; each would take seconds for that.
    """
    multiprocessing.set_forkserver_preload([__name__, "tasks.train_dit", "torch._dynamo", "deepspeed"])
    (port,) = free_ports(1)
    mp.start_processes(worker, (world, port, place, given), nprocs=world, start_method="forkserver")


def notes(folder: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """(images seen, value) points that a run tracked, by name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / f"{name}.notes").read_text().splitlines():
        metric, value, step = json.loads(line)
        found.setdefault(metric, []).append((step, value))
    return found


def result(folder: Path, name: str) -> dict[str, Tensor]:
    error = folder / f"{name}.error"
    assert not error.exists(), error.read_text()
    return load_file(folder / f"{name}.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two results are equal in every bit, but for what was logged."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a if name != "curve")


def near(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 2e-4, atol: float = 2e-6) -> None:
    """Equal but for the order of sums."""
    assert a.keys() == b.keys()
    for name in a.keys() - {"curve"}:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=name)
