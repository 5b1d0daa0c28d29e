from __future__ import annotations

import os
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.data.plain_pages import PlainPage, plain_pages
from tasks.data.tensors import WRITE_OPTIONS, latent_table

ROWS, SHAPE = 700, (3, 5, 7)
ROW_BYTES = {"label": 4, "z": 210}


def _table() -> tuple[pa.Table, np.ndarray]:
    z = np.random.default_rng(0).standard_normal((ROWS, *SHAPE)).astype(np.float16)
    return latent_table([str(row) for row in range(ROWS)], np.arange(ROWS), {"z": z}), z


def _pages(path: Path, group: int = 0) -> dict[str, PlainPage]:
    with FileIO(path) as file:
        return plain_pages(file, pq.ParquetFile(path).metadata, group, ROW_BYTES)


@pytest.fixture
def part(tmp_path: Path) -> tuple[Path, np.ndarray]:
    table, z = _table()
    pq.write_table(table, tmp_path / "part.parquet", row_group_size=256, **WRITE_OPTIONS)
    return tmp_path / "part.parquet", z


def test_rows_of_what_we_write_are_read_where_they_lie(part: tuple[Path, np.ndarray]) -> None:
    path, z = part
    for group, rows in enumerate(([0, 1, 2], [3, 17, 255], [187])):
        pages = _pages(path, group)
        assert sorted(pages) == ["label", "z"]
        values, labels = np.empty((len(rows), 105), np.float16), np.empty(len(rows), np.int32)
        with FileIO(path) as file:
            pages["z"].read(file, np.array(rows), values)
            pages["label"].read(file, np.array(rows), labels)
        assert labels.tolist() == [256 * group + row for row in rows]
        assert np.array_equal(values, z[labels].reshape(len(rows), -1))


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "snappy"},
        {"use_dictionary": True},
        {"data_page_size": 64, "write_batch_size": 4},
        {"data_page_version": "2.0"},
        {"write_page_checksum": False},
        {"column_encoding": {"label": "DELTA_BINARY_PACKED", "z": "BYTE_STREAM_SPLIT"}},
    ],
    ids=str,
)
def test_what_lies_otherwise_is_left_to_a_decoder(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(_table()[0], path, row_group_size=256, **{**WRITE_OPTIONS, **options})
    assert _pages(path) == {}


def test_columns_that_may_have_nulls_are_left_to_a_decoder(tmp_path: Path) -> None:
    table, path = _table()[0], tmp_path / "part.parquet"
    nullable = pa.schema([field.with_nullable(True) for field in table.schema])
    pq.write_table(table.cast(nullable), path, row_group_size=256, **WRITE_OPTIONS)
    assert _pages(path) == {}


@pytest.mark.parametrize("column", sorted(ROW_BYTES))
def test_a_flipped_bit_is_no_plain_page(part: tuple[Path, np.ndarray], column: str) -> None:
    path, _ = part
    data, page = bytearray(path.read_bytes()), _pages(path)[column]
    for at in (page.offset, page.offset + 256 * page.row_bytes - 1, page.offset - 12):
        data[at] ^= 1
        path.write_bytes(data)
        assert column not in _pages(path)
        data[at] ^= 1
    path.write_bytes(data)
    assert sorted(_pages(path)) == ["label", "z"]


def test_a_file_that_ends_too_early_is_told(part: tuple[Path, np.ndarray]) -> None:
    path, _ = part
    page = _pages(path)["z"]
    os.truncate(path, page.offset + 3 * page.row_bytes + 10)
    with FileIO(path) as file:
        page.read(file, np.arange(3), np.empty((3, 105), np.float16))
        with pytest.raises(EOFError, match="it ends 200 bytes too early"):
            page.read(file, np.arange(2, 4), np.empty((2, 105), np.float16))
