"""The law of a grown set's order: what the set that it grew from has stays where it is, and what is new follows.

A grown set has the rows that the same source would have if it were sharded afresh, in its splits. Those that the old
set has stay in their parts, in their order, with the labels of now; new ones follow in parts of their own, in the
order of their keys' hashes. So that no image has to be read to be known again, it is the one of its key, its size
in bytes and its split: what a source is named by, too. Rows of Parquet have numbers for names and tell no sizes: theirs
is a hash of their content in the size's place, for which the files are read once, and nothing is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs import Recipe, UserError
from configs.errors import brief
from infra.artifacts import Artifact
from infra.integrity import lost
from infra.storage import FileEntry
from tasks.data.lineage import grown_from
from tasks.data.rows import Rows, in_order
from tasks.sources.base import LISTING_SCHEMA, ScannedSource, Source
from tasks.sources.duplicates import contents
from tasks.sources.files import in_turn
from tasks.sources.ordering import SPLITS, Order
from tasks.sources.registry import open_source
from tasks.sources.unpack import PLACED, by_file

PARTS_PER_PLAN = 1_000
"""Every task reads the footer of a plan: it must not grow with the data."""
_KEPT = ("max_pixels", "reencode", "seed")
"""Fields of `shard` by which old parts and new ones have to be made."""
_REMEDY = "make that set anew by its own recipe with --force shard, or leave shard.grows out"
_NEW, _TEST = 1 << 40, 1 << 41
"""Bits of a row's place: old parts of a split come before new ones, the train split before the test split."""
_MARKED = PLACED.append(pa.field("mark", pa.int64()))
"""`mark` tells images of one key apart: the size in bytes, or a hash of the content; 0 where it is not known."""


@dataclass(frozen=True)
class OldPart:
    """A part of the set that grows, and what of it stays."""

    entry: FileEntry
    rows: int
    whole: bool
    """Whether it stays as it is; otherwise rows or labels of it have changed."""


@dataclass(frozen=True)
class Growth:
    """What of an order is in a set already."""

    origin: Artifact
    order: Order
    """Its rows in the order of the grown set."""
    parts: tuple[OldPart, ...]
    """Those of which something stays, in their order."""
    first: dict[str, int]
    """Number of the first new part of each split."""
    counts: dict[str, int] = field(default_factory=dict)
    """Images that are kept, added, removed, relabelled and changed (of another size, or in another split, than before);
    kept ones include the relabelled."""

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """Where in `order` the rows of old parts are."""
        found, start = [], 0
        for split, total in self.order.counts.items():
            found.append((start, start + sum(p.rows for p in self.parts if p.entry.path.startswith(f"{split}/"))))
            start += total
        return found

    @property
    def line(self) -> str:
        """For people."""
        whole = sum(part.whole for part in self.parts)
        told = " · ".join(f"{count:,} {what}" for what, count in self.counts.items())
        return (
            f"grown     from {self.origin.stage}/{self.origin.fingerprint}: {told} · of its parts {whole:,} kept as "
            f"they are, {len(self.parts) - whole:,} rewritten"
        )

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        whole = sum(part.whole for part in self.parts)
        before = self.origin.manifest.facts.get("grown", {})
        return {
            "from": self.origin.fingerprint,
            "first": before.get("first", self.origin.fingerprint),
            **self.counts,
            "parts": {"kept": whole, "rewritten": len(self.parts) - whole},
        }


def origin(recipe: Recipe, root: str) -> Artifact | None:
    """The set that the recipe's grows from; None where it is one by itself.

    Raises:
        UserError: it is not there or damaged, or was made by other rules.
    """
    grows = recipe.shard.grows
    if grows is None:
        return None
    if isinstance(open_source(recipe.data), ScannedSource) and recipe.shard.reencode is not None:
        raise UserError(
            f"shard.grows and shard.reencode are set, but rows of {recipe.data.source.kind} are known by their "
            "content, which reencoding changed: leave one of the two out"
        )
    artifact = grown_from(root, grows)
    if damage := lost(artifact):
        raise UserError(f"shard.grows: {artifact.uri}/{damage[0]}: {_REMEDY}")
    was = artifact.manifest.recipe["shard"]
    now = recipe.shard.model_dump(mode="json")
    for name in _KEPT:
        if was.get(name) != now[name]:
            raise UserError(
                f"shard.{name} is {now[name]}, but the set that shard.grows names was made with {was.get(name)}: use "
                "that, or leave shard.grows out"
            )
    return artifact


def grown(old: Artifact, order: Order, source: Source) -> Growth:
    """What of a source's order the old set has.

    Raises:
        UserError: the old set's plan, which has the sizes of its images, is gone or another's.
    """
    entries = [entry for entry in old.manifest.files if "/" in entry.path and entry.rows]
    ends = list(accumulate(entry.rows or 0 for entry in entries))
    train = order.counts.get("train", 0)
    listed, rank = Rows(PLACED), 0
    for chunk in order.rows.chunks():
        ranks = np.arange(rank, rank + chunk.num_rows)
        listed.add(_with(chunk, PLACED, ranks + _NEW + np.where(ranks < train, 0, _TEST)))
        rank += chunk.num_rows
    rows = Rows(_MARKED)
    for table in _marked(listed, source):
        rows.add(table)
    del listed
    before = _known(old, entries) if isinstance(source, ScannedSource) else _listed(old, entries)
    for entry, end, table in zip(entries, ends, before, strict=True):
        split = _TEST if entry.path.startswith("test/") else 0
        places = np.arange(end - table.num_rows, end) + split
        marks = table["mark"] if "mark" in table.column_names else table["length"]
        rows.add(_with(table, _MARKED, places, marks))
    found, stay = Rows(PLACED), np.zeros(len(entries), np.int64)
    touched = np.zeros(len(entries), np.int64)
    counts = dict.fromkeys(("kept", "added", "removed", "relabelled", "changed"), 0)
    for chunk in in_order(rows, "key"):
        kept, relabelled = _matched(chunk, found, counts)
        for ranks, per_part in ((kept, stay), (relabelled, touched)):
            per_part += np.bincount(np.searchsorted(ends, ranks, "right"), minlength=len(entries))
    del rows
    ordered = Rows(LISTING_SCHEMA)
    for chunk in in_order(found, "place"):
        ordered.add(chunk.select(LISTING_SCHEMA.names))
    parts = [
        OldPart(entry, count, count == entry.rows and not changed)
        for entry, count, changed in zip(entries, stay.tolist(), touched.tolist(), strict=True)
    ]
    first = {split: 1 + max([-1, *(_number(e) for e in entries if e.path.startswith(f"{split}/"))]) for split in SPLITS}
    whole = Order(ordered, order.counts, order.learnt, order.ruled_out)
    return Growth(old, whole, tuple(part for part in parts if part.rows), first, counts)


def kept_part(old: Artifact, part: str, rows: pa.Table) -> pa.Table:
    """The rows of a part that stay, with their labels of now, from that part: no image is read again.

    Raises UserError where it is damaged.
    """
    try:
        table = pq.read_table(pa.BufferReader(old.read(part)))
    except UserError as error:
        raise UserError(f"shard.grows: {str(error).partition(';')[0]}: {_REMEDY}") from None
    found = table.take(pc.index_in(rows["key"], value_set=table["key"].combine_chunks()))
    at = found.schema.get_field_index("label")
    return found.set_column(at, found.schema.field(at), rows["label"])


def _with(rows: pa.Table, schema: pa.Schema, *more: Any) -> pa.Table:
    """Rows of a listing with further columns."""
    return pa.table([*rows.select(LISTING_SCHEMA.names).columns, *more], schema=schema)


def _marked(listed: Rows, source: Source) -> Iterator[pa.Table]:
    """Placed rows with what tells images of one key apart."""
    if not isinstance(source, ScannedSource):
        for chunk in listed.chunks():
            yield _with(chunk, _MARKED, chunk["place"], chunk["length"])
        return

    def of_file(each: tuple[str, pa.Table]) -> pa.Table:
        name, rows = each
        marks = _numbers(source.contents(name)["content"])[rows["start"].to_numpy()]
        return _with(rows, _MARKED, rows["place"], marks)

    yield from in_turn(of_file, by_file(listed))


def _numbers(contents: pa.ChunkedArray) -> np.ndarray:
    """int64 (N,) of 8 bytes each."""
    return np.frombuffer(b"".join(contents.to_pylist()), np.int64)


def _matched(chunk: pa.Table, found: Rows, counts: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Add to `found` the listed rows of a portion in the order of keys, each at its place in the grown set.

    Returns:
        ranks in the old set of those that stay, and of those among them with another label.
    """
    places, marks, labels = (chunk[name].to_numpy() for name in ("place", "mark", "label"))
    keys = chunk["key"].combine_chunks()
    new = (places & _NEW) > 0
    first = np.flatnonzero(pc.equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False))  # a key is in a set once
    listed, old = np.where(new[first], first, first + 1), np.where(new[first], first + 1, first)
    same_split = (places[listed] & _TEST) == (places[old] & _TEST)
    same = same_split & (marks[listed] == marks[old]) & (marks[listed] != 0)
    kept, before = listed[same], old[same]
    relabelled = labels[kept] != labels[before]
    at = places.copy()
    at[kept] = places[before]
    taken = np.flatnonzero(new)
    found.add(_with(chunk.take(pa.array(taken)), PLACED, at[taken]))
    counts["kept"] += len(kept)
    counts["added"] += len(taken) - len(listed)
    counts["removed"] += int((~new).sum()) - len(old)
    counts["relabelled"] += int(relabelled.sum())
    counts["changed"] += len(listed) - len(kept)
    ranks = places[before] & (_NEW - 1)
    return ranks, ranks[relabelled]


def _listed(old: Artifact, entries: list[FileEntry]) -> Iterator[pa.Table]:
    """What the old set's listing said of the images in each part; those that were refused are not in it."""
    groups = _groups(old)
    for table in in_turn(lambda entry: _contents(old, entry), entries):
        keys = table["key"].combine_chunks()
        of_part = (group.filter(pc.is_in(group["key"], value_set=keys)) for group in groups)
        listed = next((rows for rows in of_part if rows.num_rows), None)  # of a group may all have been refused
        if listed is None or not listed["key"].combine_chunks().equals(keys):
            raise UserError(_no_plan(old, "is gone or another's"))
        yield listed.set_column(1, listed.schema.field(1), table["label"])


def _known(old: Artifact, entries: list[FileEntry]) -> Iterator[pa.Table]:
    """Keys, labels and contents of the images in each part, without the rest of what a listing says."""
    for table in in_turn(lambda entry: _contents(old, entry), entries):
        nothing = pa.repeat(pa.scalar(0, pa.int64()), table.num_rows)
        none, no_split = pa.repeat("", table.num_rows), pa.nulls(table.num_rows, pa.string())
        columns = [table["key"], table["label"], no_split, none, nothing, nothing]
        yield pa.table(columns, schema=LISTING_SCHEMA).append_column("mark", pa.array(_numbers(table["content"])))


def _contents(old: Artifact, entry: FileEntry) -> pa.Table:
    try:
        return contents(old.storage, entry.path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"shard.grows: {old.uri}/{entry.path} cannot be read ({brief(error, 100)}): {_REMEDY}"
        ) from None


def _groups(old: Artifact) -> Iterator[pa.Table]:
    """The old plan's rows, part by part."""
    names = [name for name in old.storage.sizes() if re.fullmatch(r"plan(-\d+)?\.parquet", name)]
    for number in range(len(names)):
        try:
            with old.storage.open(plan_name(number)) as file:
                plan = pq.ParquetFile(file)
                yield from map(plan.read_row_group, range(plan.num_row_groups))
        except (OSError, pa.ArrowException) as error:
            raise UserError(_no_plan(old, f"cannot be read ({brief(error, 100)})")) from None


def _no_plan(old: Artifact, what: str) -> str:
    return f"shard.grows: the plan of {old.uri}, which has the sizes of its images, {what}: {_REMEDY}"


def plan_name(number: int) -> str:
    return f"plan-{number:05d}.parquet" if number else "plan.parquet"


def _number(entry: FileEntry) -> int:
    return int(entry.path.rpartition("-")[2].removesuffix(".parquet"))
