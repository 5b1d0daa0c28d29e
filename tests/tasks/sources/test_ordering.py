"""The order's law, streamed and held in memory, against the law itself in a few lines."""

from __future__ import annotations

import hashlib
import json
import random
from functools import partial

import pytest

from configs.data import Shard
from tasks.data import rows
from tasks.sources import Listing
from tasks.sources.base import Refusal, Row, identity_of_rows, listed_rows, refusal_table
from tasks.sources.ordering import ordered
from tests.helpers.memory import peak_bytes


@pytest.fixture(params=["in memory", "on disk"])
def bounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "on disk":
        monkeypatch.setattr(rows, "HELD_BYTES", 2_000)
        monkeypatch.setattr(rows, "AT_ONCE", 64)


def _law(listed: list[Row], section: Shard) -> tuple[dict[str, list[Row]], list[str]]:
    first: dict[str, Row] = {}
    again = []
    for row in listed:
        if row[0] in first:
            again.append(row[0])
        first.setdefault(row[0], row)
    salt = section.seed.to_bytes(8, "little", signed=True)
    order = sorted(first.values(), key=lambda row: hashlib.blake2b(row[0].encode(), digest_size=8, key=salt).digest())
    loose = [row for row in order if row[2] is None]
    cut = round(section.test_share * len(loose))
    if section.test_share > 0 and len(loose) > 1:
        cut = max(1, cut)
    held_out = {row[0] for row in loose[:cut]}
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    for row in order:
        splits[row[2] or ("test" if row[0] in held_out else "train")].append(row)
    return {name: found[: section.limit] for name, found in splits.items() if found}, sorted(again)


def _pile(kind: str) -> list[Row]:
    rng = random.Random(0)
    names = [f"class {n % 5}/größe-{n:04d}.jpg" for n in range(700)]
    split = {"loose": [None], "named": ["train", "test"], "mixed": ["train", "test", None]}.get(kind, [None])
    listed = [(name, n % 5, rng.choice(split), f"{n % 3}.tar", 512 * n, 100 + n) for n, name in enumerate(names)]
    if kind == "twice":  # the same key with other labels, next to it and far away, three times and more
        listed += [(name, 4, "test", "again.tar", 0, 1) for name in rng.choices(names, k=200)]
        listed.insert(1, (names[0], 3, None, "again.tar", 0, 1))
    return listed[:1] if kind == "one" else [] if kind == "none" else listed


@pytest.mark.parametrize(
    "options", [{}, {"limit": 40}, {"test_share": 0.0, "seed": 5}, {"test_share": 1.0}, {"test_share": 0.001}]
)
@pytest.mark.parametrize("kind", ["loose", "named", "mixed", "twice", "one", "none"])
def test_the_order_is_the_law(bounds: None, kind: str, options: dict[str, float]) -> None:
    section, listed = Shard(**options), _pile(kind)  # type: ignore[arg-type]
    ruled_out = rows.Rows.of(refusal_table([Refusal("x", "no label")]))
    order = ordered(Listing(listed_rows(listed), ("a", "b", "c", "d", "e"), ruled_out), section)
    splits, again = _law(listed, section)
    assert order.counts == {name: len(found) for name, found in splits.items()}
    found = [tuple(row.values()) for row in order.rows.table().to_pylist()]
    assert found == [row for name in splits for row in splits[name]]
    assert order.learnt == {row[1] for row in splits.get("train", [])}
    refused = sorted((row["key"], row["reason"]) for row in order.ruled_out.table().to_pylist())
    assert refused == sorted([("x", "no label"), *((key, "key listed twice") for key in again)])


@pytest.mark.parametrize("kind", ["mixed", "twice", "none"])
def test_the_identity_is_of_every_row_in_the_order_of_keys(bounds: None, kind: str) -> None:
    listed, refused = _pile(kind), [Refusal("ü", "no label", "b"), Refusal("ü", "no label", "a"), Refusal("A", "x")]
    digest = hashlib.sha256(json.dumps(["web", ["é"], [3, 7]]).encode())
    for key, label, split, _, _, length in sorted(listed, key=lambda row: row[0]):
        digest.update(f"{key}\0{label}\0{split}\0{length}\n".encode())
    for one in sorted(refused):
        digest.update(f"{one.key}\0{one.reason}\n".encode())
    found = identity_of_rows("web", listed_rows(listed), ["é"], rows.Rows.of(refusal_table(refused)), [7, 3])
    assert found == digest.hexdigest()[:32]


def _list_and_order(count: int) -> None:
    listing = Listing(listed_rows((f"{n:09d}.jpg", 0, None, "0.tar", n, 1) for n in range(count)), ("a",))
    assert ordered(listing, Shard()).rows.num_rows == count
    identity_of_rows("web", listing.rows, listing.classes, listing.ruled_out)


def test_memory_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "AS_OBJECTS", 200)
    monkeypatch.setattr(rows, "AT_ONCE", 400)
    monkeypatch.setattr(rows, "HELD_BYTES", 40_000)
    monkeypatch.setattr(rows, "_SAMPLED", 100)
    _list_and_order(100)  # what is imported on the way
    few, many = (peak_bytes(partial(_list_and_order, count)) for count in (4_000, 16_000))
    assert many < 1.5 * few, "12,000 rows more would be four times as much"
