"""A CSV of image paths and labels."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from infra.storage import Storage
from tasks.data.rows import Rows
from tasks.sources.base import Listing, Refusal, Row, identity_of_rows, listed_rows, refusal_table
from tasks.sources.files import at, check_there, read_range
from tasks.sources.labels import NO_LABEL, read_labels, why_not
from tasks.sources.names import normal

UNKNOWN_LENGTH = 0
_SPLITS = {"train": "train", "test": "test"}


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
        lines = self._lines()
        named = [line for line in lines if line["path"]]
        refused = [Refusal("?", "no path")] * (len(lines) - len(named))
        labels = read_labels([line["label"] for line in named], self.first_label, where=f"data.source.path {self.path}")
        outside = [self._is_outside(line["path"]) for line in named]
        own = [line["path"] for line, out in zip(named, outside, strict=True) if not out]
        listed = iter(_sizes([self._place(name) for name in own]))
        sizes = [None if out else next(listed) for out in outside]
        rows: list[Row] = []
        for line, label, size in zip(named, labels.numbers, sizes, strict=True):
            key, split = normal(line["path"]), line.get("split") or None
            if split not in (None, *_SPLITS):
                raise UserError(f"data.source.path {self.path}: split {split!r} of {line['path']}; use train or test")
            if label == NO_LABEL:
                refused.append(Refusal(key, *why_not(line["label"])))
            elif self._is_outside(line["path"]):
                refused.append(
                    Refusal(key, "outside the CSV's storage", "a list from elsewhere names its own files only")
                )
            elif size is None:
                refused.append(Refusal(key, "no such file", "named by the CSV but not there"))
            else:
                rows.append((key, label, split, line["path"], 0, size))
        images, ruled_out = listed_rows(rows), Rows.of(refusal_table(refused))
        identity = identity_of_rows("csv", images, labels.classes, ruled_out)
        return Listing(images, labels.classes, ruled_out, faults=labels.faults, identity=identity)

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

    def _lines(self) -> list[dict[str, str]]:
        storage, name = at(self.path)
        try:
            content = storage.read_bytes(name)
        except FileNotFoundError:
            raise UserError(f"data.source.path {self.path} does not exist") from None
        try:
            reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig")), restval="")
            lines = list(reader)
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"data.source.path {self.path} is not a CSV in UTF-8 ({error})") from None
        if b"\0" in content:
            raise UserError(f"data.source.path {self.path} is not a CSV in UTF-8 (it has NUL bytes)")
        missing = {"path", "label"} - set(reader.fieldnames or ())
        if missing:
            found = ", ".join(reader.fieldnames or ()) or "nothing"
            raise UserError(f"data.source.path {self.path}: first line has {found}; columns path and label are needed")
        return [{name: (value or "").strip() for name, value in line.items() if name} for line in lines]


def _sizes(places: Sequence[str]) -> list[int | None]:
    """Bytes of each file, 0 for what has no size of its own, None where there is no such file.

    Remote ones are listed once, from the folder on that all names of one storage have in common.
    """
    remote: dict[str, list[str]] = {}
    for place in places:
        if "://" in place:
            remote.setdefault("/".join(place.split("/")[:3]), []).append(place)
    listed: dict[str, int] = {}
    for group in remote.values():
        folder = os.path.commonpath([place.rpartition("/")[0].replace("://", "/\0", 1) for place in group])
        url = folder.replace("/\0", "://", 1)
        listed |= {f"{url}/{name}": size for name, size in Storage.at(url).sizes().items()}
    found: list[int | None] = []
    for place in places:
        if "://" in place:
            found.append(listed.get(place))
            continue
        try:
            found.append(Path(place).stat().st_size)
        except OSError:
            found.append(None)
    return found
