"""Row groups of an artifact's Parquet parts, read with pyarrow; of local files they are views of the page cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import UserError
from infra.artifacts import Artifact
from infra.home import home
from infra.storage import FileEntry
from tasks.cache import copy_name, fetch
from tasks.latents import is_tensor, tensor_dtype, tensor_shape, values_in_file

_OPEN_FILES = 64
_MAPPED_FILES = 1024
"""Mapped files hold no file descriptor and no memory of their own."""


@dataclass(frozen=True)
class Group:
    """Consecutive rows of some columns, in memory or in a mapped file."""

    columns: dict[str, pa.Array]
    dtypes: dict[str, np.dtype[Any]]
    """Of tensor columns."""

    @cached_property
    def labels(self) -> np.ndarray:
        return self.columns["label"].to_numpy()

    def items(self, name: str, rows: slice) -> list[Any]:
        """Rows of a column: flat numpy views of a tensor's values, `bytes` or `str` otherwise."""
        column = self.columns[name]
        if name not in self.dtypes:
            items: list[Any] = column[rows].to_pylist()
            return items
        dtype, width = self.dtypes[name], column.type.byte_width
        values = np.frombuffer(column.buffers()[1], dtype, len(column) * width // dtype.itemsize, column.offset * width)
        return list(values.reshape(len(column), -1)[rows])


class GroupReader:
    """Reads any row group of one split; damaged files are refused by name.

    The first reading of a group in a process goes through pyarrow's decoder and checks its checksums. After that its
    fixed-width columns are views of the mapped file, if they were found there byte for byte.

    columns: names to read; `label` should be among them.
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
        self.parts = [e for e in artifact.files(f"{split}/", ".parquet") if e.rows]
        per_group = int(artifact.manifest.facts["rows_per_group"])
        self.index = [
            (part, group, min(per_group, (entry.rows or 0) - group * per_group))
            for part, entry in enumerate(self.parts)
            for group in range(-(-(entry.rows or 0) // per_group))
        ]
        """(part, row group in it, rows) of every group, known without opening a file."""
        self._open: OrderedDict[int, _File] = OrderedDict()
        self._verified = np.zeros(len(self.index), bool)
        self._mappable = np.zeros(len(self.index), bool)
        self._cache_bytes = cache_bytes
        self._lock = Lock()

    @property
    def group_rows(self) -> tuple[int, ...]:
        return tuple(rows for _, _, rows in self.index)

    def read(self, number: int) -> Group:
        """Group `number` of :attr:`index`. Raises UserError naming a file that is missing, cut off or damaged."""
        part = self.index[number][0]
        with self._lock:  # a file object has one position: streams of one loader take turns
            try:
                return self._read(number)
            except _Damaged:
                copy = self._copy(self.parts[part])
                if copy is None or not copy.exists():
                    raise
                copy.unlink()  # it may be damaged where the part is not
                self._open.pop(part, None)
                return self._read(number)

    def _read(self, number: int) -> Group:
        part, group, rows = self.index[number]
        entry = self.parts[part]
        file = self._file(part, entry)
        columns = file.views(group, rows, self.columns)
        decoded = [name for name in self.columns if not self._mappable[number] or name not in columns]
        if decoded:
            try:
                # Checksums cost more than the reading itself: what was right in this process needs no second look.
                parquet = file.parquet(verify=not self._verified[number])
                table = parquet.read_row_group(group, columns=decoded, use_threads=False)
            except (OSError, pa.ArrowException) as error:
                raise self._damaged(entry, str(error)) from None
            if table.num_rows != rows:
                raise self._damaged(entry, f"row group {group} has {table.num_rows} rows, expected {rows}")
            found = {name: _one_chunk(table[name]) for name in decoded}
            if not self._verified[number]:
                self._mappable[number] = all(view.equals(found[name]) for name, view in columns.items())
                self._verified[number] = True
            columns = found | columns if self._mappable[number] else found
        return Group(columns, file.dtypes)

    def _file(self, part: int, entry: FileEntry) -> _File:
        if part in self._open:
            self._open.move_to_end(part)
            return self._open[part]
        storage = self.artifact.storage
        try:
            if copy := self._copy(entry):
                fetch(self.artifact, entry, copy, self._cache_bytes)
                file = _File(_mapped(str(copy)))
            else:
                size = storage.size(entry.path)
                if size != entry.bytes:
                    raise self._damaged(entry, f"{size} bytes, the manifest says {entry.bytes}")
                where = storage.locate(entry.path)
                # Groups are read in one request each; a read-ahead would fetch much that is not asked for.
                file = _File(_mapped(where) if storage.local else storage.fs.open(where, "rb", cache_type="none"))
            self._check_schema(file.schema, entry)
        except FileNotFoundError:
            raise self._damaged(entry, "the file is missing") from None
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(entry, str(error)) from None
        self._open[part] = file
        if len(self._open) > (_OPEN_FILES if file.mapped is None else _MAPPED_FILES):
            self._open.popitem(last=False)
        return file

    def _copy(self, entry: FileEntry) -> Path | None:
        """Where a part's local copy is or will be; None where it is read in place."""
        cached = not self.artifact.storage.local and entry.bytes <= self._cache_bytes
        return home() / "cache" / copy_name(entry) if cached else None

    def _check_schema(self, schema: pa.Schema, entry: FileEntry) -> None:
        for name in self.columns:
            if name not in schema.names:
                raise UserError(
                    f"{self.artifact.uri}/{entry.path} has no column {name!r}; it has {', '.join(schema.names)}"
                )
            if name not in self.shapes:
                continue
            shape = tensor_shape(schema.field(name))
            if shape != self.shapes[name]:
                raise UserError(
                    f"{self.artifact.uri}/{entry.path}: column {name!r} has shape {shape} but the manifest says "
                    f"{self.shapes[name]}; run the flow again with --force {self.artifact.stage}"
                )

    def _damaged(self, entry: FileEntry, what: str) -> UserError:
        return _Damaged(
            f"{self.artifact.uri}/{entry.path} is damaged ({' '.join(what.split())[:200]}); run the flow again with "
            f"--force {self.artifact.stage}"
        )


class _Damaged(UserError):
    """A file is not what the manifest says."""


class _File:
    """An open part: a mapped local file, or a remote one. Its footer is read once."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.mapped: pa.Buffer | None = source if isinstance(source, pa.Buffer) else None
        self.metadata = self._opened().metadata
        self.schema = self.metadata.schema.to_arrow_schema()
        self.dtypes = {field.name: tensor_dtype(field) for field in self.schema if is_tensor(field)}
        self._parquet: tuple[bool, pq.ParquetFile] | None = None
        self._spans: dict[str, list[tuple[int, int]] | None] = {}

    def parquet(self, verify: bool) -> pq.ParquetFile:
        if self._parquet is None or self._parquet[0] != verify:
            self._parquet = (verify, self._opened(metadata=self.metadata, page_checksum_verification=verify))
        return self._parquet[1]

    def views(self, group: int, rows: int, names: Sequence[str]) -> dict[str, pa.Array]:
        """The fixed-width columns among `names` where they should lie in the mapped file; see values_in_file."""
        found: dict[str, pa.Array] = {}
        if self.mapped is None:
            return found
        for name in names:
            if name not in self._spans:
                self._spans[name] = values_in_file(self.metadata, name)
            spans = self._spans[name] or []
            kind = self.schema.field(name).type
            offset, size = spans[group] if group < len(spans) else (0, 0)
            if size and size == rows * kind.bit_width // 8 and offset + size <= self.mapped.size:
                found[name] = pa.Array.from_buffers(kind, rows, [None, self.mapped.slice(offset, size)])
        return found

    def _opened(self, **options: Any) -> pq.ParquetFile:
        whole = self.mapped is not None
        return pq.ParquetFile(pa.BufferReader(self.source) if whole else self.source, pre_buffer=not whole, **options)


def _mapped(path: str) -> pa.Buffer:
    """A file's bytes in the page cache. The mapping lives as long as something refers to the buffer."""
    with pa.memory_map(path) as file:
        return file.read_buffer()


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
