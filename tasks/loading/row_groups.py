"""Row groups of an artifact's Parquet parts: read by position, checked, refused by name."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from io import FileIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import UserError, brief
from infra.artifacts import Artifact
from infra.disk_cache import copy_path, open_part
from infra.storage import FileEntry
from tasks.data.plain_pages import PlainPage, plain_pages, take
from tasks.data.tensors import column_values, tensor_dtype, tensor_shape

Columns = dict[str, np.ndarray]
"""Of some rows: tensors float16 (n, values), `label` int32 (n,), others Python's values (n,)."""
Wanted = dict[str, tuple[np.ndarray, np.ndarray]]
"""By column: rows of a row group, int (n,) ascending, and the memory that they go to."""
Stamp = tuple[int, ...]
"""Inode, bytes and time of change of a local file, which is the same while they are; else empty."""
_FOOTERS = 1024  # are remembered at most


class RowGroupReader:
    """Reads any row group of one split, several at once where threads ask.

    The first reading of a group in a process checks its pages' checksums. Later ones do not (they
    cost more than the reading), unless the file is another one by then. Files are read, never
    mapped: a process that reads a mapped file dies without a word when the file is cut off.
    Numbers that lie in a local file as in memory go straight to their place; of other columns the
    whole group is decoded.

    columns: names to read.
    shapes: what tensor columns must be, from the manifest.
    cache_bytes: keep remote parts on local disk up to this size; 0 reads them in place.
    """

    def __init__(
        self,
        artifact: Artifact,
        split: str,
        columns: Sequence[str],
        shapes: dict[str, tuple[int, ...]],
        cache_bytes: int = 0,
    ) -> None:
        self.artifact, self.columns, self.shapes = artifact, list(columns), shapes
        self.cache_bytes = cache_bytes
        self.parts = [entry for entry in artifact.files(f"{split}/", ".parquet") if entry.rows]
        self.rows_per_group = per_group = int(artifact.manifest.facts["rows_per_group"])
        self.index = [
            (part, group, min(per_group, (entry.rows or 0) - group * per_group))
            for part, entry in enumerate(self.parts)
            for group in range(-(-(entry.rows or 0) // per_group))
        ]
        """(part, row group in it, rows) of every group by its number, known from the manifest."""
        self.group_rows = tuple(rows for _, _, rows in self.index)
        self._footers: dict[int, tuple[Stamp, pq.FileMetaData]] = {}
        self._verified: dict[int, tuple[Stamp, dict[str, PlainPage]]] = {}
        """By group: the file whose checksums were right, and its columns that are plain."""
        rows = {name: self.empty(name, 1) for name in columns}
        self._row_bytes = {name: row.nbytes for name, row in rows.items() if row.dtype != object}

    def empty(self, name: str, rows: int) -> np.ndarray:
        """Memory for rows of a column."""
        if name in self.shapes:
            return np.empty((rows, math.prod(self.shapes[name])), np.float16)
        return np.empty(rows, np.int32 if name == "label" else object)

    def read(self, number: int, wanted: Wanted, kept: Columns | None = None) -> Columns:
        """Put rows of row group `number` where they are wanted.

        Returns what was decoded of the group, which is not decoded again where a later call has it
        as `kept`. Raises UserError naming a file that is missing, cut off, damaged or of another
        schema.
        """
        kept = kept or {}
        try:
            kept = self._read(number, wanted, kept)
        except _Damaged:
            entry = self.parts[self.index[number][0]]
            if (copy := copy_path(self.artifact, entry, self.cache_bytes)) is None:
                raise
            copy.unlink(missing_ok=True)  # it may be damaged where the part is not
            kept = self._read(number, wanted, kept)
        for name in kept.keys() & wanted:
            take(kept[name], *wanted[name])
        return kept

    def _read(self, number: int, wanted: Wanted, kept: Columns) -> Columns:
        """Put what is plain where it is wanted, decode the rest."""
        if kept and kept.keys() >= wanted.keys():
            return kept
        part, group, rows = self.index[number]
        entry = self.parts[part]
        try:
            with open_part(self.artifact, entry, self.cache_bytes) as file:
                stamp = _stamp(file)
                metadata = self._footer(part, stamp, file)
                verified, pages = self._verified.get(number, (None, {}))
                if first := verified != stamp:
                    if (count := metadata.row_group(group).num_rows) != rows:
                        raise EOFError(f"row group {group} has {count} rows, expected {rows}")
                    pages = plain_pages(file, metadata, group, self._row_bytes) if stamp else {}
                for name in pages.keys() & wanted:
                    pages[name].read(file, *wanted[name])
                if rest := [name for name in self.columns if name not in pages | kept]:
                    parquet = pq.ParquetFile(
                        file,
                        metadata=metadata,
                        page_checksum_verification=first,
                        pre_buffer=not stamp,  # of a remote file all columns in one request
                    )
                    table = parquet.read_row_group(group, columns=rest, use_threads=False)
                    kept = kept | {name: column_values(table, name) for name in rest}
        except (OSError, EOFError, IndexError, pa.ArrowException) as error:
            missing = isinstance(error, FileNotFoundError)
            what = "the file is missing" if missing else brief(error)
            raise _Damaged(
                f"{self.artifact.uri}/{entry.path} is damaged ({what}); "
                f"run the flow again with --force {self.artifact.stage}"
            ) from None
        self._verified[number] = stamp, pages
        return kept

    def _footer(self, part: int, stamp: Stamp, file: Any) -> pq.FileMetaData:
        """What the footer of a part's file says, with the columns that the manifest says."""
        known_stamp, metadata = self._footers.get(part, (None, None))
        if known_stamp != stamp:
            metadata = pq.ParquetFile(file).metadata
            self._check_schema(metadata.schema.to_arrow_schema(), self.parts[part])
            if len(self._footers) >= _FOOTERS:
                self._footers.clear()
            self._footers[part] = (stamp, metadata)
        return metadata

    def _check_schema(self, schema: pa.Schema, entry: FileEntry) -> None:
        where = f"{self.artifact.uri}/{entry.path}"
        for name in self.columns:
            if name not in schema.names:
                raise UserError(f"{where} has no column {name!r}; it has {', '.join(schema.names)}")
            if name not in self.shapes:
                continue
            field, expected = schema.field(name), f"{self.shapes[name]} float16"
            if (stored := f"{tensor_shape(field)} {tensor_dtype(field)}") != expected:
                raise UserError(
                    f"{where}: column {name!r} has shape {stored} but the manifest says "
                    f"{expected}; run the flow again with --force {self.artifact.stage}"
                )


class _Damaged(UserError):
    """A file is not what the manifest says."""


def _stamp(file: Any) -> Stamp:
    if not isinstance(file, FileIO):
        return ()
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns
