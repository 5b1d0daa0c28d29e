"""One sequential pass over a source whose images have no byte range of their own.

Reading such a source in shuffled order would read every file once per part. Instead each file is read once and its
images are laid into one blob in the order in which the parts will want them, so that each part reads one stretch of
each blob. Blobs live beside the output, are resumed like parts, and go when the stage is done.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from configs.data import Data
from infra.cluster import connect
from infra.storage import Storage
from tasks.data.receipts import Receipt, finished, quiet_ray_data, receipt_row, receipts, write_receipt
from tasks.data.rows import Rows, in_order
from tasks.sources import ScannedSource, open_source
from tasks.sources.base import LISTING_SCHEMA, identity_of

BLOBS = "unpacked"
PLACED = LISTING_SCHEMA.append(pa.field("place", pa.int64()))
"""Rows of a listing, each with its place in the order of a set."""
_EMPTY = -1
"""Instead of a length: none is an unknown one."""


@dataclass(frozen=True)
class Unpacked:
    """Reads images from blobs; the rest of the stage sees byte ranges like any other source's."""

    out: Storage = field(repr=False)

    def read(self, file: str, start: int, length: int) -> bytes:
        if length == _EMPTY:
            return b""
        return self.out.read_range(file, start, length)


def unpack(out: Storage, data: Data, rows: Rows, there: Sequence[tuple[int, int]] = ()) -> Rows:
    """Blobs of every file of a scanned source; the same rows with `file`, `start`, `length` pointing into them.

    there: stretches of rows that are in an older set, which nobody reads from the source; they stay as they are.
    """
    placed, pointed = Rows(PLACED), Rows(PLACED)
    place = 0
    for chunk in rows.chunks():
        places = np.arange(place, place := place + chunk.num_rows)
        table = pa.table([*chunk.columns, pa.array(places)], schema=PLACED)
        known = np.any([(start <= places) & (places < stop) for start, stop in ((0, 0), *there)], axis=0)
        placed.add(table.filter(pa.array(~known)))
        pointed.add(table.filter(pa.array(known)))
    jobs = [_job(out, number, *each) for number, each in enumerate(by_file(placed))]
    done = {receipt.entry.path for receipt in finished(out, [(job["part"], job["made_from"]) for job in jobs])}
    deque(_written(out, data, [job for job in jobs if job["part"] not in done]), maxlen=0)
    for job, (_, table) in zip(jobs, by_file(placed), strict=True):
        pointed.add(_pointed(table, job["part"], np.frombuffer(out.read_bytes(_lengths(job["part"])), np.int64)))
    del placed
    found = Rows(LISTING_SCHEMA)
    for chunk in in_order(pointed, "place"):
        found.add(chunk.select(LISTING_SCHEMA.names))
    return found


def by_file(placed: Rows) -> Iterator[tuple[str, pa.Table]]:
    """The rows of each file, files by name, rows in the order in which the parts want them."""
    for portion in in_order(placed, "file", "place"):
        runs = portion["file"].combine_chunks().dictionary_encode()
        ends = np.cumsum(np.bincount(runs.indices.to_numpy())).tolist()
        for name, (start, stop) in zip(runs.dictionary.to_pylist(), pairwise([0, *ends]), strict=True):
            yield name, portion.slice(start, stop - start)


def _job(out: Storage, number: int, file: str, table: pa.Table) -> dict[str, Any]:
    """What makes a file's blob. The rows that it takes lie in storage: together they are as many as images."""
    rows = table["start"].to_numpy().astype(np.int64).tobytes()
    wanted = out.write_bytes(f"{BLOBS}/{number:05d}.rows", rows)
    made_from = identity_of("blob", [(file, wanted.sha256)])
    return {"part": f"{BLOBS}/{number:05d}.bin", "file": file, "rows": wanted.path, "made_from": made_from}


def _pointed(table: pa.Table, part: str, lengths: np.ndarray) -> pa.Table:
    columns = {name: table[name] for name in PLACED.names}
    columns["file"] = pa.repeat(part, len(lengths))
    columns["start"] = pa.array(np.cumsum(lengths) - lengths)
    columns["length"] = pa.array(np.where(lengths == 0, _EMPTY, lengths))
    return pa.table([columns[name] for name in PLACED.names], schema=PLACED)


def _lengths(part: str) -> str:
    return part.removesuffix(".bin") + ".lengths"


def _written(out: Storage, data: Data, jobs: list[dict[str, Any]]) -> Iterator[Receipt]:
    if not jobs:
        return
    import ray.data

    connect()
    quiet_ray_data()
    blobs = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map(partial(_task, out=out, data=data))
    yield from receipts(blobs.iter_rows())


def _task(job: dict[str, Any], out: Storage, data: Data) -> dict[str, bytes]:
    source = open_source(data)
    assert isinstance(source, ScannedSource)  # which is why it is unpacked
    return receipt_row(lambda: write_blob(job, out, source))


def write_blob(job: dict[str, Any], out: Storage, source: ScannedSource) -> Receipt:
    """Scan one file and lay the wanted images end to end; holds one file's images in memory."""
    rows = np.frombuffer(out.read_bytes(job["rows"]), np.int64).tolist()
    order = {row: place for place, row in enumerate(rows)}
    images: list[bytes] = [b""] * len(order)
    for row, image in enumerate(source.scan(job["file"])):
        if row in order:
            images[order[row]] = image
    blob = io.BytesIO()
    for image in images:
        blob.write(image)
    out.write_bytes(_lengths(job["part"]), np.array([len(image) for image in images], np.int64).tobytes())
    receipt = Receipt(out.write_bytes(job["part"], blob.getvalue()), job["made_from"])
    write_receipt(out, receipt)
    return receipt
