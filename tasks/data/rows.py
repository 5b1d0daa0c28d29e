"""Tables that may be longer than memory, and their order.

What is beyond a bound lies in a file without a name in the folder for temporary files (TMPDIR):
the system frees it with the process, however that ends.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, pairwise, repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import UserError

HELD_BYTES = 16 << 20
"""Of a table in memory, before it goes to disk."""
AT_ONCE = 1 << 18
"""Rows that are sorted at once, at most; each such portion is of about as many rows."""
PORTION_BYTES = 32 << 20
"""The same in bytes, for long rows: a receipt of `encode` is some 10 kB."""
_MOST_PIECES = 512
AS_OBJECTS = 1 << 13
"""Rows that are Python's objects at once."""
_SAMPLED = 1 << 16
"""Rows whose values say where portions are cut."""
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


class Rows:
    """Rows of one schema in the order in which they were added. Read from any thread."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema, self.num_rows = schema, 0
        self._held: list[pa.Table] = []
        self._latest: list[pa.Table] = []
        self._objects: list[tuple[Any, ...]] = []
        self._bytes = self._all_bytes = 0
        self._laid: list[tuple[int, int]] = []

    @classmethod
    def of(cls, table: pa.Table) -> Rows:
        rows = cls(table.schema)
        rows.add(table)
        return rows

    @cached_property
    def _scratch(self) -> _Scratch:
        return _Scratch()

    def add(self, table: pa.Table) -> None:
        """Append a table of the schema."""
        if self._objects:
            self._put_away()
        if not table.num_rows:
            return
        self.num_rows += table.num_rows
        self._latest.append(table)
        self._bytes += table.nbytes
        self._all_bytes += table.nbytes
        if len(self._latest) == _MOST_PIECES:  # a table of one row takes as much as hundreds of rows
            self._held.append(pa.concat_tables(self._latest).combine_chunks())
            self._latest = []
        if self._bytes > HELD_BYTES:
            self._laid.append(self._scratch.put(pa.concat_tables([*self._held, *self._latest])))
            self._held, self._latest, self._bytes = [], [], 0

    def append(self, *row: Any) -> None:
        """Append one row of Python's objects, of which few are held as such."""
        self._objects.append(row)
        self.num_rows += 1
        if len(self._objects) >= AS_OBJECTS:
            self._put_away()

    def _put_away(self) -> None:
        objects, self._objects = self._objects, []
        self.num_rows -= len(objects)
        self.add(table_of(objects, self.schema))

    @property
    def at_once(self) -> int:
        """How many of these rows are sorted at once."""
        return max(1, min(AT_ONCE, PORTION_BYTES * self.num_rows // max(1, self._all_bytes)))

    def chunks(self) -> Iterator[pa.Table]:
        """All rows, in tables of some 16 MB whose columns are each one piece."""
        for place in self._laid:
            yield self._scratch.get(place)
        if self._held or self._latest:
            yield pa.concat_tables([*self._held, *self._latest]).combine_chunks()
        if self._objects:
            yield table_of(self._objects, self.schema)

    def tuples(self) -> Iterator[tuple[Any, ...]]:
        """All rows one by one, few of them as Python's objects."""
        return tuples(self.chunks())

    def take(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Rows at ascending places."""
        found: list[dict[str, Any]] = []
        start = 0
        for chunk in self.chunks():
            here = [place - start for place in places if start <= place < start + chunk.num_rows]
            found += chunk.take(pa.array(here, pa.int64())).to_pylist()
            start += chunk.num_rows
        return found

    def table(self) -> pa.Table:
        """All rows in memory."""
        return pa.concat_tables([self.schema.empty_table(), *self.chunks()]).combine_chunks()


def in_order(rows: Rows, *by: str) -> Iterator[pa.Table]:
    """Portions that follow one another in ascending order of columns; equal rows keep their order.

    Rows that agree in the first of the columns are in one portion. At most a few portions are in
    memory: the others are cut apart by values of a sample and wait on disk.
    """
    if rows.num_rows <= rows.at_once:
        if rows.num_rows:
            yield _sorted(rows.table(), by)
        return
    cuts = _cuts(rows, by[0], -(-rows.num_rows // rows.at_once))
    scratch = _Scratch()
    waiting: list[list[tuple[int, int]]] = [[] for _ in range(len(cuts) + 1)]
    for run in sized(rows.chunks(), 2 * rows.at_once):
        table = _sorted(run, by)
        ends = [0, *_places(table[by[0]], cuts), table.num_rows]
        for place, (start, stop) in zip(waiting, pairwise(ends), strict=True):
            if stop > start:
                place.append(scratch.put(table.slice(start, stop - start)))
    for place in waiting:
        if place:
            yield _sorted(pa.concat_tables(map(scratch.get, place)).combine_chunks(), by)
    pa.default_memory_pool().release_unused()


def table_of(rows: Iterable[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    """Rows of Python's objects as a table."""
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def tuples(tables: Iterable[pa.Table]) -> Iterator[tuple[Any, ...]]:
    """The rows one by one, few of them as Python's objects."""
    for some in sized(tables, AS_OBJECTS):
        yield from zip(*(column.to_pylist() for column in some.columns), strict=True)


def sized(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of so many, of which only the last may have fewer."""
    return cut_to(tables, repeat(rows))


def cut_to(tables: Iterable[pa.Table], counts: Iterable[int]) -> Iterator[pa.Table]:
    """The same rows in tables of so many, so many … until rows or counts end."""
    left = iter(tables)
    held: pa.Table | None = pa.table({})
    for count in counts:
        pieces: list[pa.Table] = []
        missing = count
        while missing and held is not None:
            if not held.num_rows:
                held = next(left, None)
                continue
            pieces.append(held.slice(0, missing))
            held = held.slice(pieces[-1].num_rows)
            missing -= pieces[-1].num_rows
        if pieces:
            yield pa.concat_tables(pieces).combine_chunks()
        if held is None:
            return


def _sorted(table: pa.Table, by: tuple[str, ...]) -> pa.Table:
    order = pc.sort_indices(table, sort_keys=[(name, "ascending") for name in by])  # stable
    return table.take(order).combine_chunks()


def _cuts(rows: Rows, column: str, portions: int) -> list[Any]:
    """Ascending values between which about equally many rows lie."""
    step = max(1, rows.num_rows // _SAMPLED)
    seen = [chunk[column].take(pa.array(range(0, chunk.num_rows, step))) for chunk in rows.chunks()]
    values = pa.chunked_array(list(chain.from_iterable(each.chunks for each in seen))).combine_chunks()
    values = values.take(pc.sort_indices(values))
    places = [len(values) * number // portions for number in range(1, portions)]
    return sorted(set(values.take(pa.array(places, pa.int64())).to_pylist()))


def _places(column: pa.ChunkedArray, cuts: list[Any]) -> list[int]:
    """Where in an ascending column the first value lies that is not below each cut."""
    if pa.types.is_integer(column.type):
        found = np.searchsorted(column.to_numpy(), np.array(cuts, column.type.to_pandas_dtype()))
        return [int(place) for place in found]
    values = column.chunk(0)
    return [bisect_left(range(len(values)), cut, key=lambda place: values[place].as_py()) for cut in cuts]


class _Scratch:
    """Tables in one file that has no name."""

    def __init__(self) -> None:
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open for as long as this is
        except OSError as error:
            raise UserError(_no_room(error)) from None
        weakref.finalize(self, self._file.close)
        self._end = 0

    def put(self, table: pa.Table) -> tuple[int, int]:
        """Lay a table aside; its place."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema, options=_OPTIONS) as writer:
            writer.write_table(table)
        data, start = memoryview(sink.getvalue()), self._end
        try:
            while len(data):
                written = os.pwrite(self._file.fileno(), data, self._end)
                self._end, data = self._end + written, data[written:]
        except OSError as error:
            raise UserError(_no_room(error)) from None
        return start, self._end - start

    def get(self, place: tuple[int, int]) -> pa.Table:
        start, length = place
        pieces = []
        while length:  # at most 2 GiB are read at once
            pieces.append(os.pread(self._file.fileno(), length, start))
            start, length = start + len(pieces[-1]), length - len(pieces[-1])
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return pa.ipc.open_stream(data).read_all().combine_chunks()


def _no_room(error: OSError) -> str:
    return (
        f"{tempfile.gettempdir()} cannot take the rows of a large source ({error.strerror}): set TMPDIR to a folder "
        "on a disk with room, about 150 bytes for each image"
    )
