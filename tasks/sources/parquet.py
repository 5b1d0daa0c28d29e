"""Parquet files with encoded images and labels, as the Hugging Face hub serves them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.errors import UserError, brief
from tasks.data.formats import HEAD_BYTES, looks_like_picture
from tasks.sources.base import Listing, content_of, identity_of_rows
from tasks.sources.files import File, at, by_split, check_there, file_at, in_turn
from tasks.sources.labelled import Labelled
from tasks.sources.memory import remembered

_IMAGE, _LABEL = "image", "label"


@dataclass(frozen=True)
class ParquetSource:
    """Rows have no byte range of their own, so this source is read file by file (:meth:`scan`) and never by row.

    Where a column of the usual name is missing, the only one that can be meant is taken.
    """

    path: str
    test_path: str | None = None
    image_column: str = _IMAGE
    label_column: str = _LABEL
    first_label: int = 0

    def check_there(self) -> None:
        check_there(self.path, self.test_path)

    def identity(self) -> str:
        return self.listing().identity

    def listing(self) -> Listing:
        files = by_split("parquet", self.path, self.test_path, ".parquet")
        labelled = Labelled()
        names: list[str] = []
        faults = []
        for (split, file), found in zip(files, in_turn(self._remembered, (file for _, file in files)), strict=True):
            own = json.loads((found.schema.metadata or {}).get(b"names", b"[]"))
            if names and own and own != names:
                faults.append(f"data.source: {file.path} names other classes than the files before it: use one set")
            names = names or own
            labels = found["label"].combine_chunks().dictionary_encode(null_encoding="encode")
            places = pa.array(range(found.num_rows), pa.int64())
            numbers = pc.utf8_lpad(pc.cast(places, pa.string()), 7, "0")
            keys = pc.binary_join_element_wise(f"{split or 'train'}/{file.name}", numbers, "/")
            none = pa.repeat(pa.scalar(0, pa.int64()), found.num_rows)
            labelled.add(keys, labels.dictionary.to_pylist(), labels.indices.to_numpy(), split, file.path, places, none)
        settled = labelled.settle(self.first_label, names, f"data.source.path {self.path}")
        classes, kept = settled.labels.classes, settled.kept
        folders = sorted({file.name.rpartition("/")[0] for _, file in files})
        pooled = (f"files of {len(folders)} folders are pooled: {', '.join(folders[:5])}",) if len(folders) > 1 else ()
        return Listing(
            settled.rows,
            classes,
            settled.ruled_out,
            notes=(*kept.notes, *pooled),
            left_out=kept.left_out,
            faults=(*faults, *settled.labels.faults, *kept.faults),
            identity=identity_of_rows(
                "parquet", settled.rows, classes, settled.ruled_out, (file.size for _, file in files)
            ),
        )

    def read(self, file: str, start: int, length: int) -> bytes:
        raise UserError(f"{file}: rows of Parquet are read by scanning, not one by one")

    def scan(self, file: str) -> Iterator[bytes]:
        """The encoded images of one file, row by row; empty where a row has none."""
        with _opened(file) as opened:
            column = self._image_column(opened, file)
            for batch in opened.iter_batches(batch_size=64, columns=[column]):
                for image in batch.column(0).to_pylist():
                    yield _bytes(image)

    def contents(self, file: str) -> pa.Table:
        def look() -> pa.Table:
            return pa.table({"content": pa.array(map(content_of, self.scan(file)), pa.binary(8))})

        return remembered(file_at(file), f"contents {self.image_column}", look)

    def _remembered(self, file: File) -> pa.Table:
        return remembered(file, f"labels {self.image_column} {self.label_column}", partial(self._look, file))

    def _look(self, file: File) -> pa.Table:
        """The labels of one file, with the names of classes it gives as metadata."""
        with _opened(file.path) as opened:
            schema = opened.schema_arrow
            images = self._image_column(opened, file.path)
            if opened.metadata.num_rows and not any(_heads(opened, images)):
                raise UserError(
                    f"{file.path}: column {images!r} holds no encoded images (only paths?): save the data set with "
                    "its files embedded"
                )
            column = self._label_column(schema, file.path)
            labels = opened.read(columns=[column])[column].combine_chunks()
        if pa.types.is_dictionary(labels.type):
            labels = labels.dictionary_decode()
        wanted = pa.string() if _is_text(labels.type) else pa.int64()
        names = json.dumps(_class_names(schema, column))
        return pa.table({"label": labels.cast(wanted)}).replace_schema_metadata({"names": names})

    def _image_column(self, opened: pq.ParquetFile, path: str) -> str:
        schema = opened.schema_arrow
        if self.image_column in schema.names:
            kind = schema.field(self.image_column).type
            if not _can_hold_images(kind):
                raise UserError(
                    f"{path}: column {self.image_column!r} is {kind}, expected bytes, or a struct with bytes and path"
                )
            return self.image_column
        candidates = _candidates(schema, _can_hold_images) if self.image_column == _IMAGE else []
        found = [name for name in candidates if _has_pictures(opened, name)]
        return self._only(found, "image", self.image_column, "encoded images", schema, path)

    def _label_column(self, schema: pa.Schema, path: str) -> str:
        if self.label_column in schema.names:
            kind = schema.field(self.label_column).type
            if not _can_be_label(kind):
                raise UserError(f"{path}: column {self.label_column!r} is {kind}, expected an integer or a name")
            return self.label_column
        candidates = _candidates(schema, _can_be_label) if self.label_column == _LABEL else []
        named = [name for name in candidates if _class_names(schema, name)]
        whole = [name for name in candidates if "label" in name or "class" in name]
        return self._only(named or whole, "label", self.label_column, "labels", schema, path)

    def _only(self, found: Sequence[str], what: str, wanted: str, meaning: str, schema: pa.Schema, path: str) -> str:
        if len(found) == 1:
            return found[0]
        several = f"; {', '.join(found)} could be meant" if found else f"; it has {', '.join(schema.names)}"
        raise UserError(f"{path} has no column {wanted!r} ({meaning}){several}: name it in data.source.{what}_column")


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file for reading; damage and absence are told by its name."""
    storage, name = at(path)
    try:
        with storage.open(name) as file:
            yield pq.ParquetFile(file)
    except FileNotFoundError:
        raise UserError(f"data.source: {path} does not exist") from None
    except (OSError, pa.ArrowException) as error:
        text = brief(error)
        raise UserError(f"data.source: {path} is not a whole Parquet file, or damaged ({text})") from None


def _bytes(image: object) -> bytes:
    value = image.get("bytes") if isinstance(image, dict) else image
    return value if isinstance(value, bytes) else b""


def _has_pictures(opened: pq.ParquetFile, column: str) -> bool:
    return any(map(looks_like_picture, _heads(opened, column)))


def _heads(opened: pq.ParquetFile, column: str) -> list[bytes]:
    """How the first images begin."""
    batch = next(opened.iter_batches(batch_size=8, columns=[column]), None)
    return [_bytes(image)[:HEAD_BYTES] for image in batch.column(0).to_pylist()] if batch is not None else []


def _candidates(schema: pa.Schema, fits: object) -> list[str]:
    return [field.name for field in schema if fits(field.type)]  # type: ignore[operator]


def _can_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _can_be_label(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_integer(kind) or _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _class_names(schema: pa.Schema, label: str) -> list[str]:
    """The names in the hub's schema metadata; empty where there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, ValueError, TypeError, RecursionError):
        return []
