"""Files inside tar archives, listed from the headers and read by byte range: nothing is ever unpacked to disk."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import UserError
from infra.progress import Bar
from infra.ranges import Ranges
from tasks.data import formats
from tasks.sources import names
from tasks.sources.base import Refusal
from tasks.sources.files import File, at, in_turn
from tasks.sources.memory import remembered

_TEXT_BYTES = 1 << 16
"""No label and no sample's JSON is longer."""
_AT_ONCE = 50_000
"""Rows that are Python's objects at once."""
_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("start", pa.int64()),
        ("length", pa.int64()),
        ("text", pa.binary()),
        ("picture", pa.bool_()),
        ("refused", pa.string()),
    ]
)


@dataclass(frozen=True)
class Member:
    """A regular file in an archive, as a byte range of the outermost one."""

    name: str
    start: int
    length: int
    text: bytes | None = None
    """Its content, where that carries labels."""
    picture: bool = False
    """Whether its name, or else its beginning, is that of a picture."""


@dataclass(frozen=True)
class Archive:
    """What one archive holds."""

    file: File
    _rows: pa.Table

    def members(self) -> Iterator[Member]:
        for row in self._listed(pc.is_null(self._rows["refused"])):
            yield Member(*(row[key] for key in _SCHEMA.names[:-1]))

    def refused(self) -> Iterator[Refusal]:
        for row in self._listed(pc.is_valid(self._rows["refused"])):
            yield Refusal(f"{self.file.name}/{row['name']}", row["refused"])

    def _listed(self, mask: pa.ChunkedArray) -> Iterator[dict[str, Any]]:
        for batch in self._rows.filter(mask).to_batches(_AT_ONCE):
            yield from batch.to_pylist()


def archives(files: Iterable[File], nested: bool = False) -> Iterator[Archive]:
    """What each of these tars holds, in their order; one pass over a tar, remembered until it changes.

    Args:
        nested: go into tars within each, whose members are then named `inner.tar/member`.

    Raises:
        UserError: one is no whole, uncompressed tar.
    """
    turn = Lock()
    with Bar("source", None, "files in archives") as bar:

        def advance(count: int) -> None:
            with turn:
                bar.advance(count)

        def look(file: File) -> Archive:
            return Archive(file, remembered(file, f"tar {nested}", partial(_index, file, nested, advance)))

        yield from in_turn(look, files)


def _index(file: File, nested: bool, advance: Callable[[int], None]) -> pa.Table:
    rows = _Rows()
    storage, name = at(file.path)
    try:
        with storage.open(name) as whole:
            _walk(whole, 0, "", nested, rows, advance, file.path)
    except FileNotFoundError:
        raise UserError(f"data.source: {file.path} does not exist") from None
    return rows.table()


class _Rows:
    """Rows of one tar; all but the latest are columns already, which take a tenth of the memory."""

    def __init__(self) -> None:
        self._done: list[pa.Table] = []
        self._latest: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        self._latest.append(row)
        if len(self._latest) == _AT_ONCE:
            self.table()

    def table(self) -> pa.Table:
        self._done.append(pa.Table.from_pylist(self._latest, schema=_SCHEMA))
        self._latest = []
        return pa.concat_tables(self._done)


def _walk(
    file: Any, offset: int, prefix: str, nested: bool, rows: _Rows, advance: Callable[[int], None], path: str,
) -> None:  # fmt: skip
    """Rows of one tar, which begins at the `offset`-th byte of the outermost one, and of those in it where asked."""
    inner: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                advance(1)
                parts = PurePosixPath(member.name).parts
                if member.isdir() or any(names.is_leftover(part) for part in parts if part not in (".", "..")):
                    continue
                name = str(PurePosixPath(member.name)).encode("utf-8", "backslashreplace").decode()
                row: dict[str, Any] = {
                    "name": prefix + names.normal(name),
                    "start": offset + member.offset_data,
                    "length": member.size,
                }
                if not member.isreg() or member.issparse():
                    rows.append(row | {"refused": "not a regular file in its archive"})
                elif member.name.startswith("/") or ".." in parts:
                    rows.append(row | {"refused": "unsafe path in its archive"})
                elif nested and not prefix and name.endswith(".tar"):
                    inner.append((row["name"], member.offset_data, member.size))
                    rows.append(row)
                else:
                    rows.append(row | _looked_into(file, member, formats.suffix(name)))
    except (tarfile.TarError, EOFError) as error:
        within = f" (in its member {prefix.rstrip('/')})" if prefix else ""
        raise UserError(
            f"data.source: {path}{within} is not a whole, uncompressed tar ({error}); decompress or fetch it again"
        ) from None
    for name, start, length in inner:
        _walk(_member(file, start, length), offset + start, f"{name}/", nested, rows, advance, path)


def _member(file: Any, start: int, length: int) -> Ranges:
    """`length` bytes of a file from `start` on, as a file."""

    def read(begin: int, wanted: int) -> bytes:
        file.seek(start + begin)
        data: bytes = file.read(wanted)
        return data

    return Ranges(read, length)


def _looked_into(file: Any, member: tarfile.TarInfo, suffix: str) -> dict[str, Any]:
    """The text of what carries labels, and whether this is a picture; reads of other files only how they begin."""
    if suffix in formats.PICTURES:
        return {"picture": True}
    if suffix in ("cls", "json", "txt") and member.size <= _TEXT_BYTES:
        file.seek(member.offset_data)
        return {"text": file.read(member.size)}
    if suffix in formats.OTHERS:
        return {"picture": False}
    file.seek(member.offset_data)
    return {"picture": formats.looks_like_picture(file.read(min(member.size, formats.HEAD_BYTES)))}
