"""A set that grows: what is read, sharded and encoded again, in what order rows lie, and what old artifacts are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import Recipe, UserError
from flows.run import preflight
from infra import inventory
from infra.artifacts import Artifact
from infra.integrity import faults
from infra.storage import Storage
from tasks import encode, shard, train_vavae
from tasks.data import rows
from tasks.data.receipts import Receipt
from tasks.sources.ordering import key_hashes
from tests.helpers.growing import (
    LABELS,
    Work,
    content_of,
    encoded,
    growing_recipe,
    keys_of,
    listed_pile,
    part_keys,
    sharded,
    tokenizers,
)
from tests.helpers.odd_sources import jpeg
from tests.helpers.piles import SMALL_BATCHES

_BY_RAY = shard._written, encode._kept


def _same_facts(one: Artifact, other: Artifact, *names: str) -> None:
    for name in names:
        assert one.manifest.facts[name] == other.manifest.facts[name], name


@pytest.mark.parametrize("bounds", ["in memory", "on disk"])
def test_a_set_that_grows_twice(bounds: str, tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    if bounds == "on disk":
        for name, value in (("HELD_BYTES", 3_000), ("AT_ONCE", 16)):
            monkeypatch.setattr(rows, name, value)
    root, other = tmp_path / "root", tmp_path / "afresh"
    pile = listed_pile(tmp_path / "pile", LABELS, bad="059.png")
    first = sharded(pile, root)
    latents = encoded(first, pile)
    assert work.taken() == (set(LABELS), set(LABELS) - {"059.png"})
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    train = [key for part in first.files("train/")[:1] for key in part_keys(first, part)]
    gone, renamed, changed = train[0], train[1], part_keys(first, first.files("train/")[2])[0]
    labels = {name: label for name, label in LABELS.items() if name != gone}
    labels |= {renamed: (labels[renamed] + 1) % 3, "100.png": 0, "101.png": 1}
    pile = listed_pile(tmp_path / "pile", labels, changed=changed, bad="059.png")
    second = sharded(pile, root, first)
    grown = second.manifest.facts["grown"]
    read, _ = work.taken()
    moved = {key for split in ("train", "test") for key in set(keys_of(second, split)) - set(keys_of(first, split))} - {
        "100.png",
        "101.png",
    }
    assert read == {"100.png", "101.png", changed, "059.png"} | moved and len(moved) <= 2
    assert {name: grown[name] for name in ("added", "removed", "relabelled")} == {
        "added": 3,  # what was refused is looked at again
        "removed": 1,
        "relabelled": 1,
    }
    assert grown["changed"] == len(moved | {changed}) and grown["kept"] == 59 - 1 - grown["changed"]
    assert sum(grown["parts"].values()) == len(first.files("train/") + first.files("test/"))
    assert 2 <= grown["parts"]["rewritten"] <= 2 + len(moved)
    again = encoded(second, pile)
    assert work.taken()[1] == ({"100.png", "101.png", changed} | moved)
    fresh = sharded(pile, other)
    assert content_of(second) == content_of(fresh)
    _same_facts(second, fresh, "splits", "classes", "quarantine", "duplicates", "source")
    work.taken()
    _same_latents(again, encoded(fresh, pile))
    work.taken()

    labels = {name: label for name, label in labels.items() if name not in ("100.png", "030.png")} | {"102.png": 2}
    pile = listed_pile(tmp_path / "pile", labels, changed=changed, bad="059.png")
    third = sharded(pile, root, second)
    assert third.manifest.facts["grown"]["first"] == first.fingerprint
    assert {"102.png", "059.png"} <= work.taken()[0]
    newest, afresh = encoded(third, pile), sharded(pile, other)
    assert "102.png" in work.taken()[1]
    assert content_of(third) == content_of(afresh)
    _same_latents(newest, encoded(afresh, pile))

    assert {path: path.read_bytes() for path in before} == before, "what there was is what it was"
    found = inventory.read(str(root))
    assert not any(map(len, faults(found.values()).values()))
    later = max(entry.written for entry in found.values()) + 2 * inventory.RECENT_SECONDS
    chosen = inventory.choose(found, keep_last=1, now=later)
    assert {entry.name for entry in chosen.gone} == {f"encode/{each.fingerprint}" for each in (latents, again)}


def _same_latents(one: Artifact, other: Artifact) -> None:
    assert content_of(one) == content_of(other)
    for name, channels in one.manifest.facts["statistics"].items():
        for moment, values in channels.items():
            assert np.allclose(values, other.manifest.facts["statistics"][name][moment], rtol=1e-12, atol=0), name
    _same_facts(one, other, "shapes", "classes", "splits")


def test_the_order_of_a_grown_set(tmp_path: Path, work: Work) -> None:
    """What was there stays in its order and its part; what is new follows by key hash, in parts of its own."""
    pile = listed_pile(tmp_path / "pile", LABELS)
    first, again = sharded(pile, tmp_path / "root"), sharded(pile, tmp_path / "other")
    labels = {name: label for name, label in LABELS.items() if int(name[:3]) % 7}
    labels |= {f"{n}.png": 0 for n in range(100, 125)}
    second = sharded(listed_pile(tmp_path / "pile", labels), tmp_path / "root", first)
    for split in ("train", "test"):
        old, now = keys_of(first, split), keys_of(second, split)
        kept = [key for key in old if key in set(now)]
        new = sorted(set(now) - set(old), key=lambda key: int(key_hashes([key], 0)[0]))
        assert now == kept + new and len(new) > 1 and len(kept) > 5
        old_parts = {part.path: part for part in first.files(f"{split}/")}
        for part in second.files(f"{split}/"):
            assert len(part_keys(second, part)) <= 10
            if part.path in old_parts:
                assert set(part_keys(second, part)) <= set(part_keys(first, old_parts[part.path]))
            else:
                assert set(part_keys(second, part)) <= set(new)
    assert sharded(pile, tmp_path / "other", again).manifest.files == second.manifest.files


def test_parts_that_stay_are_the_old_files(tmp_path: Path, work: Work) -> None:
    """No bytes are written for them, and deleting one set leaves the other whole."""
    pile = listed_pile(tmp_path / "pile", LABELS)
    first = sharded(pile, tmp_path / "root")
    second = sharded(pile, tmp_path / "root", first, "shard.rows_per_shard=4")
    parts = first.files("train/") + first.files("test/")
    assert [entry for entry in second.manifest.files if "/" in entry.path] == parts
    for entry in parts:
        assert Path(first.storage.locate(entry.path)).samefile(second.storage.locate(entry.path))
    assert work.taken()[0] == set(LABELS)
    first.discard()
    assert [second.read(entry.path) for entry in parts]


@pytest.mark.parametrize("place", ["folder", "no links", "bucket"])
def test_a_shared_file_is_of_both(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue("s3_root") if place == "bucket" else str(tmp_path)
    if place == "no links":
        monkeypatch.setattr("os.link", lambda *paths: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    one, other = Storage.at(root).child("one"), Storage.at(root).child("other")
    entry = one.write_bytes("train/part", b"first")
    for _ in range(2):  # the second time over what is there
        other.share(entry.path, one)
        assert other.read_bytes(entry.path) == b"first"
    one.write_bytes(entry.path, b"second")
    assert other.read_bytes(entry.path) == b"first"
    one.delete()
    assert other.names() == [entry.path]
    with pytest.raises((UserError, FileNotFoundError)):
        other.share("gone", one)
    guarded = Storage(other.url, guard=lambda: (_ for _ in ()).throw(UserError("taken over")))
    other.write_bytes("here", b"")
    with pytest.raises(UserError, match="taken over"):
        guarded.share("here", other)


def test_a_new_class_relabels_without_reading(tmp_path: Path, work: Work) -> None:
    """Names sort to labels: one that comes first moves all others."""
    names = {f"{n:03d}.png": "bc"[n % 2] for n in range(20)}
    recipe = ["data.allow_empty_classes=true"]
    first = sharded(listed_pile(tmp_path / "pile", names), tmp_path / "root", None, *recipe)  # type: ignore[arg-type]
    work.taken()
    pile = listed_pile(tmp_path / "pile", names | {"100.png": "a", "101.png": "a"})  # type: ignore[arg-type]
    second = sharded(pile, tmp_path / "root", first, *recipe)
    assert len(work.taken()[0]) <= 3
    assert second.manifest.facts["classes"] == ["a", "b", "c"]
    assert content_of(second) == content_of(sharded(pile, tmp_path / "other", None, *recipe))


def test_tokenizers_stay_with_the_images_that_they_were_trained_on(tmp_path: Path, work: Work) -> None:
    pile = listed_pile(tmp_path / "pile", LABELS)
    sets = [sharded(pile, tmp_path / "root")]
    sets.append(sharded(pile, tmp_path / "root", sets[0]))
    sets.append(sharded(pile, tmp_path / "root", sets[1]))
    assert len({each.fingerprint for each in sets}) == 3
    recipes = [growing_recipe(pile, grows and grows.fingerprint) for grows in (None, *sets[:2])]
    found = [tokenizers(recipe, shards) for recipe, shards in zip(recipes, sets, strict=True)]
    assert found[0] == found[1] == found[2]
    job = train_vavae.STAGE.job(recipes[2], str(tmp_path / "root"), {"shard": sets[2].fingerprint})
    assert job.inputs == {"shard": sets[0].fingerprint}


@pytest.mark.parametrize("fault", ["receipt", "lost", "damaged", "other image"])
def test_latents_that_cannot_be_taken_over_are_made_again(fault: str, tmp_path: Path, work: Work) -> None:
    """Of that part alone, whether it is as it was or has another label."""
    pile, root = listed_pile(tmp_path / "pile", LABELS), tmp_path / "root"
    first = sharded(pile, root)
    latents, part = encoded(first, pile), first.files("train/")[0]
    keys = part_keys(first, part)
    relabelled = {keys[0]: (LABELS[keys[0]] + 1) % 3} if fault in ("damaged", "other image") else {}
    second = sharded(listed_pile(tmp_path / "pile", LABELS | relabelled), root, first)
    match fault:
        case "receipt":
            latents.storage.write_bytes(f"receipts/{part.path}.json", b"{}")
        case "lost":
            latents.storage.delete(part.path)
        case "damaged":
            data = latents.read(part.path)
            latents.storage.write_bytes(part.path, data[:400] + bytes(8) + data[408:])
        case "other image":
            table = pq.read_table(pa.BufferReader(first.read(part.path)))
            contents = pa.array([bytes(8)] * table.num_rows, table.schema.field("content").type)
            first.storage.write_table(part.path, table.set_column(3, table.schema.field("content"), contents), 10)
    work.taken()
    again = encoded(second, pile)
    assert work.taken()[1] == set(keys)
    assert sorted(part_keys(again, again.files("train/")[0])) == sorted(keys)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", r"shard\.grows names 0123456789abcdef, but .*/shard/0123456789abcdef is not complete"),
        ("lost", r"shard\.grows: .*part-00001\.parquet is missing, expected [\d,]+ bytes: make that set anew"),
        ("torn", r"shard\.grows: .*/train/part-00001\.parquet cannot be read \(.*\): make that set anew"),
        ("plan", r"the plan of .*, which has the sizes of its images, is gone or another's: make that set anew"),
        ("torn plan", r"the plan of .*, which has the sizes of its images, cannot be read .*: make that set anew"),
        ("other plan", r"the plan of .*, which has the sizes of its images, is gone or another's"),
        ("seed", r"shard\.seed is 1, but the set that shard\.grows names was made with 0"),
    ],
)
def test_what_cannot_grow_is_told_before_anything_is_read(fault: str, said: str, tmp_path: Path, work: Work) -> None:
    pile = listed_pile(tmp_path / "pile", LABELS)
    first = sharded(pile, tmp_path / "root")
    part = first.files("train/")[1]
    match fault:
        case "none":
            first = Artifact(first.root, "shard", "0123456789abcdef")
        case "lost":
            first.storage.delete(part.path)
        case "torn":
            first.storage.write_bytes(part.path, bytes(part.bytes))
        case "plan":
            first.storage.delete("plan.parquet")
        case "torn plan":
            first.storage.write_bytes("plan.parquet", b"PAR1")
        case "other plan":
            first.storage.write_bytes("plan.parquet", _other_plan(tmp_path))
    work.read.clear()
    with pytest.raises(UserError, match=said):
        sharded(pile, tmp_path / "root", first, *(["shard.seed=1"] if fault == "seed" else []))
    assert work.taken() == (set(), set())


def test_a_damaged_part_is_not_carried_on(tmp_path: Path, work: Work) -> None:
    """A part of which rows go is held to its hash before what is left of it is written."""
    pile = listed_pile(tmp_path / "pile", LABELS)
    first = sharded(pile, tmp_path / "root")
    part = first.files("train/")[1]
    gone, data = part_keys(first, part)[0], bytearray(first.read(part.path))
    data[data.index(jpeg(int(part_keys(first, part)[1][:3]))) + 200] ^= 1
    first.storage.write_bytes(part.path, bytes(data))
    pile = listed_pile(tmp_path / "pile", {name: label for name, label in LABELS.items() if name != gone})
    with pytest.raises(
        UserError, match=r"train/part-00001\.parquet is not the file .*expected SHA-256.*: make that set"
    ):
        sharded(pile, tmp_path / "root", first)


def _other_plan(folder: Path) -> bytes:
    pile = listed_pile(folder / "more", {f"{n:03d}.png": n % 3 for n in range(30, 90)})
    return sharded(pile, folder / "elsewhere").storage.read_bytes("plan.parquet")


def test_a_killed_run_goes_on(tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are there, kept or new, have receipts like any other's."""
    pile, root = listed_pile(tmp_path / "pile", LABELS), tmp_path / "root"
    first = sharded(pile, root)
    train = part_keys(first, first.files("train/")[0])
    labels = {name: label for name, label in LABELS.items() if name != train[0]} | {"100.png": 0, "101.png": 1}
    pile, written = listed_pile(tmp_path / "pile", labels), shard._written
    work.taken()

    def killed(out: Storage, recipe: Recipe, jobs: list[dict[str, Any]]) -> Iterator[Receipt]:
        yield from written(out, recipe, [job for job in jobs if job["part"].startswith("train/")])
        raise KeyboardInterrupt

    monkeypatch.setattr(shard, "_written", killed)
    with pytest.raises(KeyboardInterrupt):
        sharded(pile, root, first)
    seen = work.taken()[0]
    again: list[str] = []

    def rest(out: Storage, recipe: Recipe, jobs: list[dict[str, Any]]) -> Iterator[Receipt]:
        again.extend(job["part"] for job in jobs)
        return written(out, recipe, jobs)

    monkeypatch.setattr(shard, "_written", rest)
    second = sharded(pile, root, first)
    assert seen and not seen & work.taken()[0]
    assert again and all(part.startswith("test/") for part in again)
    assert content_of(second) == content_of(sharded(pile, tmp_path / "other"))


def test_a_set_that_is_not_there_is_told_before_a_run(tmp_path: Path, home: Path) -> None:
    pile = listed_pile(tmp_path / "pile", LABELS)
    source = f"data.source={{kind: csv, path: '{pile}'}}"
    overrides = [source, "data.classes=3", "sample.labels=random", *SMALL_BATCHES, "shard.grows=0123456789abcdef"]
    with pytest.raises(UserError, match=r"shard\.grows names 0123456789abcdef, but .* is not complete"):
        preflight((shard.STAGE, train_vavae.STAGE), "demo_tiny", overrides, str(tmp_path / "root"))
    with pytest.raises(UserError, match=r"shard\.grows"):
        growing_recipe(pile, "shard/0123")


@pytest.mark.slow
def test_workers_take_over_what_is_there(
    tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    """As Ray's tasks; only the networks are this process's."""
    monkeypatch.setattr(shard, "_written", _BY_RAY[0])
    monkeypatch.setattr(encode, "_kept", _BY_RAY[1])
    pile, root = listed_pile(tmp_path / "pile", LABELS), tmp_path / "root"
    first = sharded(pile, root)
    encoded(first, pile)
    work.taken()
    gone = part_keys(first, first.files("train/")[0])[0]
    pile = listed_pile(
        tmp_path / "pile", {name: label for name, label in LABELS.items() if name != gone} | {"100.png": 0}
    )
    second = sharded(pile, root, first)
    latents = encoded(second, pile)
    looked_at = work.taken()[1]
    assert "100.png" in looked_at and len(looked_at) <= 3
    fresh = sharded(pile, tmp_path / "other")
    assert content_of(second) == content_of(fresh)
    _same_latents(latents, encoded(fresh, pile))
