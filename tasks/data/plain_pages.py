"""Values that lie in a Parquet file as they lie in memory: read to their place, without a decoder.

Our writer puts the values of a row group's column into one page: uncompressed, plainly encoded and
without nulls. That is a header of some 30 bytes (`PageHeader`, in Thrift's compact protocol), which
says so and has the values' checksum, and then the values, one after the other.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO

import numpy as np
import pyarrow.parquet as pq

_DATA_PAGE, _PLAIN = 0, 0
"""A page's type, and its encoding."""


@dataclass(frozen=True)
class PlainPage:
    """Where in its file the values of a page begin, and the bytes of a row."""

    offset: int
    row_bytes: int

    def read(self, file: FileIO, rows: np.ndarray, out: np.ndarray) -> None:
        """Put rows, int (n,) ascending, into `out` (n, …). Raises EOFError where the file ends."""
        first, count = int(rows[0]), int(rows[-1] - rows[0]) + 1
        stretch = out if count == len(rows) else np.empty((count, *out.shape[1:]), out.dtype)
        left, offset = stretch.reshape(-1).view(np.uint8).data, self.offset + first * self.row_bytes
        while left:
            if not (got := os.preadv(file.fileno(), [left], offset)):
                raise EOFError(f"it ends {len(left)} bytes too early")
            left, offset = left[got:], offset + got
        if stretch is not out:
            take(stretch, rows - first, out)


def take(values: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    """Copy rows to `out`."""
    np.take(values, rows, axis=0, out=out, mode="clip")  # "raise" would copy them twice


def plain_pages(
    file: FileIO,
    metadata: pq.FileMetaData,
    group: int,
    row_bytes: Mapping[str, int],
) -> dict[str, PlainPage]:
    """Columns of a row group whose values are one plain page and have its checksum.

    row_bytes: by name, of the columns that may be so.
    """
    chunks = [metadata.row_group(group).column(at) for at in range(metadata.num_columns)]
    sizes = [(chunk, row_bytes.get(chunk.path_in_schema)) for chunk in chunks]
    pages = {chunk.path_in_schema: _page(file, chunk, size) for chunk, size in sizes if size}
    return {name: page for name, page in pages.items() if page}


def _page(file: FileIO, chunk: pq.ColumnChunkMetaData, row_bytes: int) -> PlainPage | None:
    begin, rows, size = chunk.data_page_offset, chunk.num_values, chunk.num_values * row_bytes
    page = PlainPage(begin + chunk.total_compressed_size - size, row_bytes)
    if chunk.compression != "UNCOMPRESSED" or not size or page.offset <= begin:
        return None
    values = np.empty((rows, row_bytes), np.uint8)
    page.read(file, np.arange(rows), values)
    header = os.pread(file.fileno(), page.offset - begin, begin)
    # Fields 1 to 4 are numbers and 5 is a struct that begins with two of them.
    expected = _numbers(_DATA_PAGE, size, size, zlib.crc32(values.data))
    expected += b"\x1c" + _numbers(rows, _PLAIN)
    return page if header.startswith(expected) else None


def _numbers(*values: int) -> bytes:
    """Consecutive int32 fields of a struct: a type each, then zigzag, the lowest bits first."""
    written = bytearray()
    for value in values:
        rest = value << 1 if value < 1 << 31 else ((1 << 32) - value << 1) - 1
        written.append(0x15)
        while rest > 0x7F:
            written.append(rest & 0x7F | 0x80)
            rest >>= 7
        written.append(rest)
    return bytes(written)
