"""Row groups of an artifact's Parquet parts: read by position, checked, refused by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import UserError
from infra.artifacts import Artifact
from infra.disk_cache import copy_name, fetch
from infra.home import home
from infra.storage import FileEntry
from tasks.data.tensors import is_tensor, tensor_dtype, tensor_shape, to_numpy

Columns = dict[str, np.ndarray | list[Any]]
"""Of a row group: tensors as (rows, values) in their dtype, other columns as Python's values."""
Stamp = tuple[int, ...]
"""Inode, bytes and time of change of a local file, which is the same while they are; else empty."""
_FOOTERS = 1024
"""At most so many are remembered."""


class RowGroupReader:
    """Reads any row group of one split, several at once where threads ask.

    The first reading of a group in a process checks its pages' checksums. Later ones do not (they
    cost more than the reading), unless the file is another one by then. Files are read, never
    mapped: a process that reads a mapped file dies without a word when the file is cut off.

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
        self.parts = [entry for entry in artifact.files(f"{split}/", ".parquet") if entry.rows]
        self.rows_per_group = per_group = int(artifact.manifest.facts["rows_per_group"])
        self.index = [
            (part, group, min(per_group, (entry.rows or 0) - group * per_group))
            for part, entry in enumerate(self.parts)
            for group in range(-(-(entry.rows or 0) // per_group))
        ]
        """(part, row group in it, rows) of every group by its number, known from the manifest."""
        self.group_rows = tuple(rows for _, _, rows in self.index)
        self._cache_bytes = cache_bytes
        self._footers: dict[int, tuple[Stamp, pq.FileMetaData]] = {}
        self._verified: dict[int, Stamp] = {}
        self._fetching = Lock()

    def read(self, number: int) -> Columns:
        """Raises UserError naming a file that is missing, cut off, damaged or of another schema."""
        try:
            return self._read(number)
        except _Damaged:
            if (copy := self._copy(self.parts[self.index[number][0]])) is None:
                raise
            copy.unlink(missing_ok=True)  # it may be damaged where the part is not
            return self._read(number)

    def _read(self, number: int) -> Columns:
        part, group, rows = self.index[number]
        entry = self.parts[part]
        try:
            with self._open(part) as file:
                stamp = _stamp(file)
                parquet = pq.ParquetFile(
                    file,
                    metadata=self._footer(part, stamp, file),
                    page_checksum_verification=self._verified.get(number) != stamp,
                    pre_buffer=not stamp,  # of a remote file all columns in one request
                )
                table = parquet.read_row_group(group, columns=self.columns, use_threads=False)
        except FileNotFoundError:
            raise self._damaged(entry, "the file is missing") from None
        except (OSError, EOFError, pa.ArrowException) as error:
            raise self._damaged(entry, str(error)) from None
        if (count := table.num_rows) != rows:
            raise self._damaged(entry, f"row group {group} has {count} rows, expected {rows}")
        self._verified[number] = stamp
        return {name: _values(table, name) for name in self.columns}

    def _open(self, part: int) -> Any:
        """The part's file, or its local copy, of the size that the manifest says."""
        entry, storage = self.parts[part], self.artifact.storage
        if copy := self._copy(entry):
            with self._fetching:  # one part at a time in memory
                return fetch(self.artifact, entry, copy, self._cache_bytes)
        if not storage.local:  # of another size, it has no footer where it is looked for
            options = {"cache_type": "none", "size": entry.bytes}
            return storage.fs.open(storage.locate(entry.path), "rb", **options)
        file = FileIO(storage.locate(entry.path))
        if (size := os.fstat(file.fileno()).st_size) != entry.bytes:
            raise self._damaged(entry, f"{size} bytes, the manifest says {entry.bytes}")
        return file

    def _copy(self, entry: FileEntry) -> Path | None:
        """Where a part's local copy is or will be; None where it is read in place."""
        cached = not self.artifact.storage.local and entry.bytes <= self._cache_bytes
        return home() / "cache" / copy_name(entry) if cached else None

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

    def _damaged(self, entry: FileEntry, what: str) -> UserError:
        return _Damaged(
            f"{self.artifact.uri}/{entry.path} is damaged ({' '.join(what.split())[:200]}); "
            f"run the flow again with --force {self.artifact.stage}"
        )


class _Damaged(UserError):
    """A file is not what the manifest says."""


def _stamp(file: Any) -> Stamp:
    if not isinstance(file, FileIO):
        return ()
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


def _values(table: pa.Table, name: str) -> np.ndarray | list[Any]:
    column, field = table[name], table.schema.field(name)
    if is_tensor(field):
        return to_numpy(column, field).reshape(len(column), -1)
    return column.to_pylist()  # type: ignore[no-any-return]
