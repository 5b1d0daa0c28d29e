"""Sets that grow: a list of pictures, what `shard` and `encode` make of it, and what is in that."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs import Recipe
from infra.artifacts import Artifact
from infra.storage import FileEntry
from tasks import encode, shard, train_semvae, train_vavae
from tests.helpers.odd_sources import jpeg, recipe_of
from tests.helpers.piles import read_rows, run_stage

LABELS = {f"{n:03d}.png": n % 3 for n in range(60)}


def latent(image: bytes) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(image).digest()[:4], "little")
    return np.random.default_rng(seed).normal(size=(4, 4, 4)).astype(np.float16)


def listed_pile(folder: Path, labels: dict[str, int], changed: str = "", bad: str = "") -> Path:
    """A list of pictures of which each has its own content, and one has another than it had, or is none."""
    folder.mkdir(exist_ok=True)
    for name in labels:
        (folder / name).write_bytes(jpeg(int(name[:3])) + b"\0" * (name == changed))
    if bad:
        (folder / bad).write_bytes(b"words")
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *labels.items()])
    return folder / "list.csv"


def growing_recipe(pile: Path, grows: str | None = None, *overrides: str) -> Recipe:
    own = ["shard.rows_per_shard=10", "shard.test_share=0.2", "shard.max_bad_share=0.1", "encode.rows_per_group=4"]
    return recipe_of("csv", pile, 3, *own, *([f"shard.grows={grows}"] if grows else []), *overrides)


def sharded(pile: Path, root: Path, grows: Artifact | None = None, *overrides: str) -> Artifact:
    name = None if grows is None else grows.fingerprint
    return run_stage(shard.STAGE, growing_recipe(pile, name, *overrides), str(root))


def encoded(shards: Artifact, pile: Path) -> Artifact:
    grows = shards.manifest.recipe["shard"]["grows"]
    recipe = growing_recipe(pile, grows)
    return run_stage(encode.STAGE, recipe, shards.root, shards, *tokenizers(recipe, shards))


def tokenizers(recipe: Recipe, shards: Artifact) -> list[Artifact]:
    """Those that the flow would give to `encode`, trained or not."""
    stages = train_vavae.STAGE, train_semvae.STAGE
    jobs = [stage.job(recipe, shards.root, {"shard": shards.fingerprint}) for stage in stages]
    return [Artifact(shards.root, job.stage, job.fingerprint) for job in jobs]


def keys_of(artifact: Artifact, split: str) -> list[str]:
    return [row["key"] for row in read_rows(artifact, split)]


def content_of(artifact: Artifact) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of each split, as a multiset."""
    return {split: sorted(tuple(row.values()) for row in read_rows(artifact, split)) for split in ("train", "test")}


def part_keys(artifact: Artifact, part: FileEntry) -> list[str]:
    return pq.read_table(pa.BufferReader(artifact.read(part.path)))["key"].to_pylist()


class Work:
    """What was read from the source and what was encoded, by key, since it was last asked."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.encoded: list[str] = []
        self.unpacked: list[str] = []
        """Files of a scanned source."""

    def taken(self) -> tuple[set[str], set[str]]:
        found = set(self.read), set(self.encoded)
        assert (len(self.read), len(self.encoded)) == tuple(map(len, found)), "twice"
        self.read, self.encoded = [], []
        return found
