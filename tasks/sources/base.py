"""What `shard` needs of a pile of images: who is in it, and the bytes of each.

A source never decodes: it lists rows and hands out encoded bytes, so one decoder and one set of rules
serve every kind. Sources are small frozen dataclasses, picklable, and safe to call from several threads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

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
and `length` mean what the source's `read` wants them to mean (a byte range wherever the kind allows; length 0 where it
is not known)."""


@dataclass(frozen=True, order=True)
class Refusal:
    """An image that is left out, and why."""

    key: str
    reason: str
    """A short phrase that can be counted, e.g. `truncated`."""
    detail: str = ""


@dataclass(frozen=True)
class Listing:
    """All images of a source."""

    images: pa.Table
    """Rows of :data:`LISTING_SCHEMA`."""
    classes: tuple[str, ...]
    """Class names by label."""
    refused: tuple[Refusal, ...] = ()
    """What the listing itself already rules out."""
    notes: tuple[str, ...] = ()
    """Remarks for people, such as a class without images."""


class Reader(Protocol):
    """Hands out encoded images; called from several threads."""

    def read(self, file: str, start: int, length: int) -> bytes:
        """The encoded image of one row of the listing, at most `length` bytes of it.

        Raises OSError or UserError when it cannot be read.
        """
        ...


class Source(Reader, Protocol):
    """A pile of labelled images.

    A kind whose images have no place of their own also has `scan(file)`, which gives the images of one file row by
    row; `start` is then the row, and :mod:`tasks.sources.unpack` makes byte ranges of them.
    """

    def identity(self) -> str:
        """A cheap name for this exact content, independent of where it lies. Raises UserError if it is missing."""
        ...

    def listing(self) -> Listing:
        """Every image, in any fixed order. Raises UserError when the source is missing or not of this kind."""
        ...


def listing_table(rows: Iterable[tuple[str, int, str | None, str, int, int]]) -> pa.Table:
    """Rows (key, label, split, file, start, length) as a table of :data:`LISTING_SCHEMA`."""
    columns = list(zip(*rows, strict=True)) or [()] * len(LISTING_SCHEMA)
    return pa.table(
        [pa.array(values, field.type) for values, field in zip(columns, LISTING_SCHEMA, strict=True)],
        schema=LISTING_SCHEMA,
    )


def identity_of(kind: str, names: Mapping[str, int | str] | Sequence[tuple[str, int | str]]) -> str:
    """A hash of a listing: names with sizes or checksums, in sorted order."""
    pairs = sorted(names.items() if isinstance(names, Mapping) else names)
    return hashlib.sha256(json.dumps([kind, pairs]).encode()).hexdigest()[:32]
