"""Row groups of an artifact's Parquet parts, read by position and checked."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from tasks.data.tensors import is_tensor, tensor_dtype, tensor_shape, to_numpy
from tasks.loading.disk_cache import copy_name, fetch
from tasks.loading.part_file import PartFile, Stamp, stamp
from tasks.loading.placement import Placement, read_into

_KNOWN_PARTS = 1024
"""Footers that are remembered; none holds a file open."""
_NEW, _DECODED, _DIRECT = range(3)
"""Of a group: not read yet; pyarrow decodes it; its fixed-width columns are where they should lie."""


@dataclass(frozen=True)
class Group:
    """Consecutive rows of the columns that had to be brought into memory as a whole."""

    columns: dict[str, np.ndarray | pa.Array]
    """Tensors (rows, values) in their dtype and `label` (rows,) as numpy arrays, other columns as pyarrow's."""

    @property
    def labels(self) -> np.ndarray:
        return self.columns["label"]

    def items(self, name: str, rows: slice) -> list[Any]:
        """Rows of a column of `bytes` or `str`."""
        return self.columns[name][rows].to_pylist()  # type: ignore[union-attr]

    def place(self, wanted: Mapping[str, Placement]) -> None:
        """Copy rows of tensor columns to where they are wanted."""
        for name, placement in wanted.items():
            placement.fill_from(self.columns[name])


class GroupReader:
    """Reads any row group of one split, several at once where threads ask; damaged files are refused by name.

    The first reading of a group in a process goes through pyarrow's decoder and checks its checksums. After that the
    wanted rows of its tensors are read straight from where they were found to lie byte for byte, as long as the file
    stays the same by size and time of change.

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
        self._rows_per_group = per_group = int(artifact.manifest.facts["rows_per_group"])
        self.index = [
            (part, group, min(per_group, (entry.rows or 0) - group * per_group))
            for part, entry in enumerate(self.parts)
            for group in range(-(-(entry.rows or 0) // per_group))
        ]
        """(part, row group in it, rows) of every group, known without opening a file."""
        self._known: OrderedDict[tuple[int, Stamp | None], PartFile] = OrderedDict()
        self._stamps: dict[int, Stamp | None] = {}
        self._state = np.full(len(self.index), _NEW, np.uint8)
        self._cache_bytes = cache_bytes
        self._lock, self._fetching = Lock(), Lock()

    @cached_property
    def group_rows(self) -> tuple[int, ...]:
        return tuple(rows for _, _, rows in self.index)

    def read(self, number: int, wanted: Mapping[str, Placement]) -> Group:
        """Put rows of group `number` of :attr:`index` where they are wanted, by tensor column.

        The group that comes back holds the other columns, and the tensors where they had to be decoded as a whole.
        Raises UserError naming a file that is missing, cut off or damaged.
        """
        entry = self.parts[self.index[number][0]]
        try:
            return self._read(number, wanted)
        except _Damaged:
            if (copy := self._copy(entry)) is None:
                raise
            copy.unlink(missing_ok=True)  # it may be damaged where the part is not
            return self._read(number, wanted)

    def _read(self, number: int, wanted: Mapping[str, Placement]) -> Group:
        part = self.index[number][0]
        entry = self.parts[part]
        try:
            with self._opened(part) as file:
                mark = stamp(file) if isinstance(file, FileIO) else None
                known, state = self._part_file(part, mark, file), self._state_of(number, mark)
                spans = {} if state == _DECODED or mark is None else self._spans(known, number)
                if state == _NEW:
                    found = self._decoded(known, file, number, self.columns, verify=True)
                    agree = all(np.array_equal(_whole(file, spans[name]), _bytes(found[name])) for name in spans)
                    self._learn(number, mark, _DIRECT if agree else _DECODED)
                else:
                    rest = [name for name in self.columns if name not in spans]
                    # Checksums cost more than the reading itself: what was right needs no second look.
                    found = self._decoded(known, file, number, rest, verify=False)
                    for name, span in spans.items():
                        if name not in known.tensors:
                            found[name] = _whole(file, span).view(known.dtype(name))
                        elif name in wanted:
                            wanted[name].fill_from_file(file, span[0])
        except FileNotFoundError:
            raise self._damaged(entry, "the file is missing") from None
        except (OSError, EOFError, pa.ArrowException) as error:
            raise self._damaged(entry, str(error)) from None
        read = Group(found)
        read.place({name: rows for name, rows in wanted.items() if name in found})
        return read

    def _spans(self, known: PartFile, number: int) -> dict[str, tuple[int, int]]:
        """(offset, bytes) of the group's values of fixed-width columns, if they lie as the footer suggests."""
        _, group, rows = self.index[number]
        spans = {name: known.span(group, name, rows) for name in self.columns}
        return {name: span for name, span in spans.items() if span}

    def _decoded(
        self, known: PartFile, file: Any, number: int, names: Sequence[str], verify: bool
    ) -> dict[str, np.ndarray | pa.Array]:
        part, group, rows = self.index[number]
        if not names:
            return {}
        table = known.decoded(file, group, names, verify=verify)
        if table.num_rows != rows:
            raise self._damaged(self.parts[part], f"row group {group} has {table.num_rows} rows, expected {rows}")
        return {name: _values(table, name) for name in names}

    def _opened(self, part: int) -> Any:
        """The part's file, or its local copy, of the size that the manifest says."""
        entry, storage = self.parts[part], self.artifact.storage
        if copy := self._copy(entry):
            with self._fetching:  # one part at a time in memory
                return fetch(self.artifact, entry, copy, self._cache_bytes)
        where = storage.locate(entry.path)
        if storage.local:
            file = FileIO(where)
            self._check_size(entry, os.fstat(file.fileno()).st_size)
            return file
        if (part, None) not in self._known:
            self._check_size(entry, storage.size(entry.path))
        # Groups are read in one request each; a read-ahead would fetch much that is not asked for.
        return storage.fs.open(where, "rb", cache_type="none", size=entry.bytes)

    def _check_size(self, entry: FileEntry, size: int) -> None:
        if size != entry.bytes:
            raise self._damaged(entry, f"{size} bytes, the manifest says {entry.bytes}")

    def _part_file(self, part: int, mark: Stamp | None, file: Any) -> PartFile:
        """What the footer of a file says; `mark` tells one file of a part from another."""
        with self._lock:
            known = self._known.get((part, mark))
        if known is None:
            known = PartFile(file)
            self._check_schema(known.schema, self.parts[part])
        with self._lock:
            self._known[part, mark] = known
            self._known.move_to_end((part, mark))
            if len(self._known) > _KNOWN_PARTS:
                self._known.popitem(last=False)
        return known

    def _state_of(self, number: int, mark: Stamp | None) -> int:
        """What was found of a group; all is forgotten where the part's file is another one than before."""
        part, group, _ = self.index[number]
        with self._lock:
            if self._stamps.setdefault(part, mark) != mark:
                self._stamps[part] = mark
                first = number - group
                self._state[first : first + -(-(self.parts[part].rows or 0) // self._rows_per_group)] = _NEW
            return int(self._state[number])

    def _learn(self, number: int, mark: Stamp | None, state: int) -> None:
        with self._lock:
            if self._stamps[self.index[number][0]] == mark:
                self._state[number] = state

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
            field = schema.field(name)
            found, wanted = f"{tensor_shape(field)} {tensor_dtype(field)}", f"{self.shapes[name]} float16"
            if found != wanted:
                raise UserError(
                    f"{self.artifact.uri}/{entry.path}: column {name!r} has shape {found} but the manifest says "
                    f"{wanted}; run the flow again with --force {self.artifact.stage}"
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


def _whole(file: FileIO, span: tuple[int, int]) -> np.ndarray:
    """All bytes of a span, uint8."""
    offset, size = span
    found = np.empty(size, np.uint8)
    read_into(file, offset, [found.data])
    return found


def _bytes(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1).view(np.uint8)
