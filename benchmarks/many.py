"""Memory and time of everything that stages `shard` and `encode` do for each image but decode it.

    python -m benchmarks.many --rows 1000000 [--kind parquet|folder|csv] [--listing] [--folder /a/disk/with/room]

Parquet files of tiny payloads are written first (about 60 bytes an image): some payloads occur twice,
some are empty, some have no label. Then stage `shard` runs as it is, on two processes that stand for
Ray's workers and do not decode: listing, order, unpacking, plan, parts and receipts, duplicates,
quarantine. The statistics of latents are merged from as many receipts as `encode` would have.

Loose files (`folder`, and `csv` with a list of them) are links to one file a class, so that a
million needs no disk: nearly all count as duplicates. `--listing` ends after the listing.

Seconds are the processor's, of the driver and of both workers together, so that other work on the
machine counts little. Memory is the largest resident set of the driver in each phase. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs import Recipe, load_recipe
from configs.data import Data
from infra.home import HOME
from infra.storage import FileEntry, Storage
from tasks import shard
from tasks.data.decode import Undecodable
from tasks.data.receipts import InOrder, Receipt, part_name
from tasks.data.statistics import ChannelSums
from tasks.sources import Account, one_look, open_source, unpack
from tasks.stage import perform

CLASSES, ROWS_PER_FILE, WORKERS = 1_000, 100_000, 2
PAYLOAD = 512
"""Bytes of a loose file, more than a pointer of Git LFS has: files as small are looked into."""
SHAPE = (32, 16, 16)
"""Of the latents whose sums are merged."""


class Phases:
    """Processor seconds and the driver's peak memory, by what it was doing; phases do not nest."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._now = ""

    def of(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, measured; within another phase it counts there."""

        def measured(*arguments: Any, **options: Any) -> Any:
            if self._now:
                return work(*arguments, **options)
            self._now, began = name, processor_seconds()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            try:
                return work(*arguments, **options)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + processor_seconds() - began
                self.peaks[name] = max(self.peaks.get(name, 0), peak_mib())
                self._now = ""

        return measured


def processor_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def peak_mib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) // 1024
    return 0


def write_source(kind: str, folder: Path, rows: int) -> Path:
    """What a source of this kind names."""
    if kind == "parquet":
        _write_parquet(folder, rows)
        return folder
    for label in range(CLASSES):
        (folder / f"{label:04d}").mkdir()
        first = folder / f"{label:04d}" / f"{label:09d}.jpg"
        first.write_bytes(b"%08x" % label * (PAYLOAD // 8))
        for number in range(label + CLASSES, rows, CLASSES):
            os.link(first, first.with_name(f"{number:09d}.jpg"))
    if kind == "folder":
        return folder
    with open(folder / "list.csv", "w") as file:
        file.write("path,label\n")
        file.writelines(f"{n % CLASSES:04d}/{n:09d}.jpg,{n % CLASSES}\n" for n in range(rows))
    return folder / "list.csv"


def _write_parquet(folder: Path, rows: int) -> None:
    """Parquet files of payloads of eight bytes: 1 % occur twice, 0.1 % are empty, 0.1 % have no label."""
    random = np.random.default_rng(0)
    for first in range(0, rows, ROWS_PER_FILE):
        count = min(ROWS_PER_FILE, rows - first)
        numbers = np.arange(first, first + count)
        again = random.random(count) < 0.01
        numbers[again] = random.integers(0, first + count, int(again.sum()))
        images = pa.array([b"" if n % 1_000 == 1 else b"%08x" % n for n in numbers.tolist()], pa.binary())
        labels = random.integers(0, CLASSES, count)
        labels[random.random(count) < 0.001] = -1
        pq.write_table(pa.table({"image": images, "label": labels}), folder / f"data-{first:012d}.parquet")


def _undecoded(data: bytes, max_pixels: int) -> None:
    if not data:
        raise Undecodable("empty file")


def _part(job: dict[str, Any], out: Storage, recipe: Recipe) -> Receipt:
    with patch.object(shard, "decode", _undecoded):
        return shard.write_part(job, out, recipe.data, recipe.shard)


def _blob(job: dict[str, Any], out: Storage, data: Data) -> Receipt:
    return unpack.write_blob(job, out, unpack.open_source(data))  # type: ignore[arg-type]


def _spread(work: Callable[[dict[str, Any]], Receipt], jobs: list[dict[str, Any]]) -> Iterator[Receipt]:
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        yield from pool.map(work, jobs, chunksize=8)


def _parts(out: Storage, recipe: Recipe, jobs: list[dict[str, Any]]) -> Iterator[Receipt]:
    return _spread(partial(_part, out=out, recipe=recipe), jobs)


def _blobs(out: Storage, data: Data, jobs: list[dict[str, Any]]) -> Iterator[Receipt]:
    return _spread(partial(_blob, out=out, data=data), jobs)


def merge_statistics(recipe: Recipe, parts: int) -> None:
    """What `encode` does with the receipts of so many parts."""
    from tasks import encode  # here, since workers need none of what it imports

    sums = ChannelSums.of(np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float16))
    facts = {
        "sums": {"z": vars(sums)},
        "averages": {"z": {str(side): vars(sums) for side in (8, 4, 2, 1)}},
        "shapes": {"z": list(SHAPE)},
        "seconds": {"encode": 1.0},
    }
    names = [part_name("train", number) for number in range(parts)]
    done = InOrder(names)
    for name in reversed(names):
        done.add(Receipt(FileEntry(name, 1, "", 1), "", facts))
    encode._outcome(recipe, done, [], {})


@contextmanager
def watched(phases: Phases) -> Iterator[None]:
    """Steps of the stage are phases, and two processes stand for Ray's workers."""
    steps = (
        (shard, "listing_of", "listing"),
        (Account, "of", "account"),
        (shard, "ordered", "order"),
        (shard, "unpack", "unpacking"),
        (shard, "write_plan", "plan"),
        (shard, "_made", "parts and receipts"),
        (shard, "_outcome", "duplicates, quarantine"),
    )
    with ExitStack() as stack:
        stack.enter_context(patch.object(shard, "_written", _parts))
        stack.enter_context(patch.object(unpack, "_written", _blobs))
        for owner, name, phase in steps:
            measured = phases.of(phase, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, measured))
        yield


def recipe_of(kind: str, source: Path) -> Recipe:
    return load_recipe(
        "demo",
        [
            f"data.source={{kind: {kind}, path: '{source}'}}",
            f"data.classes={CLASSES}",
            "shard.limit=null",
            "shard.rows_per_shard=2000",
            "sample.labels=random",
        ],
    )


def measure_listing(kind: str, rows: int, folder: Path) -> dict[str, Any]:
    """The first step alone."""
    source = open_source(recipe_of(kind, write_source(kind, folder, rows)).data)
    phases, base = Phases(), peak_mib()
    found = phases.of("listing", source.listing)()
    return {
        "kind": kind,
        "rows": found.rows.num_rows,
        "driver_peak_mib": phases.peaks["listing"],
        "driver_base_mib": base,
        "seconds_per_million": round(1e6 * phases.seconds["listing"] / rows, 1),
        "identity": found.identity,
    }


def measure(kind: str, rows: int, folder: Path) -> dict[str, Any]:
    """The whole of it in an empty folder."""
    phases, source = Phases(), folder / "source"
    source.mkdir()
    recipe = recipe_of(kind, write_source(kind, source, rows))
    began, started = time.monotonic(), processor_seconds()
    base = peak_mib()
    with watched(phases), one_look():
        artifact = perform(shard.STAGE, shard.STAGE.job(recipe, str(folder / "root"), {}))
    manifest = artifact.manifest
    phases.of("statistics", merge_statistics)(recipe, len(manifest.files))
    spent = processor_seconds() - started
    return {
        "kind": kind,
        "rows": rows,
        "driver_peak_mib": max(phases.peaks.values()),
        "driver_base_mib": base,
        "seconds_per_million": round(1e6 * spent / rows, 1),
        "wall_seconds": round(time.monotonic() - began),
        "parts": len(manifest.files) - 2,
        "kept": manifest.rows,
        "quarantine": manifest.facts["quarantine"],
        "duplicates": manifest.facts["duplicates"]["images"],
        "seconds": {name: round(seconds, 1) for name, seconds in phases.seconds.items()},
        "peak_mib": phases.peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=("parquet", "folder", "csv"), default="parquet")
    parser.add_argument("--listing", action="store_true", help="only list the source")
    parser.add_argument("--folder", help="where the files of the run go (and are deleted); default: TMPDIR")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.environ[HOME] = folder
        work = measure_listing if options.listing else measure
        print(json.dumps(work(options.kind, options.rows, Path(folder))))


if __name__ == "__main__":
    main()
