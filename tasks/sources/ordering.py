"""The law of a data set's order: images by a hash of their keys, split by split, however many there are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.data import Shard
from tasks.data.rows import Rows, in_order
from tasks.sources.base import LISTING_SCHEMA, REFUSALS, Listing, Refusal, refusal_table

SPLITS = ("train", "test")
_PLACED = LISTING_SCHEMA.append(pa.field("hash", pa.uint64()))


@dataclass(frozen=True)
class Order:
    """Images in their final order."""

    rows: Rows
    """Those of the train split, then those of the test split, as listed."""
    counts: dict[str, int]
    """Images of each split, none where it has none."""
    learnt: frozenset[int]
    """Labels in the train split."""
    ruled_out: Rows
    """What the listing refuses, and keys that it has twice."""


def ordered(listing: Listing, section: Shard) -> Order:
    """Images of each split in their final order, and refusals known before anything is read.

    The order is by key hash. A source without splits of its own gives the first `test_share` of it to the test
    split. Where a key is listed twice the first row counts. Splits without images are left out.
    """
    ruled_out, placed = Rows(REFUSALS), Rows(_PLACED)
    for chunk in listing.ruled_out.chunks():
        ruled_out.add(chunk)
    by_hash, loose = Rows(LISTING_SCHEMA), 0
    for chunk in listing.rows.chunks():
        hashes = key_hashes(chunk["key"].to_pylist(), section.seed)
        placed.add(pa.table([*chunk.columns, pa.array(hashes)], schema=_PLACED))
    for chunk in in_order(placed, "hash"):
        again = _again(chunk)
        if again.any():
            keys = chunk["key"].filter(pa.array(again)).to_pylist()
            ruled_out.add(refusal_table(Refusal(key, "key listed twice") for key in keys))
            chunk = chunk.filter(pa.array(~again))
        loose += chunk["split"].null_count
        by_hash.add(chunk.select(LISTING_SCHEMA.names))
    del placed
    cut = test_images(loose, section)
    rows, counts, learnt = Rows(LISTING_SCHEMA), {}, set[int]()
    for split, chosen in (("train", lambda place: place >= cut), ("test", lambda place: place < cut)):
        before = rows.num_rows
        for chunk in _limited(_of_split(by_hash, split, chosen), section.limit):
            rows.add(chunk)
            if split == "train":
                learnt.update(chunk["label"].unique().to_pylist())
        if rows.num_rows > before:
            counts[split] = rows.num_rows - before
    return Order(rows, counts, frozenset(learnt), ruled_out)


def test_images(loose: int, section: Shard) -> int:
    """How many of the images that are of no split are set aside for testing."""
    cut = round(section.test_share * loose)
    return max(1, cut) if section.test_share > 0 and loose > 1 else cut


def key_hashes(keys: list[str], seed: int) -> np.ndarray:
    """uint64 (N,): the place of each key in the global order."""
    salt = seed.to_bytes(8, "little", signed=True)
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8, key=salt).digest() for key in keys)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


def _again(chunk: pa.Table) -> np.ndarray:
    """bool (N,): whether a row's key is that of an earlier row; rows come in the order of their hashes."""
    hashes, keys = chunk["hash"].to_numpy(), chunk["key"]
    again = np.zeros(len(hashes), bool)
    run, seen = -1, set[str]()
    for place in np.flatnonzero(hashes[1:] == hashes[:-1]).tolist():
        if int(hashes[place]) != run:
            run, seen = int(hashes[place]), {keys[place].as_py()}
        key = keys[place + 1].as_py()
        again[place + 1] = key in seen
        seen.add(key)
    return again


def _of_split(rows: Rows, split: str, chosen: Callable[[np.ndarray], np.ndarray]) -> Iterator[pa.Table]:
    """Rows that the source gives to a split, and those of none whose place among their like is chosen."""
    seen = 0
    for chunk in rows.chunks():
        loose = pc.is_null(chunk["split"]).to_numpy()
        places = seen + np.cumsum(loose) - 1
        seen += int(loose.sum())
        own = pc.fill_null(pc.equal(chunk["split"], split), False).to_numpy()
        yield chunk.filter(pa.array(own | (loose & chosen(places))))


def _limited(tables: Iterator[pa.Table], limit: int | None) -> Iterator[pa.Table]:
    left = limit
    for table in tables:
        if left is not None:
            table = table.slice(0, left)
            left -= table.num_rows
        yield table
        if left == 0:
            return
