"""One Parquet part: what its footer says, and where in the file that puts the values of its columns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.tensors import is_tensor, tensor_dtype, values_in_file

Stamp = tuple[int, int, int]
"""Inode, bytes and time of change of a local file: while they stay, its content is taken to stay."""


def stamp(file: BinaryIO) -> Stamp:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


class PartFile:
    """What a part's footer says, read once, and readings of its row groups from an open file.

    Methods raise OSError or pyarrow's errors where the file is not what the footer says.
    """

    def __init__(self, file: Any) -> None:
        self.metadata = pq.ParquetFile(file).metadata
        self.schema = self.metadata.schema.to_arrow_schema()
        self.tensors = {field.name for field in self.schema if is_tensor(field)}
        self._spans: dict[str, list[tuple[int, int]] | None] = {}

    def decoded(self, file: Any, group: int, names: Sequence[str], verify: bool) -> pa.Table:
        """Columns of a row group through pyarrow's decoder; `verify` checks the pages' checksums."""
        parquet = pq.ParquetFile(file, metadata=self.metadata, pre_buffer=True, page_checksum_verification=verify)
        return parquet.read_row_group(group, columns=list(names), use_threads=False)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Of the values of a fixed-width column."""
        field = self.schema.field(name)
        return tensor_dtype(field) if name in self.tensors else np.dtype(field.type.to_pandas_dtype())

    def span(self, group: int, name: str, rows: int) -> tuple[int, int] | None:
        """Where the values of a fixed-width column should lie: (offset, bytes); see :func:`values_in_file`."""
        if name not in self._spans:
            self._spans[name] = values_in_file(self.metadata, name)
        spans = self._spans[name] or []
        offset, size = spans[group] if group < len(spans) else (0, 0)
        return (offset, size) if size and size == rows * self.schema.field(name).type.bit_width // 8 else None
