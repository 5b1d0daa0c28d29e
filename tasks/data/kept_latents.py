"""Latents of a grown set that were made before it grew: whole parts, and what is left of parts that lost rows.

A row is the same where its key and its image's content are; latents know nothing of labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.errors import Unreachable, UserError
from infra.artifacts import Artifact, fingerprint
from infra.logs import say
from infra.storage import FileEntry
from tasks.data.receipts import Receipt, read_receipt, receipt_row, write_receipt
from tasks.data.tensors import is_tensor, to_numpy
from tasks.sources.duplicates import contents
from tasks.stage import Context, Job


def jobs(context: Context, version: int, parts: list[FileEntry]) -> list[dict[str, Any]]:
    """One for each of these parts that latents may be taken from; none where there are no earlier latents.

    version: of the stage.
    """
    found = next(_earlier(context, version), None)
    if found is None:
        return []
    shards, latents = found
    before = {entry.path: entry.sha256 for entry in shards.files(suffix=".parquet")}
    there = latents.storage.sizes()
    made = {entry.path: entry.sha256 for entry in latents.manifest.files if there.get(entry.path) == entry.bytes}
    taken: list[dict[str, Any]] = [
        {
            "part": entry.path,
            "made_from": entry.sha256,
            "shards": shards.fingerprint,
            "latents": latents.fingerprint,
            "whole": before[entry.path] == entry.sha256,
            "made": made[entry.path],
        }
        for entry in parts
        if entry.path in before and entry.path in made
    ]
    whole = sum(job["whole"] for job in taken)
    say(
        f"of encode/{latents.fingerprint}: latents of {whole:,} parts as they are, of {len(taken) - whole:,} the rows "
        f"that are left; {len(parts) - len(taken):,} parts are new",
        stage="encode",
    )
    return taken


def _earlier(context: Context, version: int) -> Iterator[tuple[Artifact, Artifact]]:
    """Shards that this set grew from and what the same recipe encoded of them, the latest first."""
    job, shards = context.job, context.input("shard")
    while (came := shards.manifest.facts.get("grown")) is not None:
        shards = Artifact(job.root, "shard", came["from"])
        if not shards.is_complete():
            return
        inputs = {**job.inputs, "shard": shards.fingerprint}
        latents = Artifact(job.root, job.stage, fingerprint(job.stage, version, job.sections, inputs))
        if latents.is_complete():
            yield shards, latents


def part_row(kept: dict[str, Any], job: Job) -> dict[str, bytes]:
    """What a Ray task does with one of :func:`jobs`; None in a receipt's place where the part has to be encoded."""
    return receipt_row(lambda: part(kept, Context(job)))


def part(kept: dict[str, Any], context: Context) -> Receipt | None:
    """Take a part's latents over, whole or the rows that are left of it; None where it has to be encoded."""
    latents = Artifact(context.job.root, "encode", kept["latents"])
    if kept["whole"]:
        receipt = read_receipt(latents.storage, kept["part"])  # the statistics' sums are in it alone
        if receipt is None or (receipt.made_from, receipt.entry.sha256) != (kept["made_from"], kept["made"]):
            return None
        context.out.share(kept["part"], latents.storage)
        write_receipt(context.out, receipt)
        return receipt
    if context.recipe.online_latents:
        return None
    try:
        left = _left(kept, context, latents)
    except Unreachable:
        raise
    except (UserError, OSError, pa.ArrowException):  # what is damaged is made again
        return None
    return None if left is None else _written(kept, context, left)


def _left(kept: dict[str, Any], context: Context, latents: Artifact) -> pa.Table | None:
    """Latents of a part's rows under their labels of now; None where a row was not there, or had another image."""
    name = kept["part"]
    now = contents(context.input("shard").storage, name)
    before = contents(Artifact(context.job.root, "shard", kept["shards"]).storage, name)
    keys = now["key"].combine_chunks()
    same = before.take(pc.index_in(keys, value_set=before["key"].combine_chunks()))
    if not same["content"].equals(now["content"]):
        return None
    table = pq.read_table(pa.BufferReader(latents.read(name)))
    table = table.take(pc.index_in(keys, value_set=table["key"].combine_chunks()))
    at = table.schema.get_field_index("label")
    return table.set_column(at, table.schema.field(at), now["label"]).combine_chunks()


def _written(kept: dict[str, Any], context: Context, left: pa.Table) -> Receipt:
    from tasks.encoder import written_part  # torch, which the driver needs not

    keys, labels = left["key"].to_pylist(), left["label"].to_numpy()
    tensors = {field.name: to_numpy(left[field.name], field) for field in left.schema if is_tensor(field)}
    return written_part(context.recipe, context.out, kept, keys, labels, tensors, {})
