"""What `shard` needs of a pile of images: who is in it, and the bytes of each.

A source never decodes: it lists rows and hands out encoded bytes, so one decoder and one set of rules
serve every kind. Sources are small frozen dataclasses, picklable, and safe to call from several threads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.data.rows import Rows, in_order, table_of

LISTING_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("split", pa.string()),
        pa.field("file", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
    ]
)
"""One row per image. `split` is train, test, or null where the source has no split of its own; `file`, `start`
and `length` mean what the source's `read` wants them to mean (a byte range wherever the kind allows;
length 0 where it is not known)."""
Row = tuple[str, int, str | None, str, int, int]
_AT_ONCE = 50_000


@dataclass(frozen=True, order=True)
class Refusal:
    """An image that is left out, and why."""

    key: str
    reason: str
    """A short phrase that can be counted, e.g. `truncated`."""
    detail: str = ""


REFUSALS = pa.schema([("key", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
"""One row per :class:`Refusal`."""


def refusal_table(refused: Iterable[Refusal]) -> pa.Table:
    """Refusals as a table of :data:`REFUSALS`."""
    return table_of(((one.key, one.reason, one.detail) for one in refused), REFUSALS)


@dataclass(frozen=True)
class Listing:
    """All images of a source, and what it holds besides."""

    rows: Rows
    """Of :data:`LISTING_SCHEMA`, one per image."""
    classes: tuple[str, ...]
    """Class names by label."""
    ruled_out: Rows = field(default_factory=lambda: Rows(REFUSALS))
    """Of :data:`REFUSALS`: images that the listing itself already rules out."""
    notes: tuple[str, ...] = ()
    """Remarks for people, such as a class that the test split lacks."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Files that are no images of the source, by what they are, e.g. `system leftovers`."""
    faults: tuple[str, ...] = ()
    """What makes the source unfit whatever the recipe says, each with the way out."""
    identity: str = ""
    """A hash of what was listed: names, sizes and labels; no times, no places."""

    @property
    def images(self) -> pa.Table:
        """All rows in memory."""
        return self.rows.table()

    def refusals(self) -> Iterator[Refusal]:
        """What is ruled out, sorted."""
        for chunk in in_order(self.ruled_out, *REFUSALS.names):
            yield from map(Refusal, *(chunk[name].to_pylist() for name in REFUSALS.names))

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """All that is ruled out in memory, sorted."""
        return tuple(self.refusals())


class Reader(Protocol):
    """Hands out encoded images; called from several threads."""

    def read(self, file: str, start: int, length: int) -> bytes:
        """The encoded image of one row of the listing, at most `length` bytes of it.

        Raises OSError or UserError when it cannot be read.
        """
        ...


class Source(Reader, Protocol):
    """A pile of labelled images."""

    def check_there(self) -> None:
        """A cheap look whether anything lies where the recipe says. Raises UserError where nothing does."""
        ...

    def identity(self) -> str:
        """A name for this exact content, independent of where it lies. Raises UserError if it is missing."""
        ...

    def listing(self) -> Listing:
        """Every image, in any fixed order. Raises UserError when the source is missing or not of this kind."""
        ...


@runtime_checkable
class ScannedSource(Source, Protocol):
    """One whose images have no place of their own in a file: a row of the listing has its row there
    as `start`, and :mod:`tasks.sources.unpack` makes byte ranges of them."""

    def scan(self, file: str) -> Iterator[bytes]:
        """The encoded images of one file, row by row."""
        ...

    def contents(self, file: str) -> pa.Table:
        """A column `content`: :func:`content_of` each image of one file, row by row, remembered until it changes."""
        ...


def content_of(image: bytes) -> bytes:
    """8 bytes that tell encoded images apart (BLAKE2b)."""
    return hashlib.blake2b(image, digest_size=8).digest()


def listed_rows(rows: Iterable[Row]) -> Rows:
    """Rows (key, label, split, file, start, length) as :class:`Listing` holds them."""
    found = Rows(LISTING_SCHEMA)
    for row in rows:
        found.append(*row)
    return found


def identity_of(kind: str, names: Mapping[str, int | str] | Sequence[tuple[str, int | str]]) -> str:
    """A hash of a listing: names with sizes or checksums, in sorted order."""
    return identity_of_sorted(kind, sorted(names.items() if isinstance(names, Mapping) else names))


def identity_of_sorted(kind: str, pairs: Iterable[tuple[str, int | str]]) -> str:
    """The same of pairs that come in order, of which few are in memory: a hash of `[kind, pairs]` as JSON."""
    digest, left, before = hashlib.sha256(f"[{json.dumps(kind)}, [".encode()), iter(pairs), ""
    while some := list(islice(left, _AT_ONCE)):
        digest.update(f"{before}{json.dumps(some)[1:-1]}".encode())
        before = ", "
    digest.update(b"]]")
    return digest.hexdigest()[:32]


def identity_of_rows(kind: str, rows: Rows, classes: Sequence[str], ruled_out: Rows, sizes: Iterable[int] = ()) -> str:
    """A hash of what a listing says: keys, labels, splits and lengths, the classes, and what is ruled out.

    Where images lie (file and start) is not in it. `sizes` are those of the files, where rows have no lengths.
    """
    digest = hashlib.sha256(json.dumps([kind, list(classes), sorted(sizes)]).encode())
    for chunk in in_order(rows, "key"):
        texts = [pc.cast(chunk[name], pa.string()).fill_null("None") for name in ("key", "label", "split", "length")]
        digest.update(_joined(texts, "\0"))
    for chunk in in_order(ruled_out, *REFUSALS.names):
        digest.update(_joined([chunk["key"], chunk["reason"]], "\0"))
    return digest.hexdigest()[:32]


def _joined(columns: Sequence[pa.ChunkedArray], between: str) -> memoryview:
    """UTF-8 of a line for each row."""
    lines = pc.binary_join_element_wise(pc.binary_join_element_wise(*columns, between), "", "\n")
    values = pa.chunked_array(lines).combine_chunks()
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
    return memoryview(data)[ends[0] : ends[-1]]
