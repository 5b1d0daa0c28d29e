"""Tables beyond memory: the same rows in the same order as one table that is sorted at once."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest

from configs import UserError
from tasks.data import rows
from tasks.data.receipts import InOrder, Receipt, part_name
from tasks.data.rows import Rows, cut_to, in_order, sized
from tasks.data.statistics import ChannelSums, Merging

SCHEMA = pa.schema([("word", pa.string()), ("number", pa.int64())])


@pytest.fixture(params=["in memory", "on disk"])
def bounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "on disk":
        monkeypatch.setattr(rows, "HELD_BYTES", 500)
        monkeypatch.setattr(rows, "AT_ONCE", 50)
        monkeypatch.setattr(rows, "_SAMPLED", 100)
        monkeypatch.setattr(rows, "_MOST_PIECES", 3)
        monkeypatch.setattr(rows, "AS_OBJECTS", 4)


def _pairs(count: int) -> list[tuple[str, int]]:
    """Words that tie, sort otherwise in UTF-16 than in UTF-8, or are empty; numbers are places."""
    rng = random.Random(0)
    some = ["", "a", "a b", "a/x", "B", "é", "e\u0301", "\ufffd", "\U0001f600", *(f"{n:03d}" for n in range(300))]
    return [(rng.choice(some), place) for place in range(count)]


def _rows(pairs: list[tuple[str, int]], step: int) -> Rows:
    """Every third portion row by row."""
    found = Rows(SCHEMA)
    for start in range(0, len(pairs), step):
        if start // step % 3 == 2:
            for pair in pairs[start : start + step]:
                found.append(*pair)
            continue
        columns = zip(*pairs[start : start + step], strict=True)
        found.add(pa.table(list(map(pa.array, columns)), schema=SCHEMA))
    return found


def _listed(tables: object) -> list[tuple[str, int]]:
    return [(row["word"], row["number"]) for table in tables for row in table.to_pylist()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("step", [1, 7, 1_000])
@pytest.mark.parametrize("count", [0, 1, 49, 50, 51, 2_000])
def test_rows_come_back_and_in_any_order(bounds: None, count: int, step: int) -> None:
    pairs = _pairs(count)
    held = _rows(pairs, step)
    assert held.num_rows == count and _listed(held.chunks()) == pairs == list(held.tuples())
    assert _listed(in_order(held, "word")) == sorted(pairs, key=lambda pair: pair[0]), "ties keep their order"
    assert _listed(in_order(held, "number")) == pairs
    places = sorted(random.Random(1).sample(range(count), min(count, 5)))
    assert [row["number"] for row in held.take(places)] == places


def test_equal_values_are_in_one_portion(bounds: None) -> None:
    seen: list[str] = []
    for portion in in_order(_rows(_pairs(2_000), 100), "word"):
        seen += set(portion["word"].to_pylist())
    assert len(seen) == len(set(seen))


def test_one_value_alone_is_one_portion(bounds: None) -> None:
    pairs = [("same", place) for place in range(300)]
    (portion,) = in_order(_rows(pairs, 40), "word")
    assert _listed([portion]) == pairs


def test_long_rows_are_sorted_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Portions are bounded by bytes, too: there may be as many receipts of 10 kB as parts."""
    monkeypatch.setattr(rows, "PORTION_BYTES", 20_000)
    monkeypatch.setattr(rows, "HELD_BYTES", 5_000)
    pairs = [(f"{7 * place % 200:03d}" + "x" * 1_000, place) for place in range(200)]
    portions = list(in_order(_rows(pairs, 10), "word"))
    assert _listed(portions) == sorted(pairs)
    assert len(portions) >= 10 and max(portion.nbytes for portion in portions) < 40_000


@pytest.mark.parametrize("counts", [[3, 3, 3, 1], [10], [4, 20], [1, 2]])
def test_rows_are_cut_to_counts(counts: list[int]) -> None:
    pairs = _pairs(10)
    found = list(cut_to(_rows(pairs, 4).chunks(), counts))
    assert _listed(found) == pairs[: sum(counts)]
    assert [table.num_rows for table in found] == [min(n, 10 - sum(counts[:at])) for at, n in enumerate(counts)]
    assert [table.num_rows for table in sized(iter(found), 4)] == [4, 4, 2][: -(-min(10, sum(counts)) // 4)] or sum(
        counts
    ) < 10


def test_a_full_disk_is_told(tmp_path: Path, bounds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows.tempfile, "tempdir", str(tmp_path / "nowhere"))
    monkeypatch.setattr(rows, "HELD_BYTES", 0)
    with pytest.raises(UserError, match=r"nowhere cannot take the rows of a large source .*set TMPDIR"):
        _rows(_pairs(10), 1)


def test_what_lies_on_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(rows, "HELD_BYTES", 0)
    held = _rows(_pairs(100), 10)
    assert held.num_rows == 100 and not list(tmp_path.iterdir())


def test_statistics_of_parts_that_come_one_by_one_are_the_same_bits() -> None:
    rng = random.Random(2)
    for channels in (1, 2, 32):
        parts = [
            ChannelSums(3, *([rng.gauss(0, 10**9) for _ in range(channels)] for _ in range(2))) for _ in range(500)
        ]
        import numpy as np

        merging = Merging()
        for part in parts:
            merging.add(part)
        expected = [np.sum([getattr(part, name) for part in parts], axis=0) for name in ("total", "squares")]
        assert vars(merging.sums()) == {
            "count": 1_500,
            "total": expected[0].tolist(),
            "squares": expected[1].tolist(),
        }


def test_receipts_are_given_in_the_order_of_the_parts(bounds: None) -> None:
    from infra.storage import FileEntry

    names = [part_name("train", number) for number in range(200)]
    made = [Receipt(FileEntry(name, 1, "", 1), "x", {"n": at}) for at, name in enumerate(names)]
    done = InOrder(names)
    for receipt in random.Random(3).sample(made, len(made)):
        assert receipt.entry.path not in done
        done.add(receipt)
    assert list(done) == made and names[0] in done
