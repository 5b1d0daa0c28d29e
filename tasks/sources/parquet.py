"""Parquet files with an image struct and an integer label, as the Hugging Face hub serves them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import UserError
from infra.storage import Storage
from tasks.sources.base import Listing, Refusal, identity_of, listing_table
from tasks.sources.files import expand, sizes_of


@dataclass(frozen=True)
class ParquetSource:
    """Rows have no byte range of their own, so this source is read file by file (:meth:`scan`) and never by row."""

    path: str
    test_path: str | None = None
    image_column: str = "image"
    label_column: str = "label"

    def identity(self) -> str:
        found = {f"{s}/{PurePosixPath(f).name}": n for s, files in self._files() for f, n in sizes_of(files).items()}
        return identity_of("parquet", found)

    def listing(self) -> Listing:
        rows: list[tuple[str, int, str | None, str, int, int]] = []
        refused: list[Refusal] = []
        names: list[str] = []
        for split, files in self._files():
            for path in files:
                with _opened(path) as file:
                    self._check(file.schema_arrow, path)
                    names = names or _class_names(file.schema_arrow, self.label_column)
                    labels = file.read(columns=[self.label_column])[self.label_column].to_pylist()
                name = f"{split}/{PurePosixPath(path).name}"
                for row, label in enumerate(labels):
                    key = f"{name}/{row:07d}"
                    if label is None or label < 0:
                        refused.append(Refusal(key, "no label"))
                    else:
                        rows.append((key, int(label), split if self.test_path else None, path, row, 0))
        count = 1 + max((row[1] for row in rows), default=-1)
        if names and count > len(names):
            raise UserError(f"data.source.path {self.path}: label {count - 1} but the files name {len(names)} classes")
        return Listing(listing_table(rows), tuple(names or map(str, range(count))), tuple(refused))

    def read(self, file: str, start: int, length: int) -> bytes:
        raise UserError(f"{file}: rows of Parquet are read by scanning, not one by one")

    def scan(self, file: str) -> Iterator[bytes]:
        """The encoded images of one file, row by row; empty where a row has none."""
        with _opened(file) as opened:
            for batch in opened.iter_batches(batch_size=64, columns=[self.image_column]):
                for image in batch.column(0).to_pylist():
                    yield (image or {}).get("bytes") or b""

    def _files(self) -> list[tuple[str, list[str]]]:
        found = [("train", expand(self.path, ".parquet"))]
        return found if self.test_path is None else [*found, ("test", expand(self.test_path, ".parquet"))]

    def _check(self, schema: pa.Schema, path: str) -> None:
        wanted = {self.image_column: "a struct with bytes", self.label_column: "an integer"}
        for name, what in wanted.items():
            if name not in schema.names:
                raise UserError(f"{path} has no column {name!r} ({what}); it has {', '.join(schema.names)}")
        image, label = schema.field(self.image_column).type, schema.field(self.label_column).type
        if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
            raise UserError(f"{path}: column {self.image_column!r} is {image}, expected a struct with bytes and path")
        if not pa.types.is_integer(label):
            raise UserError(f"{path}: column {self.label_column!r} is {label}, expected an integer")


class _opened:
    """A Parquet file for reading; damage and absence are told by its name."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> pq.ParquetFile:
        folder, _, name = self._path.rpartition("/")
        try:
            self._file: Any = Storage.at(folder or ".").open(name)
            return pq.ParquetFile(self._file)
        except FileNotFoundError:
            raise UserError(f"data.source: {self._path} does not exist") from None
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"data.source: {self._path} is not a whole Parquet file ({error})") from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._file.close()
        if isinstance(error, (OSError, pa.ArrowException)):
            raise UserError(f"data.source: {self._path} is damaged ({' '.join(str(error).split())[:200]})") from None


def _class_names(schema: pa.Schema, label: str) -> list[str]:
    """The names in the hub's schema metadata; empty where there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, ValueError, TypeError):
        return []
