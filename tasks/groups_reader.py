"""Row groups of an artifact's Parquet parts, read with pyarrow and kept as numpy views."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import UserError
from infra.artifacts import Artifact
from infra.home import home
from infra.storage import FileEntry
from tasks.cache import local_copy
from tasks.latents import is_tensor, tensor_shape, to_numpy

_OPEN_FILES = 64


@dataclass(frozen=True)
class Group:
    """One row group: tensors as numpy views, everything else as arrow columns."""

    tensors: dict[str, np.ndarray]
    columns: dict[str, pa.Array]

    @cached_property
    def labels(self) -> np.ndarray:
        return self.columns["label"].to_numpy()

    @cached_property
    def keys(self) -> list[str]:
        return self.columns["key"].to_pylist()

    @cached_property
    def images(self) -> list[bytes]:
        return self.columns["image"].to_pylist()


class GroupReader:
    """Reads any row group of one split; damaged files are refused by name.

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
        self._open: OrderedDict[tuple[int, bool], pq.ParquetFile] = OrderedDict()
        self._verified: set[int] = set()
        self._cache_bytes = cache_bytes
        self._lock = Lock()

    @property
    def group_rows(self) -> tuple[int, ...]:
        return tuple(rows for _, _, rows in self.index)

    def read(self, number: int) -> Group:
        """Group `number` of :attr:`index`. Raises UserError naming a file that is missing, cut off or damaged."""
        part, group, rows = self.index[number]
        entry = self.parts[part]
        # Checksums cost more than the reading itself; what was right once in this process needs no second look.
        with self._lock:  # a file object has one position: streams of one loader take turns
            file = self._file(part, entry, verify=number not in self._verified)
            try:
                table = file.read_row_group(group, columns=self.columns, use_threads=False)
            except (OSError, pa.ArrowException) as error:
                raise self._damaged(entry, str(error)) from None
        if table.num_rows != rows:
            raise self._damaged(entry, f"row group {group} has {table.num_rows} rows, expected {rows}")
        self._verified.add(number)
        fields = [table.schema.field(name) for name in self.columns]
        tensors = {f.name: to_numpy(table[f.name], f) for f in fields if is_tensor(f)}
        columns = {f.name: _one_chunk(table[f.name]) for f in fields if not is_tensor(f)}
        return Group(tensors, columns)

    def _file(self, part: int, entry: FileEntry, verify: bool) -> pq.ParquetFile:
        if (part, verify) in self._open:
            self._open.move_to_end((part, verify))
            return self._open[part, verify]
        storage = self.artifact.storage
        try:
            size = storage.size(entry.path)
            if size != entry.bytes:
                raise self._damaged(entry, f"{size} bytes, the manifest says {entry.bytes}")
            if storage.local:
                source: Any = storage.locate(entry.path)
            elif self._cache_bytes:
                source = str(local_copy(self.artifact, entry, home() / "cache", self._cache_bytes))
            else:
                source = storage.open(entry.path)
            mapped = isinstance(source, str)
            file = pq.ParquetFile(source, memory_map=mapped, pre_buffer=not mapped, page_checksum_verification=verify)
            self._check_schema(file.schema_arrow, entry)
        except FileNotFoundError:
            raise self._damaged(entry, "the file is missing") from None
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(entry, str(error)) from None
        self._open[part, verify] = file
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return file

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
        return UserError(
            f"{self.artifact.uri}/{entry.path} is damaged ({' '.join(what.split())[:200]}); run the flow again with "
            f"--force {self.artifact.stage}"
        )


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
