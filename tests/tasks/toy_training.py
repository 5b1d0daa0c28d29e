"""A trainee of a few hundred weights whose images are a pure function of their number, and gloo workers to train it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.schema import TrainCompute, Training
from infra.storage import Storage
from infra.tracking import Tracker
from tasks.loader import Batch
from tasks.training.loop import fit
from tasks.training.metrics import Metrics
from tasks.training.randomness import ImageNumbers

BATCH = 16


class Interrupted(Exception):
    """Stands for whatever ends a worker."""


class Numbers:
    """Keeps a loader's contract on drawn vectors."""

    def __init__(self, batch: int, broken: frozenset[int]) -> None:
        self.batch, self.broken = batch, broken
        self._draw = ImageNumbers(7, "toy")

    def stream(self, cursor: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        share = self.batch // world
        while True:
            positions = np.arange(cursor + rank * share, cursor + (rank + 1) * share)
            values = self._draw.normal(positions, (6,)).numpy()
            values[np.isin(positions, list(self.broken))] = np.nan
            cursor += self.batch
            yield Batch(cursor, positions, [], np.zeros(share, np.int64), {"x": values})

    def keys_at(self, cursor: int) -> list[str]:
        return [f"image-{cursor + i}" for i in range(self.batch)]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        error = (self.net(x + 0.1 * noise) - x.sin()).square().mean()
        return {"total": error, "error": error.detach()}


class ToyTrainee:
    def __init__(self, section: Training, stop_at: int | None, broken: frozenset[int]) -> None:
        torch.manual_seed(section.seed)
        self.section, self.stop_at = section, stop_at
        self.module: nn.Module = Toy()
        self.network: nn.Module = self.module
        self.loader: Any = Numbers(section.batch, broken)
        self.facts: dict[str, Any] = {"data": "toy"}
        self.noise = ImageNumbers(section.seed, "noise")

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        if self.stop_at is not None and batch.images_seen > self.stop_at:
            raise Interrupted
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
    damage: bool = False
    """Flip a byte of the newest checkpoint before the run."""


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
    metrics = Metrics("toy", settings.images, knobs.log_every, Tracker(), device) if dist.get_rank() == 0 else None

    def finished(weights: dict[str, Tensor], averages: dict[str, Tensor] | None, curves: Any) -> None:
        tensors = {f"w/{name}": value for name, value in weights.items()}
        tensors |= {f"e/{name}": value for name, value in (averages or {}).items()}
        tensors["curve"] = torch.tensor(curves["error"])
        save_file(tensors, folder / f"{run.name}.safetensors")

    try:
        fit(lambda: ToyTrainee(settings, run.stop_at, run.broken), out, knobs, device, metrics, finished)
    except Exception as error:
        if dist.get_rank() == 0:
            (folder / f"{run.name}.error").write_text(f"{type(error).__name__}: {error}")
    dist.barrier()


def _worker(rank: int, world: int, port: int, folder: str, runs: list[Run]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(world)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    if rank == 0:
        out = os.open(str(Path(folder) / "said.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
    for run in runs:
        perform(run, Path(folder))
    dist.destroy_process_group()


def train(world: int, folder: Path, runs: list[Run], worker: Callable[..., None] = _worker) -> None:
    """Perform the runs one after another on `world` gloo workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (world, port, str(folder), runs), nprocs=world)  # type: ignore[no-untyped-call]


def result(folder: Path, name: str) -> dict[str, Tensor]:
    error = folder / f"{name}.error"
    assert not error.exists(), error.read_text()
    return load_file(folder / f"{name}.safetensors")
