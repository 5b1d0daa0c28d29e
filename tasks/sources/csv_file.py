"""A CSV of image paths and labels."""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass

from configs.errors import UserError
from infra.storage import Storage
from tasks.sources.base import Listing, Refusal, identity_of, listing_table
from tasks.sources.files import read_range

UNKNOWN_LENGTH = 0


@dataclass(frozen=True)
class CsvSource:
    """Columns `path` and `label`, and `split` where there is one; labels are numbers, or names that sort to numbers."""

    path: str

    def identity(self) -> str:
        """A hash of the CSV; changed images under the same names need another `data.revision`."""
        return identity_of("csv", [("content", hashlib.sha256(self._content()).hexdigest())])

    def listing(self) -> Listing:
        try:
            reader = csv.DictReader(io.StringIO(self._content().decode("utf-8-sig")))
            lines = list(reader)
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"data.source.path {self.path} is not a CSV in UTF-8 ({error})") from None
        missing = {"path", "label"} - set(reader.fieldnames or ())
        if missing:
            found = ", ".join(reader.fieldnames or ()) or "nothing"
            raise UserError(f"data.source.path {self.path}: first line has {found}; columns path and label are needed")
        refused = [Refusal(line["path"] or "?", "no label") for line in lines if not line["label"]]
        lines = [line for line in lines if line["label"] and line["path"]]
        numeric = all(line["label"].isdigit() for line in lines)
        if numeric:
            classes = tuple(str(n) for n in range(1 + max((int(line["label"]) for line in lines), default=-1)))
        else:
            classes = tuple(sorted({line["label"] for line in lines}))
        labels = {name: label for label, name in enumerate(classes)}
        rows = []
        for line in lines:
            split = line.get("split") or None
            if split not in (None, "train", "test"):
                raise UserError(f"data.source.path {self.path}: split {split!r} of {line['path']}; use train or test")
            label = int(line["label"]) if numeric else labels[line["label"]]
            rows.append((line["path"], label, split, line["path"], 0, UNKNOWN_LENGTH))
        return Listing(listing_table(rows), classes, tuple(refused))

    def read(self, file: str, start: int, length: int) -> bytes:
        if not file.startswith("/") and "://" not in file:
            folder, _, _ = self.path.rpartition("/")
            file = f"{folder}/{file}" if folder else file
        return read_range(file, 0, length)

    def _content(self) -> bytes:
        folder, _, name = self.path.rpartition("/")
        try:
            return Storage.at(folder or ".").read_bytes(name)
        except FileNotFoundError:
            raise UserError(f"data.source.path {self.path} does not exist") from None
