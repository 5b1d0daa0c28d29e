"""A Parquet set that grows: an image is known by key and content, and only new ones are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import Recipe, UserError
from infra.artifacts import Artifact
from tasks import encode, shard
from tasks.sources import parquet
from tests.helpers.growing import Work, content_of, keys_of, tokenizers
from tests.helpers.odd_sources import jpeg, recipe_of
from tests.helpers.piles import run_stage

Rows = Sequence[tuple[int, int]]
"""Number of the picture and label of each row."""
FILES: dict[str, Rows] = {f"more-{n}.parquet": [(20 * n + row, row % 3) for row in range(20)] for n in range(3)}


def _picture(number: int) -> bytes:
    """Each its own content, and all of one size, so that sizes tell nothing."""
    return jpeg().ljust(700, b"\0") + number.to_bytes(2)


def _pile(folder: Path, files: dict[str, Rows]) -> Path:
    """A folder with these files and no others; those that are as they were are not touched."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    for name, rows in files.items():
        columns = {"image": [_picture(number) for number, _ in rows], "label": [label for _, label in rows]}
        table = pa.table(columns)
        if not (folder / name).exists() or not pq.read_table(folder / name).equals(table):
            pq.write_table(table, folder / name)
    return folder


def _recipe(pile: Path, grows: Artifact | None, *overrides: str) -> Recipe:
    own = ["shard.rows_per_shard=10", "shard.test_share=0.2", "shard.max_bad_share=0.1", "encode.rows_per_group=4"]
    own += [f"shard.grows={grows.fingerprint}"] if grows else []
    return recipe_of("parquet", pile, 3, *own, *overrides)


def _sharded(pile: Path, root: Path, grows: Artifact | None = None, *overrides: str) -> Artifact:
    return run_stage(shard.STAGE, _recipe(pile, grows, *overrides), str(root))


def _encoded(shards: Artifact, pile: Path, grows: Artifact | None = None) -> Artifact:
    recipe = _recipe(pile, grows)
    return run_stage(encode.STAGE, recipe, shards.root, shards, *tokenizers(recipe, shards))


def _counts(artifact: Artifact) -> dict[str, int]:
    names = "kept", "added", "removed", "relabelled", "changed"
    return {name: artifact.manifest.facts["grown"][name] for name in names}


def _moved(old: Artifact, new: Artifact) -> set[str]:
    """Images beside the cut between the splits, which changes with their number."""
    was, now = ({key: split for split in ("train", "test") for key in keys_of(each, split)} for each in (old, new))
    return {key for key in was.keys() & now.keys() if was[key] != now[key]}


def test_a_parquet_set_that_grows_twice(tmp_path: Path, work: Work) -> None:
    root, other, pile = tmp_path / "root", tmp_path / "afresh", tmp_path / "pile"
    first = _sharded(_pile(pile, FILES), root)
    _encoded(first, pile)
    assert tuple(map(len, work.taken())) == (60, 60) and len(work.unpacked) == 3
    work.unpacked.clear()

    grown = dict(FILES)
    other_picture, other_label = list(FILES["more-1.parquet"]), list(FILES["more-2.parquet"])
    other_picture[4], other_label[7] = (99, 1), (47, 2)
    grown |= {"more-1.parquet": other_picture, "more-2.parquet": other_label}
    grown["more-3.parquet"] = [(100 + row, row % 3) for row in range(10)]
    second = _sharded(_pile(pile, grown), root, first)
    moved = _moved(first, second) - {"train/more-1.parquet/0000004"}
    new = {f"train/more-3.parquet/{row:07d}" for row in range(10)} | {"train/more-1.parquet/0000004"}
    assert work.taken()[0] == new | moved and len(moved) <= 3
    assert "more-0.parquet" not in work.unpacked or any("more-0" in key for key in moved)
    counts = _counts(second)
    changed = 1 + len(moved)
    assert counts == {"kept": 60 - changed, "added": 10, "removed": 0, "relabelled": 1, "changed": changed}
    fresh = _sharded(pile, other)
    assert content_of(second) == content_of(fresh)
    for name in ("splits", "classes", "quarantine", "duplicates", "source"):
        assert second.manifest.facts[name] == fresh.manifest.facts[name], name
    work.taken()
    latents = _encoded(second, pile, first)
    assert work.taken()[1] == new | moved
    assert content_of(latents) == content_of(_encoded(fresh, pile))
    work.taken()

    shorter = {name: rows for name, rows in grown.items() if name != "more-0.parquet"}
    third = _sharded(_pile(pile, shorter), root, second)
    assert work.taken()[0] == _moved(second, third)
    counts = _counts(third)
    assert (counts["added"], counts["removed"], counts["relabelled"]) == (0, 20, 0)
    assert counts["kept"] + counts["changed"] == 50
    assert content_of(third) == content_of(_sharded(pile, other))


def test_rows_that_moved_are_other_images(tmp_path: Path, work: Work) -> None:
    """Keys are numbers of rows: who is there now is read, though pictures are of one size."""
    rows = FILES["more-0.parquet"]
    pile = _pile(tmp_path / "pile", {"more-0.parquet": rows})
    first = _sharded(pile, tmp_path / "root")
    work.taken()
    second = _sharded(_pile(pile, {"more-0.parquet": rows[:5] + rows[6:]}), tmp_path / "root", first)
    assert {f"train/more-0.parquet/{row:07d}" for row in range(5, 19)} <= work.taken()[0]
    assert content_of(second) == content_of(_sharded(pile, tmp_path / "other"))


def test_files_are_looked_through_once(tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    pile, scanned, scan = _pile(tmp_path / "pile", FILES), [], parquet.ParquetSource.scan

    def counted(source: parquet.ParquetSource, file: str) -> Iterator[bytes]:
        scanned.append(Path(file).name)
        return scan(source, file)

    monkeypatch.setattr(parquet.ParquetSource, "scan", counted)
    monkeypatch.setattr("tasks.sources.memory._SETTLED_SECONDS", -1.0)
    first = _sharded(pile, tmp_path / "root")
    assert sorted(scanned) == sorted(FILES), "whoever grows from nothing needs no content beforehand"
    scanned.clear()
    pile = _pile(pile, FILES | {"more-3.parquet": [(100 + row, row % 3) for row in range(10)]})
    second = _sharded(pile, tmp_path / "root", first)
    looked = list(scanned)
    scanned.clear()
    _sharded(pile, tmp_path / "root", second, "shard.rows_per_shard=12")
    assert sorted(set(looked)) == sorted([*FILES, "more-3.parquet"])
    assert not scanned, "the same files, and nothing new in them"


def test_what_was_reencoded_cannot_be_known_again(tmp_path: Path, work: Work) -> None:
    pile = _pile(tmp_path / "pile", FILES)
    smaller = "shard.reencode={size: 32, quality: 90}"
    first = _sharded(pile, tmp_path / "root", None, smaller)
    with pytest.raises(UserError, match=r"shard\.grows and shard\.reencode are set, but rows of parquet are known by"):
        _sharded(pile, tmp_path / "root", first, smaller)
