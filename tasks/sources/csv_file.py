"""A CSV of image paths and labels."""

from __future__ import annotations

import csv
import os
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import UserError
from infra.storage import Storage
from tasks.data.rows import Rows, in_order, tuples
from tasks.sources.base import LISTING_SCHEMA, REFUSALS, Listing, identity_of_rows
from tasks.sources.files import at, check_there, read_range
from tasks.sources.labels import NO_LABEL, Text, counted_labels, why_not
from tasks.sources.names import normal
from tasks.sources.walk import list_remote

UNKNOWN_LENGTH = 0
_COLUMNS, _SPLITS = ("path", "label", "split"), ("train", "test")
_LINES = pa.schema(
    [
        pa.field("line", pa.int64()),
        pa.field("path", pa.string()),
        pa.field("label", pa.int32()),
        pa.field("split", pa.string()),
        pa.field("size", pa.int64()),
    ]
)
"""One row for each line that names an image, in their order: a number of its label's text, and
bytes of its file, 0 for what has no size of its own."""
_PLACED = pa.schema([pa.field("place", pa.string()), *_LINES])
"""Lines and where their files are, and files that a storage lists."""
_LISTED = -1
"""Instead of a line: listed, which sorts before lines that name it."""
_OUTSIDE, _MISSING, _REMOTE = -1, -2, -3
"""Instead of a size: not of the list's own storage, not there, known by a listing."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class CsvSource:
    """Columns `path` and `label`, and `split` where there is one; labels are numbers, or names that sort to numbers."""

    path: str
    first_label: int = 0

    def check_there(self) -> None:
        check_there(self.path)

    def identity(self) -> str:
        return self.listing().identity

    def listing(self) -> Listing:
        lines, counts, ruled_out = self._read()
        labels = counted_labels(counts, self.first_label, where=f"data.source.path {self.path}")
        rows, texts = Rows(LISTING_SCHEMA), list(counts)
        for _, path, number, split, size in tuples(self._with_sizes(lines)):
            key, label = normal(path), labels.numbers[number]
            if label == NO_LABEL:
                ruled_out.append(key, *why_not(texts[number]))
            elif size == _OUTSIDE:
                remedy = "a list from elsewhere names its own files only"
                ruled_out.append(key, "outside the CSV's storage", remedy)
            elif size == _MISSING:
                ruled_out.append(key, "no such file", "named by the CSV but not there")
            else:
                rows.append(key, label, split, path, 0, size)
        identity = identity_of_rows("csv", rows, labels.classes, ruled_out)
        return Listing(rows, labels.classes, ruled_out, faults=labels.faults, identity=identity)

    def read(self, file: str, start: int, length: int) -> bytes:
        return read_range(self._place(file), 0, length)

    def _is_outside(self, name: str) -> bool:
        """Whether a list at a URL names a file of this machine, or of another server or bucket than its own."""
        if "://" not in self.path or self.path.startswith("file://"):
            return False
        return name.startswith("/") or ("://" in name and name.split("/")[:3] != self.path.split("/")[:3])

    def _place(self, name: str) -> str:
        if name.startswith("/") or "://" in name:
            return name
        folder, _, _ = self.path.rpartition("/")
        return f"{folder}/{name}" if folder else name

    def _read(self) -> tuple[Rows, Counter[Text], Rows]:
        """Lines, how often each label's text occurs, and refusals of lines without a path.

        Numbers of labels are their places among the texts.
        """
        lines, counts, ruled_out = Rows(_LINES), Counter[Text](), Rows(REFUSALS)
        numbers: dict[Text, int] = {}
        for path, label, split in self._images():
            if not path:
                ruled_out.append("?", "no path", "")
                continue
            if split not in (None, *_SPLITS):
                raise UserError(f"data.source.path {self.path}: split {split!r} of {path}; use train or test")
            counts[label] += 1
            number = numbers.setdefault(label, len(numbers))
            lines.append(lines.num_rows, path, number, split, self._size(path))
        return lines, counts, ruled_out

    def _images(self) -> Iterator[tuple[str, str, str | None]]:
        """Path, label and split of each line."""
        try:
            reader = csv.DictReader(self._text(), restval="")
            missing = {"path", "label"} - set(reader.fieldnames or ())
            if missing:
                found = ", ".join(reader.fieldnames or ()) or "nothing"
                raise UserError(
                    f"data.source.path {self.path}: first line has {found}; columns path and label are needed"
                )
            for line in reader:
                path, label, split = ((line.get(name) or "").strip() for name in _COLUMNS)
                yield path, label, split or None
        except csv.Error as error:
            raise UserError(self._no_text(error)) from None

    def _text(self) -> Iterator[str]:
        """The file, line by line."""
        storage, name = at(self.path)
        try:
            file = storage.open(name)
        except FileNotFoundError:
            raise UserError(f"data.source.path {self.path} does not exist") from None
        with file:
            rest, start = file.read(len(BOM_UTF8)).removeprefix(BOM_UTF8), 0
            while True:
                piece = file.read(_BLOCK)
                whole, end, rest = (rest + piece).rpartition(b"\n") if piece else (rest, b"", b"")
                try:
                    text = (whole + end).decode()
                except UnicodeDecodeError as error:
                    raise UserError(self._no_text(_moved(error, start))) from None
                if "\0" in text:
                    raise UserError(self._no_text("it has NUL bytes"))
                yield from StringIO(text)
                start += len(whole) + len(end)
                if not piece:
                    return

    def _no_text(self, why: object) -> str:
        return f"data.source.path {self.path} is not a CSV in UTF-8 ({why})"

    def _size(self, path: str) -> int:
        """Bytes of a local file, or what stands for them."""
        if self._is_outside(path):
            return _OUTSIDE
        place = self._place(path)
        if "://" in place:
            return _REMOTE
        try:
            return os.stat(place).st_size  # noqa: PTH116 - a Path would intern every name
        except OSError:
            return _MISSING

    def _with_sizes(self, lines: Rows) -> Iterator[pa.Table]:
        """Lines with the sizes of remote files.

        These are listed once, from the folder on that all names of one storage have in common, and
        find their lines by an external sort.
        """
        if not any(pc.any(pc.equal(chunk["size"], _REMOTE)).as_py() for chunk in lines.chunks()):
            yield from lines.chunks()
            return
        placed, folders = Rows(_PLACED), dict[str, str]()
        for line, path, label, split, size in lines.tuples():
            place = self._place(path) if size == _REMOTE else path
            placed.append(place, line, path, label, split, size)
            if size == _REMOTE:
                # In this form `commonpath` keeps the scheme and the server apart.
                above = place.rpartition("/")[0].replace("://", "/\0", 1)
                storage = "/".join(above.split("/")[:2])
                folders[storage] = os.path.commonpath([folders.get(storage, above), above])
        for folder in folders.values():
            _add_listed(folder.replace("/\0", "://", 1), placed)
        found = Rows(_LINES)
        for chunk in in_order(placed, "place", "line"):
            found.add(_joined(chunk))
        yield from in_order(found, "line")


def _add_listed(url: str, placed: Rows) -> None:
    def add(sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            placed.append(f"{url}/{name}", _LISTED, None, None, None, size)

    list_remote(Storage.at(url), add)


def _joined(placed: pa.Table) -> pa.Table:
    """Lines with the sizes of listed files of the same place, which come first among equals."""
    places, lines, sizes = placed["place"], placed["line"].to_numpy(), placed["size"].to_numpy()
    is_new = np.append(True, pc.not_equal(places[1:], places[:-1]).to_numpy())
    first = np.maximum.accumulate(np.where(is_new, np.arange(len(lines)), 0))
    listed = np.where(lines[first] == _LISTED, sizes[first], _MISSING)
    told = pa.array(np.where(sizes == _REMOTE, listed, sizes))
    columns = [told if name == "size" else placed[name] for name in _LINES.names]
    return pa.table(columns, schema=_LINES).filter(pa.array(lines != _LISTED))


def _moved(error: UnicodeDecodeError, start: int) -> str:
    """What Python says of text that cannot be decoded, where only what begins at `start` was."""
    first, last = start + error.start, start + error.end - 1
    byte = f"byte 0x{error.object[error.start]:02x} in position {first}"
    what = byte if first == last else f"bytes in position {first}-{last}"
    return f"{error.encoding!r} codec can't decode {what}: {error.reason}"
