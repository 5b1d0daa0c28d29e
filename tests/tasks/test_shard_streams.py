"""A whole shard artifact is the same files whether its rows fit into memory or lie on disk."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs import Recipe
from infra.artifacts import Artifact
from infra.storage import Storage
from tasks import shard
from tasks.data import rows
from tasks.data.receipts import Receipt
from tasks.shard import STAGE
from tasks.sources import open_source, unpack
from tests.helpers.odd_sources import hub, jpeg, recipe_of, webdataset
from tests.helpers.piles import read_rows, run_stage


@pytest.fixture(autouse=True)
def written_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """By this process instead of Ray's."""

    def parts(out: Storage, recipe: Recipe, jobs: list[dict[str, Any]]) -> Iterator[Receipt]:
        return (shard.write_part(job, out, recipe.data, recipe.shard) for job in reversed(jobs))

    def blobs(out: Storage, data: Any, jobs: list[dict[str, Any]]) -> Iterator[Receipt]:
        return (unpack.write_blob(job, out, open_source(data)) for job in jobs)  # type: ignore[arg-type]

    monkeypatch.setattr(shard, "_written", parts)
    monkeypatch.setattr(unpack, "_written", blobs)


def _pile(folder: Path, kind: str) -> Recipe:
    """240 images: some broken, empty, without label, or the same bytes in other classes and splits."""
    rng = random.Random(0)
    images = [rng.choice([jpeg(n % 250), jpeg(n % 250), b"", jpeg(1)[:-40], b"words"]) for n in range(240)]
    if kind == "parquet":
        for file, split in enumerate(("train", "train", "test")):
            some = [{"bytes": data, "path": ""} for data in images[file::3]]
            hub(folder / f"{split}-{file}.parquet", [rng.randrange(-1, 3) for _ in some], image=some)
    else:
        for file in range(3):
            some = [{"jpg": data, "cls": str(rng.randrange(-1, 3)).encode()} for data in images[file::3]]
            webdataset(folder / f"{file}.tar", some)
    return recipe_of(kind, folder, 3, "shard.max_bad_share=0.9", "shard.rows_per_shard=17", "shard.test_share=0.2")


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_an_artifact_does_not_show_where_its_rows_lay(
    kind: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _pile(tmp_path / "pile", kind)
    in_memory = run_stage(STAGE, recipe, str(tmp_path / "one"))
    for name, value in (("HELD_BYTES", 3_000), ("AT_ONCE", 32), ("_MOST_PIECES", 2)):
        monkeypatch.setattr(rows, name, value)
    on_disk = run_stage(STAGE, recipe, str(tmp_path / "two"))
    assert on_disk.fingerprint == in_memory.fingerprint
    assert on_disk.manifest.files == in_memory.manifest.files
    assert on_disk.manifest.facts == in_memory.manifest.facts
    facts = in_memory.manifest.facts
    assert facts["duplicates"]["across_splits"] and facts["duplicates"]["across_classes"]
    assert "no label" in facts["quarantine"] and len(facts["quarantine"]) > 1


def test_a_long_plan_is_several_files(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = _pile(tmp_path / "pile", "webdataset")
    one = run_stage(STAGE, recipe, str(tmp_path / "one"))
    monkeypatch.setattr(shard, "PARTS_PER_PLAN", 4)
    several = run_stage(STAGE, recipe, str(tmp_path / "two"))
    assert several.manifest.files == one.manifest.files
    assert len([name for name in several.storage.names() if name.startswith("plan")]) == -(-_parts(one) // 4)


def _parts(artifact: Artifact) -> int:
    return len([entry for entry in artifact.manifest.files if "/" in entry.path])


def test_a_row_of_parquet_without_an_image_is_not_its_neighbours(tmp_path: Path, home: Path) -> None:
    """In the blob of its file nothing lies between it and the next row's image."""
    images = [{"bytes": jpeg(n) if n % 3 else b"", "path": ""} for n in range(12)]
    hub(tmp_path / "pile" / "train.parquet", [n % 3 for n in range(12)], image=images)
    recipe = recipe_of("parquet", tmp_path / "pile", 3, "shard.max_bad_share=0.5", "data.allow_empty_classes=true")
    artifact = run_stage(STAGE, recipe, str(tmp_path / "root"))
    assert artifact.manifest.facts["quarantine"] == {"empty file": 4}
    kept = read_rows(artifact, "train") + read_rows(artifact, "test")
    assert {row["key"]: row["image"] for row in kept} == {
        f"train/train.parquet/{n:07d}": jpeg(n) for n in range(12) if n % 3
    }
