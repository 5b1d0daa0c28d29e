"""Stage `shard`: any pile of labelled images to Parquet shards in one global, deterministic order.

The driver lists the source, orders it by key hash and writes that plan; each part is then read, checked and written
by one Ray Data task, so parts do not depend on the number of workers and a killed run writes only missing ones.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs import Recipe, UserError
from configs.data import Data, FashionMnist
from configs.data import Shard as ShardSection
from infra import logs, servers
from infra.artifacts import Artifact
from infra.cluster import connect
from infra.progress import Bar
from infra.storage import FileEntry, Storage
from tasks.data.decode import Undecodable, decode, reencoded
from tasks.data.portions import SHARD_ROWS_PER_GROUP
from tasks.data.receipts import (
    RECEIPTS,
    Receipt,
    finished,
    part_name,
    quiet_ray_data,
    receipt_row,
    receipts,
    write_receipt,
)
from tasks.data.rows import Rows, cut_to, in_order, sized
from tasks.sources import Account, Listing, Reader, Refusal, ScannedSource, growing, listing_of, open_source
from tasks.sources.base import REFUSALS, content_of, refusal_table
from tasks.sources.duplicates import SCHEMA as DUPLICATES_SCHEMA
from tasks.sources.duplicates import find_duplicates
from tasks.sources.growing import PARTS_PER_PLAN, Growth, OldPart, plan_name
from tasks.sources.ordering import SPLITS, Order, ordered
from tasks.sources.unpack import BLOBS, Unpacked, unpack
from tasks.stage import Context, Outcome, Stage

QUARANTINE = "quarantine.parquet"
DUPLICATES = "duplicates.parquet"
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("content", pa.binary(8), nullable=False),
    ]
)
"""`image` is the encoded file, as it was or as `shard.reencode` wants it; `content` a hash of it, for duplicates."""
_AT_ONCE = 4_096  # parts that Ray Data is given at once: it holds some kilobytes for each
_READERS = 8  # threads that wait for storage while one decodes
_ROWS_PER_GROUP = 10_000  # of quarantine and duplicates
_ENOUGH = 20_000  # images to have seen before a bad source is given up: below, the whole is told
_BYTES_PER_PIXEL = 8  # no honest file needs more for a pixel (16-bit RGBA, uncompressed)


def run(context: Context) -> Outcome:
    """List, plan, write what is missing, and account for every image of the source.

    Raises:
        UserError: the source is missing, contradicts the recipe, or too much of it is unusable; or the set that it
            grows from cannot be used.
    """
    recipe, out = context.recipe, context.out
    old = growing.origin(recipe, context.job.root)
    source = open_source(recipe.data)
    listing = listing_of(source)
    account = Account.of(recipe.data, listing, context.job.sections.get("external", {}).get("source", ""))
    account.check(recipe)
    _check_unchanged(account, listing, recipe.data)
    for line in account.lines(recipe.data, recipe.shard):
        logs.say(line, stage="shard")
    order = ordered(listing, recipe.shard)
    _check_learnable(order.learnt, listing.classes, recipe)
    growth = None if old is None else growing.grown(old, order, source)
    if growth is not None:
        order = growth.order
        logs.say(growth.line, stage="shard")
    if isinstance(source, ScannedSource):
        order = replace(order, rows=unpack(out, recipe.data, order.rows, () if growth is None else growth.stretches))
    jobs = write_plan(out, order, recipe.shard.rows_per_shard, growth)
    made = _made(out, recipe, jobs, order.rows.num_rows)
    for chunk in order.ruled_out.chunks():
        made.refused.add(chunk)
    entries = [entry for job in jobs if (entry := made.entries[job["part"]]).rows]  # all of a part may be refused
    outcome = _outcome(out, account, recipe, entries, made.refused)
    lines = account.lines(recipe.data, recipe.shard)
    if growth is not None:
        outcome.facts["grown"] = growth.facts()
        lines.append(growth.line)
    context.tracker.file("source.txt", "\n".join(lines).encode())
    for leftover in (BLOBS, f"{RECEIPTS}/{BLOBS}"):
        out.delete(leftover)
    return outcome


@dataclass
class _Made:
    """What is known of the parts so far."""

    entries: dict[str, FileEntry] = field(default_factory=dict)
    refused: Rows = field(default_factory=lambda: Rows(REFUSALS))
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """One image for each reason."""
    seen: int = 0
    """Images that are in a part or refused."""

    def add(self, receipt: Receipt) -> int:
        """Images that this part has seen."""
        refused = [Refusal(*one) for one in receipt.facts["refused"]]
        self.entries[receipt.entry.path] = receipt.entry
        self.refused.add(refusal_table(refused))
        for one in refused:
            self.reasons[one.reason] += 1
            self.examples[one.reason] = f"{one.key!r}{f' ({one.detail})' * bool(one.detail)}"
        count = (receipt.entry.rows or 0) + len(refused)
        self.seen += count
        return count


def _made(out: Storage, recipe: Recipe, jobs: list[dict[str, Any]], total: int) -> _Made:
    """Every part, written where it is missing; given up where too many images are unusable."""
    made = _Made()
    with Bar("shard", total) as bar:
        for receipt in finished(out, [(job["part"], job["made_from"]) for job in jobs]):
            made.add(receipt)
        bar.skip(made.seen)
        for receipt in _written(out, recipe, [job for job in jobs if job["part"] not in made.entries]):
            count = made.add(receipt)
            if _ENOUGH <= made.seen < total:
                _stop_if_too_bad(made, total, recipe.shard)
            bar.advance(count)
    _stop_if_too_bad(made, total, recipe.shard)
    return made


def external(recipe: Recipe) -> dict[str, str]:
    """What identifies the source's content in the fingerprint.

    Raises:
        UserError: there is no such source, or it contradicts the recipe.
    """
    source = open_source(recipe.data)
    if recipe.data.revision is not None:
        source.check_there()
        return {"source": recipe.data.revision}
    if isinstance(recipe.data.source, FashionMnist):  # one published set: nothing to look for, and maybe not here yet
        return {"source": source.identity()}
    listing = listing_of(source)
    Account.of(recipe.data, listing).check(recipe)
    return {"source": listing.identity}


def _check_unchanged(account: Account, listing: Listing, data: Data) -> None:
    if data.revision is None and listing.identity != account.identity:
        raise UserError(
            f"data.source {account.place} is not what it was when this run looked at it: let it come to rest and run "
            "again"
        )


def _check_learnable(learnt: Set[int], classes: Sequence[str], recipe: Recipe) -> None:
    """Refuse splits in which a class that the source has is never learned."""
    if recipe.shard.test_share == 1.0:  # nobody trains on it
        return
    unseen = [name for label, name in enumerate(classes) if label not in learnt]
    if unseen and not recipe.data.allow_empty_classes:
        raise UserError(
            f"{len(unseen)} of {len(classes)} classes have no image in the train split (such as {unseen[0]!r}) once "
            f"shard.limit {recipe.shard.limit} and shard.test_share {recipe.shard.test_share:g} are applied: raise the "
            "limit, lower the share, or set data.allow_empty_classes to true to keep labels that are never learned"
        )


def write_plan(out: Storage, order: Order, rows_per_shard: int, growth: Growth | None = None) -> list[dict[str, Any]]:
    """Write the order as one row group per part; the jobs, one per part, as plain rows.

    growth: whose order it is, where the set grew from another.
    """
    parts: list[tuple[str, int, OldPart | None]] = []
    for split, total in order.counts.items():
        old = [each for each in growth.parts if each.entry.path.startswith(f"{split}/")] if growth else []
        parts += [(each.entry.path, each.rows, each) for each in old]
        total -= sum(each.rows for each in old)
        first = growth.first[split] if growth else 0
        cuts = np.linspace(0, total, -(-total // rows_per_shard) + 1).astype(int).tolist()
        parts += [(part_name(split, n), stop - start, None) for n, (start, stop) in enumerate(pairwise(cuts), first)]
    jobs: list[dict[str, Any]] = []
    for number, (name, rows, kept) in enumerate(parts):
        plan, group = divmod(number, PARTS_PER_PLAN)
        root, whole = (growth.origin.root, kept.whole) if growth and kept else ("", False)
        jobs.append({"part": name, "plan": plan, "group": group, "rows": rows, "root": root, "whole": whole})
    longest = max([rows_per_shard, *(job["rows"] for job in jobs)])  # an old set's parts may be longer
    tables = cut_to(order.rows.chunks(), [job["rows"] for job in jobs])
    hashes = []
    for first in range(0, len(jobs), PARTS_PER_PLAN):
        some = islice(tables, min(PARTS_PER_PLAN, len(jobs) - first))
        name = plan_name(first // PARTS_PER_PLAN)
        hashes.append(out.write_tables(name, some, order.rows.schema, longest).sha256)
    return [{**job, "made_from": hashes[job["plan"]]} for job in jobs]


def _written(out: Storage, recipe: Recipe, jobs: list[dict[str, Any]]) -> Iterator[Receipt]:
    """Write parts on the cluster; receipts as they are finished."""
    if not jobs:
        return
    import ray.data

    connect()
    quiet_ray_data()
    write = partial(_write_part, out=out, data=recipe.data, section=recipe.shard)
    for first in range(0, len(jobs), _AT_ONCE):
        some = jobs[first : first + _AT_ONCE]
        yield from receipts(ray.data.from_items(some, override_num_blocks=len(some)).map(write).iter_rows())


def _write_part(job: dict[str, Any], out: Storage, data: Data, section: ShardSection) -> dict[str, bytes]:
    """What a Ray task does with one job."""
    return receipt_row(lambda: write_part(job, out, data, section))


def write_part(job: dict[str, Any], out: Storage, data: Data, section: ShardSection) -> Receipt:
    """Read, check and write one part; one of the set that this one grew from, of what that has."""
    old = Artifact(job["root"], "shard", section.grows) if job["root"] and section.grows else None
    if old is not None and job["whole"]:
        out.share(job["part"], old.storage)
        return _written_part(out, job, next(e for e in old.manifest.files if e.path == job["part"]))
    with out.open(plan_name(job["plan"])) as file:
        rows = pq.ParquetFile(file).read_row_group(job["group"])
    if old is not None:
        return _written_part(out, job, _write(out, job["part"], growing.kept_part(old, job["part"], rows)))
    source = open_source(data)
    reader = Unpacked(out) if isinstance(source, ScannedSource) else source
    kept: list[tuple[str, int, bytes, bytes]] = []
    refused: list[Refusal] = []
    for key, label, image in _images(reader, rows, section):
        if isinstance(image, Refusal):
            refused.append(image)
        else:
            kept.append((key, label, image, content_of(image)))
    columns = list(zip(*kept, strict=True)) or [()] * len(SCHEMA)
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    return _written_part(out, job, _write(out, job["part"], table), refused)


def _write(out: Storage, part: str, table: pa.Table) -> FileEntry:
    return out.write_table(
        part, table, SHARD_ROWS_PER_GROUP, compression="none", use_dictionary=False, write_page_checksum=True
    )


def _written_part(out: Storage, job: dict[str, Any], entry: FileEntry, refused: Sequence[Refusal] = ()) -> Receipt:
    receipt = Receipt(entry, job["made_from"], {"refused": [[r.key, r.reason, r.detail] for r in refused]})
    write_receipt(out, receipt)
    return receipt


def _images(source: Reader, rows: pa.Table, section: ShardSection) -> Iterator[tuple[str, int, bytes | Refusal]]:
    """Each row's key, label and checked bytes, in order; threads read ahead while this one decodes."""
    columns = [rows[name].to_pylist() for name in ("key", "label", "file", "start", "length")]
    with ThreadPoolExecutor(_READERS) as readers:
        ahead: deque[tuple[str, int, Future[bytes | Refusal]]] = deque()
        for key, label, file, start, length in zip(*columns, strict=True):
            ahead.append((key, label, readers.submit(_read, source, key, file, start, length, section.max_pixels)))
            if len(ahead) > 2 * _READERS:
                yield _checked(*ahead.popleft(), section)
        while ahead:
            yield _checked(*ahead.popleft(), section)


def _read(source: Reader, key: str, file: str, start: int, length: int, max_pixels: int) -> bytes | Refusal:
    limit = _BYTES_PER_PIXEL * max_pixels
    too_large = Refusal(key, "file too large", f"more than {limit} bytes for at most {max_pixels} pixels")
    if length > limit:
        return too_large
    try:
        data = source.read(file, start, length or limit + 1)  # of unknown length: it may have no end
    except (OSError, UserError) as error:
        return Refusal(key, "unreadable", " ".join(str(error).split())[:200])
    return too_large if len(data) > limit else data


def _checked(
    key: str, label: int, reading: Future[bytes | Refusal], section: ShardSection
) -> tuple[str, int, bytes | Refusal]:
    data = reading.result()
    if isinstance(data, Refusal):
        return key, label, data
    try:
        image = decode(data, section.max_pixels)
        if section.reencode is not None:
            data = reencoded(image, section.reencode.size, section.reencode.quality)
    except Undecodable as error:
        return key, label, Refusal(key, error.reason, error.detail)
    return key, label, data


def _stop_if_too_bad(made: _Made, total: int, section: ShardSection) -> None:
    """Stop where more than the allowed share of the source is unusable, however the unseen images turn out."""
    refused, seen = made.refused.num_rows, made.seen
    if refused <= section.max_bad_share * total:
        return
    counts = ", ".join(f"{count:,} {reason}" for reason, count in made.reasons.most_common())
    whole = f"{total:,}" if seen == total else f"the first {seen:,} (of {total:,})"
    share = f" to {math.ceil(100 * refused / seen) / 100:.2f}" if seen == total else ""
    raise UserError(
        f"{refused:,} of {whole} images are unusable ({counts}; for example {', '.join(made.examples.values())}), "
        f"more than shard.max_bad_share {section.max_bad_share:g} allows: mend the source or raise "
        f"shard.max_bad_share{share}"
    )


def _outcome(out: Storage, account: Account, recipe: Recipe, entries: Sequence[FileEntry], refused: Rows) -> Outcome:
    rows = {split: sum(e.rows or 0 for e in entries if e.path.startswith(f"{split}/")) for split in SPLITS}
    if not rows["train"] and recipe.shard.test_share < 1.0:
        raise UserError("no image is left for the train split: lower shard.test_share or add images")
    duplicates, duplicate_counts = find_duplicates(out, [entry.path for entry in entries])
    reasons: Counter[str] = Counter()

    def quarantine() -> Iterator[pa.Table]:
        for chunk in in_order(refused, *REFUSALS.names):
            reasons.update(chunk["reason"].to_pylist())
            yield chunk

    tables = {QUARANTINE: (quarantine(), REFUSALS), DUPLICATES: (duplicates.chunks(), DUPLICATES_SCHEMA)}
    reports = [
        out.write_tables(name, sized(each, _ROWS_PER_GROUP), schema, _ROWS_PER_GROUP)
        for name, (each, schema) in tables.items()
    ]
    facts = {
        "classes": list(account.classes),
        "splits": rows,
        "rows_per_group": SHARD_ROWS_PER_GROUP,
        "quarantine": dict(reasons.most_common()),
        "duplicates": duplicate_counts,
        "notes": list(account.notes),
        "source": account.facts(recipe),
    }
    return Outcome(
        files=[*entries, *reports],
        rows=sum(rows.values()),
        facts=facts,
        scores={"quarantined": float(refused.num_rows), "duplicates": float(duplicate_counts["images"])},
    )


def check(recipe: Recipe) -> None:
    """Look at the source as the stage will: what has to be fetched comes now, not once servers have started.

    Raises:
        UserError: it cannot be had, contradicts the recipe, or leaves a class unlearned.
    """
    if servers.elsewhere():
        return
    listing = listing_of(open_source(recipe.data))
    Account.of(recipe.data, listing).check(recipe)
    _check_learnable(ordered(listing, recipe.shard).learnt, listing.classes, recipe)


STAGE = Stage(name="shard", version=1, sections=("data", "shard"), inputs=(), run=run, external=external, check=check)
