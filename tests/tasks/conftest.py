"""Stages that this process performs in place of Ray, for tests of sets that grow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import Recipe
from configs.data import Data
from infra.artifacts import Artifact
from infra.storage import FileEntry, Storage
from tasks import encode, shard
from tasks.data import kept_latents
from tasks.data.receipts import Receipt
from tasks.encoder import written_part
from tasks.sources import open_source, unpack
from tasks.stage import Context
from tests.helpers.growing import Work, latent


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, home: Path) -> Work:
    """Parts are made by this process instead of Ray's; latents say of which image they are."""
    done, read = Work(), shard._read

    def counted(source: Any, key: str, *rest: Any) -> Any:
        done.read.append(key)
        return read(source, key, *rest)

    def parts(out: Storage, recipe: Recipe, jobs: list[dict[str, Any]]) -> Iterator[Receipt]:
        return (shard.write_part(job, out, recipe.data, recipe.shard) for job in jobs)

    def kept(context: Context, jobs: list[dict[str, Any]]) -> Iterator[Receipt]:
        return filter(None, (kept_latents.part(job, context) for job in jobs))

    def latents(context: Context, shards: Artifact, entries: list[FileEntry]) -> Iterator[Receipt]:
        for entry in entries:
            table = pq.read_table(pa.BufferReader(shards.read(entry.path)))
            keys = table["key"].to_pylist()
            done.encoded += keys
            z = np.stack([latent(image) for image in table["image"].to_pylist()])
            job = {"part": entry.path, "made_from": entry.sha256}
            labels = table["label"].to_numpy()
            yield written_part(context.recipe, context.out, job, keys, labels, {"z": z, "s": z + 1}, {"encode": 1.0})

    def blobs(out: Storage, data: Data, jobs: list[dict[str, Any]]) -> Iterator[Receipt]:
        done.unpacked += [Path(job["file"]).name for job in jobs]
        return (unpack.write_blob(job, out, open_source(data)) for job in jobs)  # type: ignore[arg-type]

    monkeypatch.setattr(unpack, "_written", blobs)
    monkeypatch.setattr(shard, "_read", counted)
    monkeypatch.setattr(shard, "_written", parts)
    monkeypatch.setattr(encode, "_kept", kept)
    monkeypatch.setattr(encode, "_encoded", latents)
    return done
