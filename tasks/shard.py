"""Stage `shard`: any pile of labelled images to Parquet shards in one global, deterministic order.

The driver lists the source, orders it by key hash and writes that plan; each part is then read, checked and written
by one Ray Data task, so parts do not depend on the number of workers and a killed run writes only missing ones.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs import Recipe, UserError
from configs.data import Data, FashionMnist
from configs.data import Shard as ShardSection
from infra import logs, servers
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
from tasks.sources import Account, Listing, Reader, Refusal, ScannedSource, listing_of, open_source
from tasks.sources.duplicates import find_duplicates
from tasks.sources.unpack import BLOBS, Unpacked, unpack
from tasks.stage import Context, Outcome, Stage

SPLITS = ("train", "test")
PLAN = "plan.parquet"
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
_READERS = 8  # threads that wait for storage while one decodes
_ENOUGH = 20_000  # images to have seen before a bad source is given up: below, the whole is told
_BYTES_PER_PIXEL = 8  # no honest file needs more for a pixel (16-bit RGBA, uncompressed)


def run(context: Context) -> Outcome:
    """List, plan, write what is missing, and account for every image of the source.

    Raises:
        UserError: the source is missing, contradicts the recipe, or too much of it is unusable.
    """
    recipe, out = context.recipe, context.out
    source = open_source(recipe.data)
    listing = listing_of(source)
    account = Account.of(recipe.data, listing, context.job.sections.get("external", {}).get("source", ""))
    account.check(recipe)
    _check_unchanged(account, listing, recipe.data)
    for line in account.lines(recipe.data, recipe.shard):
        logs.say(line, stage="shard")
    splits, ruled_out = plan(listing, recipe.shard)
    _check_learnable(splits, listing.classes, recipe)
    total = sum(table.num_rows for table in splits.values())
    if isinstance(source, ScannedSource):
        splits = unpack(out, recipe.data, splits)
    jobs = _write_plan(out, splits, recipe.shard.rows_per_shard)
    done = finished(out, [(job["part"], job["made_from"]) for job in jobs])
    missing = [job for job in jobs if job["part"] not in done]
    refused = [refusal for receipt in done.values() for refusal in _refusals(receipt)]
    seen = total - sum(job["rows"] for job in missing)
    with Bar("shard", total) as bar:
        bar.skip(seen)
        for receipt in _written(out, recipe, missing):
            done[receipt.entry.path] = receipt
            refused += _refusals(receipt)
            seen += (receipt.entry.rows or 0) + len(receipt.facts["refused"])
            if _ENOUGH <= seen < total:
                _stop_if_too_bad(refused, seen, total, recipe.shard)
            bar.advance((receipt.entry.rows or 0) + len(receipt.facts["refused"]))
    _stop_if_too_bad(refused, total, total, recipe.shard)
    outcome = _outcome(out, account, recipe, [done[job["part"]].entry for job in jobs], sorted([*ruled_out, *refused]))
    context.tracker.file("source.txt", "\n".join(account.lines(recipe.data, recipe.shard)).encode())
    for leftover in (BLOBS, f"{RECEIPTS}/{BLOBS}"):
        out.delete(leftover)
    return outcome


def plan(listing: Listing, section: ShardSection) -> tuple[dict[str, pa.Table], list[Refusal]]:
    """Images of each split in their final order, and refusals known before anything is read.

    The order is by key hash. A source without splits of its own gives the first `test_share` of it to the test
    split. Where a key is listed twice the first row counts. Splits without images are left out.
    """
    table, refused = _unique_keys(listing)
    order = np.argsort(_hashes(table["key"].to_pylist(), section.seed), kind="stable")
    table = table.take(pa.array(order))
    named = np.array(table["split"].fill_null("").to_pylist(), dtype=object)
    splits: dict[str, pa.Table] = {}
    loose = np.flatnonzero(named == "")
    cut = round(section.test_share * len(loose))
    if section.test_share > 0 and len(loose) > 1:
        cut = max(1, cut)
    rows = {
        "train": np.sort(np.concatenate([np.flatnonzero(named == "train"), loose[cut:]])),
        "test": np.sort(np.concatenate([np.flatnonzero(named == "test"), loose[:cut]])),
    }
    for split in SPLITS:
        chosen = rows[split][: section.limit]
        if len(chosen):
            splits[split] = table.take(pa.array(chosen))
    return splits, refused


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


def _check_learnable(splits: dict[str, pa.Table], classes: Sequence[str], recipe: Recipe) -> None:
    """Refuse splits in which a class that the source has is never learned."""
    if recipe.shard.test_share == 1.0:  # nobody trains on it
        return
    train = splits["train"]["label"].unique().to_pylist() if "train" in splits else []
    unseen = [name for label, name in enumerate(classes) if label not in set(train)]
    if unseen and not recipe.data.allow_empty_classes:
        raise UserError(
            f"{len(unseen)} of {len(classes)} classes have no image in the train split (such as {unseen[0]!r}) once "
            f"shard.limit {recipe.shard.limit} and shard.test_share {recipe.shard.test_share:g} are applied: raise the "
            "limit, lower the share, or set data.allow_empty_classes to true to keep labels that are never learned"
        )


def _unique_keys(listing: Listing) -> tuple[pa.Table, list[Refusal]]:
    keys = listing.images["key"].to_pylist()
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    if len(first) == len(keys):
        return listing.images, list(listing.refused)
    again = [Refusal(key, "key listed twice") for row, key in enumerate(keys) if first[key] != row]
    return listing.images.take(pa.array(list(first.values()))), [*listing.refused, *again]


def _hashes(keys: Sequence[str], seed: int) -> np.ndarray:
    """uint64 (N,): the place of each key in the global order."""
    salt = seed.to_bytes(8, "little", signed=True)
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8, key=salt).digest() for key in keys)
    return np.frombuffer(digests, dtype=">u8")


def _write_plan(out: Storage, splits: dict[str, pa.Table], rows_per_shard: int) -> list[dict[str, Any]]:
    """Write the order as one row group per part; the jobs, one per part, as plain rows."""
    jobs: list[dict[str, Any]] = []
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, next(iter(splits.values())).schema) as writer:
        for split, table in splits.items():
            parts = -(-table.num_rows // rows_per_shard)
            cuts = np.linspace(0, table.num_rows, parts + 1).astype(int)
            for number, (start, stop) in enumerate(pairwise(cuts.tolist())):
                writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
                jobs.append({"part": part_name(split, number), "group": len(jobs), "rows": stop - start})
    entry = out.write_bytes(PLAN, buffer.getvalue().to_pybytes())
    return [{**job, "made_from": entry.sha256} for job in jobs]


def _written(out: Storage, recipe: Recipe, jobs: list[dict[str, Any]]) -> Iterator[Receipt]:
    """Write parts on the cluster; receipts as they are finished."""
    if not jobs:
        return
    import ray.data

    connect()
    quiet_ray_data()
    write = partial(_write_part, out=out, data=recipe.data, section=recipe.shard)
    parts = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map(write)
    yield from receipts(parts.iter_rows())


def _write_part(job: dict[str, Any], out: Storage, data: Data, section: ShardSection) -> dict[str, bytes]:
    """What a Ray task does with one job."""
    return receipt_row(lambda: write_part(job, out, data, section))


def write_part(job: dict[str, Any], out: Storage, data: Data, section: ShardSection) -> Receipt:
    """Read, check and write one part."""
    source = open_source(data)
    reader = Unpacked(out) if isinstance(source, ScannedSource) else source
    with out.open(PLAN) as file:
        rows = pq.ParquetFile(file).read_row_group(job["group"])
    kept: list[tuple[str, int, bytes, bytes]] = []
    refused: list[Refusal] = []
    for key, label, image in _images(reader, rows, section):
        if isinstance(image, Refusal):
            refused.append(image)
        else:
            kept.append((key, label, image, hashlib.blake2b(image, digest_size=8).digest()))
    columns = list(zip(*kept, strict=True)) or [()] * len(SCHEMA)
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    entry = out.write_table(
        job["part"], table, SHARD_ROWS_PER_GROUP, compression="none", use_dictionary=False, write_page_checksum=True
    )
    facts = {"refused": [[r.key, r.reason, r.detail] for r in refused]}
    receipt = Receipt(entry, job["made_from"], facts)
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


def _stop_if_too_bad(refused: Sequence[Refusal], seen: int, total: int, section: ShardSection) -> None:
    """Stop where more than the allowed share of the source is unusable, however the unseen images turn out."""
    if len(refused) <= section.max_bad_share * total:
        return
    reasons = Counter(refusal.reason for refusal in refused)
    counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    examples = {
        refusal.reason: f"{refusal.key!r}{f' ({refusal.detail})' * bool(refusal.detail)}" for refusal in refused
    }
    whole = f"{total:,}" if seen == total else f"the first {seen:,} (of {total:,})"
    share = f" to {math.ceil(100 * len(refused) / seen) / 100:.2f}" if seen == total else ""
    raise UserError(
        f"{len(refused):,} of {whole} images are unusable ({counts}; for example {', '.join(examples.values())}), "
        f"more than shard.max_bad_share {section.max_bad_share:g} allows: mend the source or raise "
        f"shard.max_bad_share{share}"
    )


def _refusals(receipt: Receipt) -> list[Refusal]:
    return [Refusal(*refusal) for refusal in receipt.facts["refused"]]


def _outcome(
    out: Storage, account: Account, recipe: Recipe, entries: Sequence[FileEntry], refused: Sequence[Refusal]
) -> Outcome:
    rows = {split: sum(e.rows or 0 for e in entries if e.path.startswith(f"{split}/")) for split in SPLITS}
    if not rows["train"] and recipe.shard.test_share < 1.0:
        raise UserError("no image is left for the train split: lower shard.test_share or add images")
    columns = [[getattr(refusal, name) for refusal in refused] for name in ("key", "reason", "detail")]
    quarantine = pa.table([pa.array(column, pa.string()) for column in columns], names=["key", "reason", "detail"])
    duplicates, duplicate_counts = find_duplicates(out, [entry.path for entry in entries])
    facts = {
        "classes": list(account.classes),
        "splits": rows,
        "rows_per_group": SHARD_ROWS_PER_GROUP,
        "quarantine": dict(Counter(refusal.reason for refusal in refused).most_common()),
        "duplicates": duplicate_counts,
        "notes": list(account.notes),
        "source": account.facts(recipe),
    }
    return Outcome(
        files=[
            *entries,
            out.write_table(QUARANTINE, quarantine, 10_000),
            out.write_table(DUPLICATES, duplicates, 10_000),
        ],
        rows=sum(rows.values()),
        facts=facts,
        scores={"quarantined": float(len(refused)), "duplicates": float(duplicate_counts["images"])},
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
    _check_learnable(plan(listing, recipe.shard)[0], listing.classes, recipe)


STAGE = Stage(name="shard", version=1, sections=("data", "shard"), inputs=(), run=run, external=external, check=check)
