"""How fast the loader is: rows/s against one safetensors slice per sample, and against a bare sequential read.

    python -m benchmarks.loader [--rows 48000] [--threads 2] [--s3 | --s3-root URL]

One process, one page cache, one run; every way reads the same latents (32 × 16 × 16 float16), the ways take turns and
the best of each counts. The sequential read is the fastest that we know: whole files in order into one reused buffer,
which begins at a page and stays in the processor's cache, so nothing is kept of what was read. Beside it, as
`vs_sequential_kept`, stands the same read into batch after batch of memory that stays, as a loader's batches must.
The `cpu_` ratios compare rows per second of processor time of the whole process, all its threads together: they hold
on a machine that does other things, too, where a loader of two threads seldom has two cores.
`--s3` starts a real S3 server (SeaweedFS) on this machine and reads from it, too, with and without the local cache;
`--s3-root` takes the one that AWS_ENDPOINT_URL names. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from benchmarks.s3_server import BUCKET, s3_server
from infra.artifacts import Artifact, Manifest
from infra.storage import Storage
from tasks.data.statistics import ChannelSums, statistics_hash
from tasks.data.tensors import WRITE_OPTIONS, latent_table
from tasks.loading.loader import Loader

SHAPE = (32, 16, 16)
BATCH = 256
ROWS_PER_PART = 2_000


class PerSample(torch.utils.data.Dataset):
    """What published loaders do: open a safetensors file and read one slice for every sample."""

    def __init__(self, folder: Path, parts: int) -> None:
        self.files = [str(folder / f"{part:05d}.safetensors") for part in range(parts)]

    def __len__(self) -> int:
        return len(self.files) * ROWS_PER_PART

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        part, row = divmod(index, ROWS_PER_PART)
        with safe_open(self.files[part], framework="pt", device="cpu") as file:
            return file.get_slice("latents")[row : row + 1], file.get_slice("labels")[row : row + 1]


def make(root: str, plain: Path | None, rows: int) -> Artifact:
    """The same random latents as an `encode` artifact and, where wanted, as safetensors files."""
    storage = Storage.at(root).child("encode", "benchmark")
    random = np.random.default_rng(0)
    files, sums = [], []
    for part in range(rows // ROWS_PER_PART):
        z = random.standard_normal((ROWS_PER_PART, *SHAPE), np.float32).astype(np.float16)
        labels = random.integers(1000, size=ROWS_PER_PART)
        keys = [f"{part:05d}/{row:05d}" for row in range(ROWS_PER_PART)]
        table = latent_table(keys, labels, {"z": z})
        files.append(storage.write_table(f"train/part-{part:05d}.parquet", table, 256, **WRITE_OPTIONS))
        sums.append(ChannelSums.of(z))
        if plain is not None:
            save_file({"latents": z, "labels": labels}, plain / f"{part:05d}.safetensors")
    statistics = {"z": ChannelSums.merged(sums).mean_and_std()}
    facts = {
        "statistics": statistics,
        "statistics_hash": statistics_hash(statistics),
        "shapes": {"z": list(SHAPE)},
        "rows_per_group": 256,
    }
    artifact = Artifact(root, "encode", "benchmark")
    artifact.complete(Manifest("encode", 1, "benchmark", {}, {}, {}, tuple(files), rows, facts))
    return artifact


class Ours:
    """A loader in its steady state, epoch after epoch; the first epoch, which checks everything, is `first`."""

    def __init__(self, artifact: Artifact, threads: int, cache_gib: float = 0.0) -> None:
        self.loader = Loader(artifact, "train", ("z",), BATCH, 0, keys=False, threads=threads, cache_gib=cache_gib)
        self.stream = self.loader.stream()
        self.first = self.epoch()

    def epoch(self) -> float:
        """Rows/s of one more epoch."""
        seen, started = 0, time.perf_counter()
        while seen < self.loader.rows:
            seen += len(next(self.stream).labels)
        return seen / (time.perf_counter() - started)


def restart(artifact: Artifact) -> float:
    """Seconds from nothing to the first batch in the middle of an epoch."""
    started = time.perf_counter()
    loader = Loader(artifact, "train", ("z",), BATCH, 0, keys=False)
    with loader.stream(cursor=loader.rows * 7 // 2 + 1) as stream:
        next(stream)
        return time.perf_counter() - started


def per_sample(folder: Path, rows: int) -> float:
    dataset = PerSample(folder, rows // ROWS_PER_PART)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: min(rows, 8_000)].tolist()
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, sampler=order)
    started = time.perf_counter()
    seen = sum(len(latents) for latents, _ in loader)
    return seen / (time.perf_counter() - started)


def sequential(artifact: Artifact, memory: list[np.ndarray]) -> float:
    """Whole files, one after the other, into these buffers in turn; rows/s of the latents in them."""
    turn, started = 0, time.perf_counter()
    for entry in artifact.manifest.files:
        with open(artifact.storage.locate(entry.path), "rb", buffering=0) as file:
            while file.readinto(memory[turn % len(memory)]):  # type: ignore[arg-type]
                turn += 1
    return artifact.manifest.rows / (time.perf_counter() - started)


def pages(size: int) -> np.ndarray:
    """Memory that begins at a page: reads to 16 bytes past one are six times slower on some processors."""
    memory = np.zeros(size + 4096, np.uint8)
    start = -memory.ctypes.data % 4096
    return memory[start : start + size]


def from_s3(root: str, home: Path, rows: int, threads: int) -> dict[str, float]:
    """Rows/s from object storage: in place, while the cache fills, and from the full cache."""
    artifact = make(root, None, rows)
    os.environ["LATENTFORGE_HOME"] = str(home)
    cached = Ours(artifact, threads, cache_gib=64.0)
    return {
        "s3_rows_per_second": round(Ours(artifact, threads).epoch()),
        "s3_rows_per_second_cache_cold": round(cached.first),
        "s3_rows_per_second_cache_warm": round(max(cached.epoch() for _ in range(3))),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=48_000)
    options.add_argument("--repeats", type=int, default=8)
    options.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of the loader")
    options.add_argument("--s3", action="store_true", help="also from an S3 server that is started here")
    options.add_argument("--s3-root", metavar="URL", help="also from a writable prefix such as s3://bucket/benchmark")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "plain").mkdir()
        artifact = make(str(folder / "root"), folder / "plain", chosen.rows)
        one, several = Ours(artifact, 1), Ours(artifact, chosen.threads)
        row = math.prod(SHAPE) * 2
        reused, kept = [pages(8 << 20)], [pages(BATCH * row) for _ in range(64)]
        ways: dict[str, Callable[[], float]] = {
            "sequential": lambda: sequential(artifact, reused),
            "sequential_kept": lambda: sequential(artifact, kept),
            "loader": several.epoch,
            "loader_one_thread": one.epoch,
            "per_sample": lambda: per_sample(folder / "plain", chosen.rows),
        }
        found: dict[str, float] = dict.fromkeys(ways, 0.0)
        of_a_core: dict[str, float] = dict.fromkeys(ways, 0.0)
        for _ in range(chosen.repeats):
            for way, measure in ways.items():
                wall, cpu = time.perf_counter(), time.process_time()
                rate = measure()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                found[way], of_a_core[way] = max(found[way], rate), max(of_a_core[way], rate * wall / cpu)
        found["first_epoch"] = max(one.first, several.first)
        for way, rate in found.items():
            core = f"{of_a_core[way]:>12,.0f} rows per second of a core" if way in ways else ""
            print(f"{way:>18}: {rate:>10,.0f} rows/s {rate * row / 1e9:>7.2f} GB/s {core}", flush=True)
        result: dict[str, float | int | None] = {
            "vs_per_sample": round(found["loader"] / found["per_sample"], 2),
            "vs_sequential": round(found["loader"] / found["sequential"], 3),
            "vs_sequential_one_thread": round(found["loader_one_thread"] / found["sequential"], 3),
            "vs_sequential_kept": round(found["loader"] / found["sequential_kept"], 3),
            "cpu_vs_per_sample": round(of_a_core["loader"] / of_a_core["per_sample"], 2),
            "cpu_vs_sequential": round(of_a_core["loader"] / of_a_core["sequential"], 3),
            "rows_per_second": round(found["loader"]),
            "rows_per_second_first_epoch": round(found["first_epoch"]),
            "restart_seconds": round(min(restart(artifact) for _ in range(3)), 3),
            "threads": chosen.threads,
            "cores": os.cpu_count(),
        }
        if chosen.s3_root:
            result |= from_s3(chosen.s3_root, folder, chosen.rows, chosen.threads)
        elif chosen.s3:
            (folder / "weed").mkdir()
            with s3_server(folder / "weed") as environment:
                os.environ.update(environment)
                result |= from_s3(f"s3://{BUCKET}", folder, chosen.rows, chosen.threads)
        print(json.dumps(result))


if __name__ == "__main__":
    main()
