"""Row groups of an artifact's Parquet parts, read by position and checked."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa

from configs.errors import UserError
from infra.artifacts import Artifact
from infra.home import home
from infra.storage import FileEntry
from tasks.buffers import Buffers
from tasks.cache import copy_name, fetch
from tasks.latents import is_tensor, tensor_shape, to_numpy
from tasks.part_file import PartFile, Stamp, read_span, stamp

_KNOWN_PARTS = 1024
"""Footers that are remembered; none holds a file open."""
_NEW, _DECODED, _DIRECT = range(3)
"""Of a group: not read yet; pyarrow decodes it; its fixed-width columns are where they should lie."""
_KEPT_GROUPS = 1024
"""Row groups' memory of one size that is used again: more than the windows of a stream refer to at once."""


@dataclass(frozen=True)
class Group:
    """Consecutive rows of some columns, in memory."""

    columns: dict[str, np.ndarray | pa.Array]
    """Tensors (rows, values) in their dtype and `label` (rows,) as numpy arrays, other columns as pyarrow's."""

    @property
    def labels(self) -> np.ndarray:
        return self.columns["label"]

    def items(self, name: str, rows: slice) -> list[Any]:
        """Rows of a column: flat numpy views of a tensor's values, `bytes` or `str` otherwise."""
        found = self.columns[name][rows]
        return list(found) if isinstance(found, np.ndarray) else found.to_pylist()


class GroupReader:
    """Reads any row group of one split; damaged files are refused by name.

    The first reading of a group in a process goes through pyarrow's decoder and checks its checksums. After that its
    fixed-width columns are read straight from where they were found to lie byte for byte, as long as the file stays
    the same by size and time of change.

    columns: names to read; `label` should be among them.
    shapes: what tensor columns must be, from the manifest.
    cache_bytes: keep remote parts on local disk up to this size; 0 reads them in place.
    pool: threads that share the reading of a large group.
    """

    def __init__(
        self,
        artifact: Artifact,
        split: str,
        columns: Sequence[str],
        shapes: dict[str, tuple[int, ...]],
        cache_bytes: int = 0,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        self.artifact, self.columns, self.shapes = artifact, list(columns), shapes
        self.parts = [e for e in artifact.files(f"{split}/", ".parquet") if e.rows]
        self._rows_per_group = per_group = int(artifact.manifest.facts["rows_per_group"])
        self.index = [
            (part, group, min(per_group, (entry.rows or 0) - group * per_group))
            for part, entry in enumerate(self.parts)
            for group in range(-(-(entry.rows or 0) // per_group))
        ]
        """(part, row group in it, rows) of every group, known without opening a file."""
        self._known: OrderedDict[int, PartFile] = OrderedDict()
        self._stamps: dict[int, Stamp | None] = {}
        self._state = np.full(len(self.index), _NEW, np.uint8)
        self._cache_bytes, self._pool = cache_bytes, pool
        self._memory = Buffers(_KEPT_GROUPS)
        self._lock = Lock()

    @property
    def group_rows(self) -> tuple[int, ...]:
        return tuple(rows for _, _, rows in self.index)

    def read(self, number: int) -> Group:
        """Group `number` of :attr:`index`. Raises UserError naming a file that is missing, cut off or damaged."""
        entry = self.parts[self.index[number][0]]
        with self._lock:  # streams of one loader share buffers and remote files: they take turns
            try:
                return self._read(number)
            except _Damaged:
                copy = self._copy(entry)
                if copy is None or not copy.exists():
                    raise
                copy.unlink()  # it may be damaged where the part is not
                return self._read(number)

    def _read(self, number: int) -> Group:
        part, group, rows = self.index[number]
        entry = self.parts[part]
        try:
            with self._opened(part) as file:
                known = self._part_file(number, file)
                new = self._state[number] == _NEW
                direct = {} if self._state[number] == _DECODED else self._direct(known, file, group, rows)
                names = [name for name in self.columns if new or name not in direct]
                # Checksums cost more than the reading itself: what was right needs no second look.
                table = known.decoded(file, group, names, verify=new) if names else None
        except FileNotFoundError:
            raise self._damaged(entry, "the file is missing") from None
        except (OSError, EOFError, pa.ArrowException) as error:
            raise self._damaged(entry, str(error)) from None
        if table is None:
            return Group(direct)
        if table.num_rows != rows:
            raise self._damaged(entry, f"row group {group} has {table.num_rows} rows, expected {rows}")
        decoded = {name: _values(table, name) for name in names}
        if new:
            agree = all(np.array_equal(values, decoded[name]) for name, values in direct.items())
            self._state[number] = _DIRECT if agree else _DECODED
        return Group(direct | decoded)

    def _direct(self, known: PartFile, file: Any, group: int, rows: int) -> dict[str, np.ndarray]:
        """The fixed-width columns of a local file, from where their values should lie."""
        found: dict[str, np.ndarray] = {}
        for name in self.columns if isinstance(file, FileIO) else ():
            if (span := known.span(group, name, rows)) is None:
                continue
            offset, size = span
            memory = self._memory.take((size // rows * self._rows_per_group,), np.uint8)[:size]
            read_span(file, offset, memory, self._pool)
            values = memory.view(known.dtype(name)).reshape(rows, -1)
            found[name] = values if name in known.tensors else values[:, 0]
        return found

    def _opened(self, part: int) -> Any:
        """The part's file, or its local copy, of the size that the manifest says."""
        entry, storage = self.parts[part], self.artifact.storage
        if copy := self._copy(entry):
            return fetch(self.artifact, entry, copy, self._cache_bytes)
        where = storage.locate(entry.path)
        if storage.local:
            file = FileIO(where)
            self._check_size(entry, os.fstat(file.fileno()).st_size)
            return file
        if part not in self._known:
            self._check_size(entry, storage.size(entry.path))
        # Groups are read in one request each; a read-ahead would fetch much that is not asked for.
        return storage.fs.open(where, "rb", cache_type="none", size=entry.bytes)

    def _check_size(self, entry: FileEntry, size: int) -> None:
        if size != entry.bytes:
            raise self._damaged(entry, f"{size} bytes, the manifest says {entry.bytes}")

    def _part_file(self, number: int, file: Any) -> PartFile:
        """What is known of a group's part; all is forgotten where the file is another one than before."""
        part, group, _ = self.index[number]
        mark = stamp(file) if isinstance(file, FileIO) else None
        if self._stamps.setdefault(part, mark) != mark:
            self._stamps[part] = mark
            self._known.pop(part, None)
            first = number - group
            self._state[first : first + -(-(self.parts[part].rows or 0) // self._rows_per_group)] = _NEW
        if part not in self._known:
            known = PartFile(file)
            self._check_schema(known.schema, self.parts[part])
            self._known[part] = known
            if len(self._known) > _KNOWN_PARTS:
                self._known.popitem(last=False)
        self._known.move_to_end(part)
        return self._known[part]

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


def _values(table: pa.Table, name: str) -> np.ndarray | pa.Array:
    """A decoded column as :class:`Group` holds it."""
    column, field = table[name].combine_chunks(), table.schema.field(name)
    if is_tensor(field):
        return to_numpy(column, field).reshape(len(column), -1)
    return column.to_numpy() if pa.types.is_integer(field.type) else column
