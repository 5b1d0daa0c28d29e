"""Images that occur more than once, byte by byte: reported, never dropped, for what is right depends on the data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.storage import Storage
from tasks.data.rows import Rows, in_order
from tasks.sources.files import in_turn

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("same_as", pa.string()),
        pa.field("across_splits", pa.bool_()),
        pa.field("across_classes", pa.bool_()),
    ]
)
_SEEN = pa.schema(
    [
        ("content", pa.uint64()),
        ("place", pa.int64()),
        ("key", pa.string()),
        ("label", pa.int32()),
        ("split", pa.string()),
    ]
)
_COPIES = pa.schema([("place", pa.int64()), *SCHEMA])


def find_duplicates(storage: Storage, parts: Sequence[str]) -> tuple[Rows, dict[str, int]]:
    """Every image whose content an earlier one already has, in the parts' order, and how many.

    Content is compared by the shards' 64-bit hash: among 100 M different images the chance that any two are taken
    for the same is below 0.03 %. Of the shards only the columns of keys, labels and hashes are read.

    Returns:
        rows of :data:`SCHEMA`, and counts of them as the manifest has them.
    """
    seen = Rows(_SEEN)
    for part, table in zip(parts, in_turn(lambda part: contents(storage, part), parts), strict=True):
        places = np.arange(seen.num_rows, seen.num_rows + table.num_rows)
        hashes = np.frombuffer(b"".join(table["content"].to_pylist()), np.uint64)
        split = pa.repeat(part.split("/")[0], table.num_rows)
        seen.add(pa.table([pa.array(hashes), pa.array(places), table["key"], table["label"], split], schema=_SEEN))
    copies = Rows(_COPIES)
    for chunk in in_order(seen, "content"):
        copies.add(_copies(chunk))
    del seen
    found, counts = Rows(SCHEMA), {"images": copies.num_rows, "across_splits": 0, "across_classes": 0}
    for chunk in in_order(copies, "place"):
        for name in ("across_splits", "across_classes"):
            counts[name] += chunk[name].combine_chunks().true_count
        found.add(chunk.select(SCHEMA.names))
    return found, counts


def contents(storage: Storage, part: str) -> pa.Table:
    """`key`, `label` and `content` of a shard's rows."""
    with storage.open(part) as file:
        return pq.ParquetFile(file).read(columns=["key", "label", "content"])


def _copies(rows: pa.Table) -> pa.Table:
    """Of rows in the order of their content, those that are not the first of it, with what they are copies of."""
    content = rows["content"].to_numpy()
    first = np.concatenate([[True], content[1:] != content[:-1]])
    later = np.flatnonzero(~first)
    origin = np.flatnonzero(first)[np.cumsum(first) - 1][later]
    copies, originals = rows.take(pa.array(later)), rows.take(pa.array(origin))
    crosses = [pc.not_equal(copies[name], originals[name]) for name in ("split", "label")]
    return pa.table([copies["place"], copies["key"], originals["key"], *crosses], schema=_COPIES)
