"""Images of a shard by their class or a part of their key, and the tables beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from configs.errors import UserError, brief
from infra.artifacts import Artifact
from tasks.data.decode import Undecodable, decode

_NAMES = ["key", "label"]
Wanted = Callable[[pa.Table], Any]
"""Which rows of a table with `key` and `label`, as a boolean column."""


@dataclass(frozen=True)
class Shown:
    """One image of a shard."""

    key: str
    label: int
    data: bytes
    """The encoded file."""

    def picture(self, side: int) -> Image.Image:
        """The image made to fit a square; small ones enlarged by whole pixels, grey where it does
        not decode."""
        try:
            image = decode(self.data)
        except Undecodable:
            return Image.new("RGB", (side, side), "#888888")
        image.thumbnail((side, side))
        times = max(1, side // max(image.size))
        return image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)


def of_class(label: int | None) -> Wanted:
    """Images of a class; None is all."""
    return lambda table: pa.array(np.ones(len(table), bool)) if label is None else pc.equal(table["label"], label)


def with_key(text: str) -> Wanted:
    """Images whose key holds this text, in any case of its letters."""
    return lambda table: pc.match_substring(table["key"], text, ignore_case=True)


def one_of(keys: Sequence[str]) -> Wanted:
    """Images of these keys."""
    return lambda table: pc.is_in(table["key"], pa.array(keys, pa.string()))


def find(shard: Artifact, split: str, wanted: Wanted, count: int, skip: int = 0) -> list[Shown]:
    """At most `count` images in the shard's order, after `skip` of them; an empty split has none.

    Of a file the columns of keys and labels are read, and the row groups with what is shown; none
    after enough.

    Raises:
        UserError: the shard is gone, or a file is damaged.
    """
    found: list[Shown] = []
    for entry in shard.files(f"{split}/", ".parquet"):
        try:
            with shard.storage.open(entry.path) as opened:
                file = pq.ParquetFile(opened)
                places = np.flatnonzero(wanted(file.read(columns=_NAMES)).to_numpy(zero_copy_only=False))
                here = places[skip : skip + count - len(found)]
                skip = max(0, skip - len(places))
                found += _read(file, here)
        except (FileNotFoundError, pa.ArrowException) as error:
            said = brief(error, 160)
            raise UserError(f"{shard.uri}/{entry.path} cannot be read ({said})") from None
        if len(found) >= count:
            break
    return found


def table_beside(shard: Artifact, name: str, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of a table in the artifact, `quarantine.parquet` or
    `duplicates.parquet`."""
    if not shard.files(name):
        return []
    with shard.storage.open(name) as opened:
        rows = next(pq.ParquetFile(opened).iter_batches(count), None)
    return [] if rows is None else list(rows.to_pylist())


def _read(file: pq.ParquetFile, places: np.ndarray) -> list[Shown]:
    """Rows of a file by their number, ascending."""
    found: list[Shown] = []
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        here = places[(places >= first) & (places < first + rows)] - first
        if len(here):
            table = file.read_row_group(group, columns=[*_NAMES, "image"]).take(pa.array(here))
            found += [Shown(row["key"], row["label"], row["image"]) for row in table.to_pylist()]
        first += rows
    return found
