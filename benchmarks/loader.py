"""How fast the loader is: rows/s against one safetensors slice per sample, and against a bare sequential read.

    python -m benchmarks.loader [--rows 48000] [--s3 URL]

One process, one page cache, one run; every way reads the same latents (32 × 16 × 16 float16). With `--s3` also from
the S3 server that AWS_ENDPOINT_URL names, with and without the local cache. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from infra.artifacts import Artifact, Manifest
from infra.storage import Storage
from tasks.latents import WRITE_OPTIONS, Sums, latent_table, statistics_hash
from tasks.loader import Loader

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
        sums.append(Sums.of(z))
        if plain is not None:
            save_file({"latents": z, "labels": labels}, plain / f"{part:05d}.safetensors")
    statistics = {"z": Sums.merged(sums).moments()}
    facts = {
        "statistics": statistics,
        "statistics_hash": statistics_hash(statistics),
        "shapes": {"z": list(SHAPE)},
        "rows_per_group": 256,
    }
    artifact = Artifact(root, "encode", "benchmark")
    artifact.complete(Manifest("encode", 1, "benchmark", {}, {}, {}, tuple(files), rows, facts))
    return artifact


def ours(artifact: Artifact, rows: int, cache_gib: float = 0.0, cold: bool = False) -> float:
    loader = Loader(artifact, "train", ("z",), BATCH, 0, keys=False, cache_gib=cache_gib)
    stream = loader.stream()
    for _ in range(0 if cold else loader.rows // BATCH):  # the first epoch verifies checksums, later ones do not
        next(stream)
    seen = 0
    started = time.perf_counter()
    while seen < rows:
        seen += len(next(stream).labels)
    seconds = time.perf_counter() - started
    stream.close()  # type: ignore[attr-defined]
    return seen / seconds


def restart(artifact: Artifact) -> float:
    """Seconds from nothing to the first batch in the middle of an epoch."""
    started = time.perf_counter()
    loader = Loader(artifact, "train", ("z",), BATCH, 0, keys=False)
    next(loader.stream(cursor=loader.rows * 7 // 2))
    return time.perf_counter() - started


def per_sample(folder: Path, rows: int) -> float:
    dataset = PerSample(folder, rows // ROWS_PER_PART)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: min(rows, 8_000)].tolist()
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, sampler=order)
    started = time.perf_counter()
    seen = sum(len(latents) for latents, _ in loader)
    return seen / (time.perf_counter() - started)


def sequential(artifact: Artifact) -> float:
    """Whole files, one after the other, into one reused buffer; rows/s of the latents in them."""
    rows = artifact.manifest.rows
    buffer = bytearray(8 << 20)
    started = time.perf_counter()
    for entry in artifact.manifest.files:
        with open(artifact.storage.locate(entry.path), "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return rows / (time.perf_counter() - started)


def best(measure: Callable[[], float], times: int = 3) -> float:
    return max(measure() for _ in range(times))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, default=48_000)
    options.add_argument("--s3", metavar="URL", help="a writable prefix, e.g. s3://latents/benchmark")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain"
        plain.mkdir()
        artifact = make(folder, plain, chosen.rows)
        found = {
            "sequential": best(lambda: sequential(artifact)),
            "loader": best(lambda: ours(artifact, chosen.rows)),
            "first_epoch": ours(artifact, chosen.rows, cold=True),
            "per_sample": best(lambda: per_sample(plain, chosen.rows), 2),
        }
        for name, rate in found.items():
            print(f"{name:>12}: {rate:>10,.0f} rows/s", flush=True)
        result = {
            "vs_per_sample": round(found["loader"] / found["per_sample"], 2),
            "vs_sequential": round(found["loader"] / found["sequential"], 3),
            "rows_per_second": round(found["loader"]),
            "rows_per_second_first_epoch": round(found["first_epoch"]),
            "restart_seconds": round(restart(artifact), 3),
            "cores": os.cpu_count(),
        }
        if chosen.s3:
            remote = make(chosen.s3, None, chosen.rows)
            result["s3_rows_per_second"] = round(ours(remote, chosen.rows, cold=True))
            os.environ["LATENTFORGE_HOME"] = str(Path(folder) / "home")
            result["s3_rows_per_second_cache_cold"] = round(ours(remote, chosen.rows, 4.0, cold=True))
            result["s3_rows_per_second_cache_warm"] = round(ours(remote, chosen.rows, 4.0))
        print(json.dumps(result))


if __name__ == "__main__":
    main()
