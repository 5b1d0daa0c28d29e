"""A set that grows: what is read, sharded and encoded again, in what order rows lie, and what old artifacts are."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import Recipe, UserError
from infra import inventory
from infra.artifacts import Artifact
from infra.integrity import faults
from infra.storage import FileEntry, Storage
from tasks import encode, shard, train_semvae, train_vavae
from tasks.data import kept_latents, rows
from tasks.data.receipts import Receipt
from tasks.encoder import written_part
from tasks.sources.ordering import key_hashes
from tasks.stage import Context
from tests.helpers.odd_sources import hub, jpeg, recipe_of
from tests.helpers.piles import read_rows, run_stage

_LABELS = {f"{n:03d}.png": n % 3 for n in range(60)}


class Work:
    """What was read from the source and what was encoded, by key, since it was last asked."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.encoded: list[str] = []

    def taken(self) -> tuple[set[str], set[str]]:
        found = set(self.read), set(self.encoded)
        assert (len(self.read), len(self.encoded)) == tuple(map(len, found)), "twice"
        self.read, self.encoded = [], []
        return found


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, home: Path) -> Work:
    """Stages whose parts this process makes instead of Ray's; latents say which image they were made of."""
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
            z = np.stack([_latent(image) for image in table["image"].to_pylist()])
            job = {"part": entry.path, "made_from": entry.sha256}
            labels = table["label"].to_numpy()
            yield written_part(context.recipe, context.out, job, keys, labels, {"z": z, "s": z + 1}, {"encode": 1.0})

    monkeypatch.setattr(shard, "_read", counted)
    monkeypatch.setattr(shard, "_written", parts)
    monkeypatch.setattr(encode, "_kept", kept)
    monkeypatch.setattr(encode, "_encoded", latents)
    return done


def _latent(image: bytes) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(image).digest()[:4], "little")
    return np.random.default_rng(seed).normal(size=(4, 4, 4)).astype(np.float16)


def _pile(folder: Path, labels: dict[str, int], changed: str = "", bad: str = "") -> Path:
    """A list of pictures of which each has its own content, and one has another than it had, or is none."""
    folder.mkdir(exist_ok=True)
    for name in labels:
        (folder / name).write_bytes(jpeg(int(name[:3])) + b"\0" * (name == changed))
    if bad:
        (folder / bad).write_bytes(b"words")
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *labels.items()])
    return folder / "list.csv"


def _recipe(pile: Path, grows: str | None = None, *overrides: str) -> Recipe:
    own = ["shard.rows_per_shard=10", "shard.test_share=0.2", "shard.max_bad_share=0.1", "encode.rows_per_group=4"]
    return recipe_of("csv", pile, 3, *own, *([f"shard.grows={grows}"] if grows else []), *overrides)


def _shard(pile: Path, root: Path, grows: Artifact | None = None, *overrides: str) -> Artifact:
    name = None if grows is None else grows.fingerprint
    return run_stage(shard.STAGE, _recipe(pile, name, *overrides), str(root))


def _encode(shards: Artifact, pile: Path) -> Artifact:
    grows = shards.manifest.recipe["shard"]["grows"]
    recipe = _recipe(pile, grows)
    return run_stage(encode.STAGE, recipe, shards.root, shards, *_tokenizers(recipe, shards))


def _tokenizers(recipe: Recipe, shards: Artifact) -> list[Artifact]:
    """Those that the flow would give to `encode`, trained or not."""
    stages = train_vavae.STAGE, train_semvae.STAGE
    jobs = [stage.job(recipe, shards.root, {"shard": shards.fingerprint}) for stage in stages]
    return [Artifact(shards.root, job.stage, job.fingerprint) for job in jobs]


def _keys(artifact: Artifact, split: str) -> list[str]:
    return [row["key"] for row in read_rows(artifact, split)]


def _content(artifact: Artifact) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of each split, as a multiset."""
    return {split: sorted(tuple(row.values()) for row in read_rows(artifact, split)) for split in ("train", "test")}


def _same_facts(one: Artifact, other: Artifact, *names: str) -> None:
    for name in names:
        assert one.manifest.facts[name] == other.manifest.facts[name], name


@pytest.mark.parametrize("bounds", ["in memory", "on disk"])
def test_a_set_that_grows_twice(bounds: str, tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    if bounds == "on disk":
        for name, value in (("HELD_BYTES", 3_000), ("AT_ONCE", 16)):
            monkeypatch.setattr(rows, name, value)
    root, other = tmp_path / "root", tmp_path / "afresh"
    pile = _pile(tmp_path / "pile", _LABELS, bad="059.png")
    first = _shard(pile, root)
    latents = _encode(first, pile)
    assert work.taken() == (set(_LABELS), set(_LABELS) - {"059.png"})
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    train = [key for part in first.files("train/")[:1] for key in _part_keys(first, part)]
    gone, renamed, changed = train[0], train[1], _part_keys(first, first.files("train/")[2])[0]
    labels = {name: label for name, label in _LABELS.items() if name != gone}
    labels |= {renamed: (labels[renamed] + 1) % 3, "100.png": 0, "101.png": 1}
    pile = _pile(tmp_path / "pile", labels, changed=changed, bad="059.png")
    second = _shard(pile, root, first)
    grown = second.manifest.facts["grown"]
    read, _ = work.taken()
    moved = {key for split in ("train", "test") for key in set(_keys(second, split)) - set(_keys(first, split))} - {
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
    again = _encode(second, pile)
    assert work.taken()[1] == ({"100.png", "101.png", changed} | moved)
    fresh = _shard(pile, other)
    assert _content(second) == _content(fresh)
    _same_facts(second, fresh, "splits", "classes", "quarantine", "duplicates", "source")
    work.taken()
    _same_latents(again, _encode(fresh, pile))
    work.taken()

    labels = {name: label for name, label in labels.items() if name not in ("100.png", "030.png")} | {"102.png": 2}
    pile = _pile(tmp_path / "pile", labels, changed=changed, bad="059.png")
    third = _shard(pile, root, second)
    assert third.manifest.facts["grown"]["first"] == first.fingerprint
    assert {"102.png", "059.png"} <= work.taken()[0]
    newest, afresh = _encode(third, pile), _shard(pile, other)
    assert "102.png" in work.taken()[1]
    assert _content(third) == _content(afresh)
    _same_latents(newest, _encode(afresh, pile))

    assert {path: path.read_bytes() for path in before} == before, "what there was is what it was"
    found = inventory.read(str(root))
    assert not any(map(len, faults(found.values()).values()))
    later = max(entry.written for entry in found.values()) + 2 * inventory.RECENT_SECONDS
    chosen = inventory.choose(found, keep_last=1, now=later)
    assert {entry.name for entry in chosen.gone} == {f"encode/{each.fingerprint}" for each in (latents, again)}


def _part_keys(artifact: Artifact, part: FileEntry) -> list[str]:
    return pq.read_table(pa.BufferReader(artifact.read(part.path)))["key"].to_pylist()


def _same_latents(one: Artifact, other: Artifact) -> None:
    assert _content(one) == _content(other)
    for name, channels in one.manifest.facts["statistics"].items():
        for moment, values in channels.items():
            assert np.allclose(values, other.manifest.facts["statistics"][name][moment], rtol=1e-12, atol=0), name
    _same_facts(one, other, "shapes", "classes", "splits")


def test_the_order_of_a_grown_set(tmp_path: Path, work: Work) -> None:
    """What was there stays in its order and its part; what is new follows by key hash, in parts of its own."""
    pile = _pile(tmp_path / "pile", _LABELS)
    first, again = _shard(pile, tmp_path / "root"), _shard(pile, tmp_path / "other")
    labels = {name: label for name, label in _LABELS.items() if int(name[:3]) % 7}
    labels |= {f"{n}.png": 0 for n in range(100, 125)}
    second = _shard(_pile(tmp_path / "pile", labels), tmp_path / "root", first)
    for split in ("train", "test"):
        old, now = _keys(first, split), _keys(second, split)
        kept = [key for key in old if key in set(now)]
        new = sorted(set(now) - set(old), key=lambda key: int(key_hashes([key], 0)[0]))
        assert now == kept + new and len(new) > 1 and len(kept) > 5
        old_parts = {part.path: part for part in first.files(f"{split}/")}
        for part in second.files(f"{split}/"):
            assert len(_part_keys(second, part)) <= 10
            if part.path in old_parts:
                assert set(_part_keys(second, part)) <= set(_part_keys(first, old_parts[part.path]))
            else:
                assert set(_part_keys(second, part)) <= set(new)
    assert _shard(pile, tmp_path / "other", again).manifest.files == second.manifest.files


def test_parts_that_stay_are_the_old_files(tmp_path: Path, work: Work) -> None:
    """No bytes are written for them, and deleting one set leaves the other whole."""
    pile = _pile(tmp_path / "pile", _LABELS)
    first = _shard(pile, tmp_path / "root")
    second = _shard(pile, tmp_path / "root", first, "shard.rows_per_shard=4")
    parts = first.files("train/") + first.files("test/")
    assert [entry for entry in second.manifest.files if "/" in entry.path] == parts
    for entry in parts:
        assert Path(first.storage.locate(entry.path)).samefile(second.storage.locate(entry.path))
    assert work.taken()[0] == set(_LABELS)
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
    first = _shard(_pile(tmp_path / "pile", names), tmp_path / "root", None, *recipe)  # type: ignore[arg-type]
    work.taken()
    pile = _pile(tmp_path / "pile", names | {"100.png": "a", "101.png": "a"})  # type: ignore[arg-type]
    second = _shard(pile, tmp_path / "root", first, *recipe)
    assert len(work.taken()[0]) <= 3
    assert second.manifest.facts["classes"] == ["a", "b", "c"]
    assert _content(second) == _content(_shard(pile, tmp_path / "other", None, *recipe))


def test_tokenizers_stay_with_the_images_that_they_were_trained_on(tmp_path: Path, work: Work) -> None:
    pile = _pile(tmp_path / "pile", _LABELS)
    sets = [_shard(pile, tmp_path / "root")]
    sets.append(_shard(pile, tmp_path / "root", sets[0]))
    sets.append(_shard(pile, tmp_path / "root", sets[1]))
    assert len({each.fingerprint for each in sets}) == 3
    recipes = [_recipe(pile, grows and grows.fingerprint) for grows in (None, *sets[:2])]
    found = [_tokenizers(recipe, shards) for recipe, shards in zip(recipes, sets, strict=True)]
    assert found[0] == found[1] == found[2]
    job = train_vavae.STAGE.job(recipes[2], str(tmp_path / "root"), {"shard": sets[2].fingerprint})
    assert job.inputs == {"shard": sets[0].fingerprint}


def test_latents_of_other_content_are_not_taken(tmp_path: Path, work: Work) -> None:
    """Neither where a receipt is another part's, nor where a key has another image."""
    pile = _pile(tmp_path / "pile", _LABELS)
    first = _shard(pile, tmp_path / "root")
    latents = _encode(first, pile)
    second = _shard(pile, tmp_path / "root", first)
    part = first.files("train/")[0]
    latents.storage.write_bytes(f"receipts/{part.path}.json", b"{}")
    work.taken()
    _encode(second, pile)
    assert work.taken()[1] == set(_part_keys(first, part))


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
    pile = _pile(tmp_path / "pile", _LABELS)
    first = _shard(pile, tmp_path / "root")
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
        _shard(pile, tmp_path / "root", first, *(["shard.seed=1"] if fault == "seed" else []))
    assert work.taken() == (set(), set())


def test_a_damaged_part_is_not_carried_on(tmp_path: Path, work: Work) -> None:
    """A part of which rows go is held to its hash before what is left of it is written."""
    pile = _pile(tmp_path / "pile", _LABELS)
    first = _shard(pile, tmp_path / "root")
    part = first.files("train/")[1]
    gone, data = _part_keys(first, part)[0], bytearray(first.read(part.path))
    data[data.index(jpeg(int(_part_keys(first, part)[1][:3]))) + 200] ^= 1
    first.storage.write_bytes(part.path, bytes(data))
    pile = _pile(tmp_path / "pile", {name: label for name, label in _LABELS.items() if name != gone})
    with pytest.raises(
        UserError, match=r"train/part-00001\.parquet is not the file .*expected SHA-256.*: make that set"
    ):
        _shard(pile, tmp_path / "root", first)


def _other_plan(folder: Path) -> bytes:
    pile = _pile(folder / "more", {f"{n:03d}.png": n % 3 for n in range(30, 90)})
    return _shard(pile, folder / "elsewhere").storage.read_bytes("plan.parquet")


def test_a_source_without_sizes_does_not_grow(tmp_path: Path, work: Work) -> None:
    hub(tmp_path / "pile" / "train.parquet", [n % 3 for n in range(12)])
    recipe = recipe_of("parquet", tmp_path / "pile", 3, "shard.grows=0123456789abcdef")
    with pytest.raises(UserError, match=r"shard\.grows is set, but a source of kind parquet does not tell the size"):
        run_stage(shard.STAGE, recipe, str(tmp_path / "root"))
