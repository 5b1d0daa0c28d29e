from __future__ import annotations

import os
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from tasks.loading.placement import Placement, read_into

WIDTH = 8
ROWS = 3000


@pytest.fixture
def rows(tmp_path: Path) -> np.ndarray:
    """uint8 (rows, bytes of a row), which a file `rows` holds after five other bytes."""
    found = np.random.default_rng(0).integers(256, size=(ROWS, WIDTH), dtype=np.uint8)
    (tmp_path / "rows").write_bytes(b"other" + found.tobytes())
    return found


def test_more_places_than_one_call_takes(rows: np.ndarray, tmp_path: Path) -> None:
    assert os.sysconf("SC_IOV_MAX") < ROWS
    found = np.zeros_like(rows)
    with FileIO(tmp_path / "rows") as file:
        read_into(file, 5, [row.data for row in found])
        assert file.tell() == 0
    assert np.array_equal(found, rows)


def test_a_read_that_comes_back_short_goes_on(
    rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.preadv

    def short(fd: int, places: list[memoryview], offset: int) -> int:
        some = [*places[:2], places[2][:3]] if len(places) > 2 else places
        return whole(fd, some, offset)

    monkeypatch.setattr("os.preadv", short)
    found = np.zeros_like(rows[:50])
    with FileIO(tmp_path / "rows") as file:
        read_into(file, 5, [row.data for row in found])
    assert np.array_equal(found, rows[:50])


def test_a_file_that_ends_early_is_noticed(rows: np.ndarray, tmp_path: Path) -> None:
    os.truncate(tmp_path / "rows", 5 + 10 * WIDTH + 3)
    found = np.zeros_like(rows[:20])
    with FileIO(tmp_path / "rows") as file, pytest.raises(EOFError, match=r"ends 77 bytes before"):
        read_into(file, 5, [row.data for row in found])


def test_only_wanted_rows_are_read_and_each_goes_to_its_place(
    rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = np.array([0, 1, 2, 7, 9, 10, 2999])
    goals = np.random.default_rng(1).permutation(len(wanted))
    read, whole = list[int](), os.preadv
    monkeypatch.setattr("os.preadv", lambda *given: read.append(whole(*given)) or read[-1])
    for source in ("file", "values"):
        found = np.zeros((len(wanted), WIDTH), np.uint8)
        placement = Placement(wanted, [found[goal].data for goal in goals])
        if source == "file":
            with FileIO(tmp_path / "rows") as file:
                placement.fill_from_file(file, 5)
        else:
            placement.fill_from(rows.view(np.float16))
        assert np.array_equal(found[goals], rows[wanted])
    assert read == [3 * WIDTH, WIDTH, 2 * WIDTH, WIDTH]
