"""One sequential pass over a source whose images have no byte range of their own.

Reading such a source in shuffled order would read every file once per part. Instead each file is read once and its
images are laid into one blob in the order in which the parts will want them, so that each part reads one stretch of
each blob. Blobs live beside the output, are resumed like parts, and go when the stage is done.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from configs.data import Data
from infra.cluster import connect
from infra.storage import Storage
from tasks.data.receipts import Receipt, finished, quiet_ray_data, receipt_row, receipts, write_receipt
from tasks.sources import ScannedSource, open_source
from tasks.sources.base import identity_of

BLOBS = "unpacked"


@dataclass(frozen=True)
class Unpacked:
    """Reads images from blobs; the rest of the stage sees byte ranges like any other source's."""

    out: Storage = field(repr=False)

    def read(self, file: str, start: int, length: int) -> bytes:
        return self.out.read_range(file, start, length)


def unpack(out: Storage, data: Data, splits: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """Blobs of every file of a scanned source; the same splits with `file`, `start`, `length` pointing into them."""
    wanted = _wanted(splits)
    files = sorted(wanted)
    jobs = [
        {
            "part": f"{BLOBS}/{number:05d}.bin",
            "file": name,
            "rows": wanted[name].tolist(),
            "made_from": identity_of("blob", [(name, wanted[name].tobytes().hex())]),
        }
        for number, name in enumerate(files)
    ]
    done = finished(out, [(job["part"], job["made_from"]) for job in jobs])
    missing = [job for job in jobs if job["part"] not in done]
    done |= {receipt.entry.path: receipt for receipt in _written(out, data, missing)}
    places = {job["file"]: (job["part"], _starts(done[job["part"]])) for job in jobs}
    return {split: _pointed(table, places, wanted) for split, table in splits.items()}


def _wanted(splits: dict[str, pa.Table]) -> dict[str, np.ndarray]:
    """Rows of each file in the order in which the parts want them."""
    rows = pa.concat_tables([table.select(["file", "start"]) for table in splits.values()]).combine_chunks()
    files = rows["file"].chunk(0).dictionary_encode()
    codes, starts = files.indices.to_numpy(), rows["start"].to_numpy()
    order = np.argsort(codes, kind="stable")
    cuts = np.searchsorted(codes[order], np.arange(1, len(files.dictionary)))
    return dict(zip(files.dictionary.to_pylist(), np.split(starts[order], cuts), strict=True))


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
    order = {row: place for place, row in enumerate(job["rows"])}
    images: list[bytes] = [b""] * len(order)
    for row, image in enumerate(source.scan(job["file"])):
        if row in order:
            images[order[row]] = image
    blob = io.BytesIO()
    for image in images:
        blob.write(image)
    entry = out.write_bytes(job["part"], blob.getvalue())
    receipt = Receipt(entry, job["made_from"], {"lengths": [len(image) for image in images]})
    write_receipt(out, receipt)
    return receipt


def _starts(receipt: Receipt) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(receipt.facts["lengths"], dtype=np.int64)])


def _pointed(table: pa.Table, places: dict[str, tuple[str, np.ndarray]], wanted: dict[str, np.ndarray]) -> pa.Table:
    index = {(name, int(row)): place for name, rows in wanted.items() for place, row in enumerate(rows)}
    files, starts, lengths = [], [], []
    for name, row in zip(table["file"].to_pylist(), table["start"].to_pylist(), strict=True):
        part, begins = places[name]
        place = index[name, row]
        files.append(part)
        starts.append(int(begins[place]))
        lengths.append(int(begins[place + 1] - begins[place]))
    for column, values in (("file", files), ("start", starts), ("length", lengths)):
        position = table.schema.get_field_index(column)
        table = table.set_column(
            position, table.schema.field(column), pa.array(values, table.schema.field(column).type)
        )
    return table
