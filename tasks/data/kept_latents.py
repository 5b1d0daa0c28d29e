"""Latents of a grown set that were made before it grew: whole parts, and what is left of parts that lost rows.

A row is the same where its key and its image's content are; latents know nothing of labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
    made = {entry.path: entry.sha256 for entry in latents.manifest.files}
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
    if not kept["whole"]:
        return None if context.recipe.online_latents else _rows(kept, context, latents)
    receipt = read_receipt(latents.storage, kept["part"])  # the statistics' sums are in it alone
    if receipt is None or (receipt.made_from, receipt.entry.sha256) != (kept["made_from"], kept["made"]):
        return None
    context.out.share(kept["part"], latents.storage)
    write_receipt(context.out, receipt)
    return receipt


def _rows(kept: dict[str, Any], context: Context, latents: Artifact) -> Receipt | None:
    from tasks.encoder import written_part  # torch, which the driver needs not

    name, root = kept["part"], context.job.root
    now = contents(context.input("shard").storage, name)
    before = contents(Artifact(root, "shard", kept["shards"]).storage, name)
    keys = now["key"].combine_chunks()
    same = before.take(pc.index_in(keys, value_set=before["key"].combine_chunks()))
    if not same["content"].equals(now["content"]):  # a key that was not there has none
        return None
    table = pq.read_table(pa.BufferReader(latents.read(name)))
    table = table.take(pc.index_in(keys, value_set=table["key"].combine_chunks())).combine_chunks()
    tensors = {field.name: to_numpy(table[field.name], field) for field in table.schema if is_tensor(field)}
    return written_part(context.recipe, context.out, kept, keys.to_pylist(), now["label"].to_numpy(), tensors, {})
