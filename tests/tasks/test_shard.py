from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs import Recipe, UserError
from configs.data import Shard
from flows import run
from infra import tracking
from infra.artifacts import MANIFEST
from infra.storage import FileEntry, Storage
from tasks import shard
from tasks.data.receipts import Receipt
from tasks.shard import STAGE, write_plan
from tasks.sources import Listing, folder, one_look, open_source
from tasks.sources.base import listed_rows
from tasks.sources.csv_file import UNKNOWN_LENGTH, CsvSource
from tasks.sources.ordering import ordered
from tasks.sources.walk import walk
from tasks.stage import Job, perform
from tests.helpers.piles import SMALL_BATCHES, encoded, folder_of_classes, folder_recipe, picture, read_rows, run_stage

pytestmark = pytest.mark.usefixtures("local_ray")


def _odd_pile(root: Path) -> Path:
    """Three classes with spaces and non-ASCII names, one empty; good, odd and bad files."""
    folder_of_classes(root, {"größe 1": 20, "b": 20})
    (root / "no images").mkdir()
    odd = root / "b"
    exif = Image.Exif()
    exif[0x0112] = 6
    (odd / "turned.jpg").write_bytes(encoded(picture(50), "JPEG", exif=exif.tobytes()))
    (odd / "cmyk.jpg").write_bytes(encoded(picture(51).convert("CMYK"), "JPEG"))
    (odd / "deep.png").write_bytes(encoded(Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32))))
    (odd / "palette.png").write_bytes(encoded(picture(52).quantize(16)))
    (odd / "glass.png").write_bytes(encoded(picture(53).convert("RGBA")))
    (odd / "truncated.jpg").write_bytes(encoded(picture(54), "JPEG")[:-300])
    (odd / "empty.png").write_bytes(b"")
    (odd / "notes.txt").write_text("not an image at all")
    (odd / "huge.png").write_bytes(encoded(Image.new("1", (4000, 3000))))
    return root


def test_an_odd_pile_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, bytes] = {}
    monkeypatch.setattr(tracking.Tracker, "file", lambda _, name, data: kept.update({name: data}))
    pile = _odd_pile(tmp_path / "my pile")
    recipe = folder_recipe(
        pile,
        "data.allow_empty_classes=true",
        "shard.max_bad_share=0.2",
        "shard.max_pixels=1000000",
        "shard.rows_per_shard=10",
        "shard.limit=null",
    )
    artifact = run_stage(STAGE, recipe, str(tmp_path / "root"))
    facts = artifact.manifest.facts
    assert facts["classes"] == ["b", "größe 1", "no images"]
    assert facts["source"]["left_out"] == {"no picture (.txt)": 1}
    assert facts["source"]["counts"] == {"all": [28, 20, 0]} and facts["source"]["splits"] == {"all": 48}
    assert len(facts["source"]["lines"]) == 5 and kept["source.txt"].decode().splitlines() == facts["source"]["lines"]
    reasons = {"empty file": 1, "too many pixels": 1, "truncated image": 1}
    assert facts["quarantine"] == reasons
    assert sum(facts["splits"].values()) == 45 and 1 <= facts["splits"]["test"] <= 5
    quarantine = pq.read_table(pa.BufferReader(artifact.read("quarantine.parquet"))).to_pylist()
    assert [row["key"] for row in quarantine] == ["b/empty.png", "b/huge.png", "b/truncated.jpg"]
    rows = read_rows(artifact, "train") + read_rows(artifact, "test")
    assert len({row["key"] for row in rows}) == 45
    for row in rows:  # original bytes, right labels
        assert row["image"] == (pile / row["key"]).read_bytes()
        assert row["label"] == facts["classes"].index(row["key"].split("/")[0])


def test_parts_are_even_shuffled_and_the_same_every_time(tmp_path: Path) -> None:
    pile = folder_of_classes(tmp_path / "pile", {"a": 30, "b": 30})
    recipe = folder_recipe(pile, "shard.rows_per_shard=16", "shard.test_share=0.1", "shard.limit=null")
    first = run_stage(STAGE, recipe, str(tmp_path / "one"))
    second = run_stage(STAGE, recipe, str(tmp_path / "two"))
    assert first.manifest.files == second.manifest.files
    assert [entry.rows for entry in first.files("train/")] == [13, 14, 13, 14]
    labels = [row["label"] for row in read_rows(first, "train")]
    assert 5 < sum(labels[:27]) < 22
    other = run_stage(STAGE, folder_recipe(pile, "shard.seed=1", "shard.limit=null"), str(tmp_path / "three"))
    assert [row["key"] for row in read_rows(other, "train")] != [row["key"] for row in read_rows(first, "train")]


def _written_alone(root: Path, recipe: Recipe) -> tuple[Storage, list[FileEntry]]:
    """All parts, written one after another by this process, the last one first."""
    out = Storage.at(str(root))
    jobs = write_plan(out, ordered(open_source(recipe.data).listing(), recipe.shard), recipe.shard.rows_per_shard)
    entries = [shard.write_part(job, out, recipe.data, recipe.shard).entry for job in reversed(jobs)]
    return out, list(reversed(entries))


def test_parts_do_not_depend_on_who_writes_them(tmp_path: Path) -> None:
    pile = folder_of_classes(tmp_path / "pile", {"a": 30, "b": 30})
    recipe = folder_recipe(pile, "shard.rows_per_shard=8", "shard.limit=null")
    by_cluster = run_stage(STAGE, recipe, str(tmp_path / "root"))
    _, alone = _written_alone(tmp_path / "alone", recipe)
    assert alone == [entry for entry in by_cluster.manifest.files if "/" in entry.path]


def test_images_are_reencoded_where_the_recipe_says_so(tmp_path: Path) -> None:
    pile = folder_of_classes(tmp_path / "pile", {"a": 4})
    (pile / "a" / "small.png").write_bytes(encoded(picture(70, 20, 18)))
    (pile / "a" / "large.png").write_bytes(encoded(picture(71, 300, 200)))
    images, sizes = {}, {}
    for quality in (95, 40):
        recipe = folder_recipe(
            pile, f"shard.reencode={{size: 32, quality: {quality}}}", "shard.test_share=0.0", "data.classes=2"
        )
        out, entries = _written_alone(tmp_path / str(quality), recipe)
        rows = pq.read_table(pa.BufferReader(out.read_bytes(entries[0].path))).to_pylist()
        images = {row["key"]: Image.open(io.BytesIO(row["image"])) for row in rows}
        assert {image.format for image in images.values()} == {"JPEG"}
        sizes[quality] = entries[0].bytes
    assert images["a/large.png"].size == (48, 32) and images["a/small.png"].size == (20, 18)
    assert sizes[40] < sizes[95]
    with pytest.raises(UserError, match=r"shard\.reencode\.size 16 is below image\.size 32"):
        folder_recipe(pile, "shard.reencode={size: 16}")


def test_original_bytes_do_not_show_in_the_fingerprint(tmp_path: Path) -> None:
    """`reencode` came after the first artifacts were made: a recipe without it must still find them."""
    assert "reencode" not in folder_recipe(tmp_path).section("shard")
    assert "reencode" in folder_recipe(tmp_path, "shard.reencode={size: 64}").section("shard")


def test_a_killed_run_writes_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pile = folder_of_classes(tmp_path / "pile", {"a": 20, "b": 20})
    recipe = folder_recipe(pile, "shard.rows_per_shard=10")
    whole = run_stage(STAGE, recipe, str(tmp_path / "root"))
    storage = whole.storage
    kept = {entry.path: (Path(storage.path) / entry.path).stat().st_mtime_ns for entry in whole.files("train/")}
    lost = sorted(kept)[1]
    (Path(storage.path) / lost).write_bytes(b"half a file")
    storage.delete(MANIFEST)
    again = run_stage(STAGE, recipe, str(tmp_path / "root"))
    assert again.manifest.files == whole.manifest.files
    for path, modified in kept.items():
        assert ((Path(storage.path) / path).stat().st_mtime_ns == modified) == (path != lost)


def test_too_many_bad_files_fail_and_leave_nothing_complete(tmp_path: Path) -> None:
    pile = folder_of_classes(tmp_path / "pile", {"a": 10, "b": 10})
    for name in ("x.png", "y.png"):
        (pile / "a" / name).write_bytes(b"")
    (pile / "b" / "words.txt").write_text("words and words")
    with pytest.raises(UserError) as caught:
        recipe = folder_recipe(pile, "shard.max_bad_share=0.05", "shard.rows_per_shard=4")
        run_stage(STAGE, recipe, str(tmp_path / "root"))
    message = str(caught.value)
    assert "2 of 22 images are unusable (2 empty file" in message, "the whole, though the first bad part is enough"
    assert "shard.max_bad_share 0.05" in message and "raise shard.max_bad_share to 0.10" in message
    assert "empty file" in message and "'a/" in message
    assert not list((tmp_path / "root").rglob(MANIFEST))


def test_duplicates_are_reported(tmp_path: Path) -> None:
    pile = folder_of_classes(tmp_path / "pile", {"a": 10, "b": 10})
    (pile / "a" / "again.png").write_bytes((pile / "a" / "0003.png").read_bytes())
    (pile / "b" / "wrong label.png").write_bytes((pile / "a" / "0004.png").read_bytes())
    artifact = run_stage(STAGE, folder_recipe(pile, "shard.test_share=0.05"), str(tmp_path / "root"))
    assert artifact.manifest.facts["duplicates"] == {"images": 2, "across_splits": 0, "across_classes": 1}
    rows = pq.read_table(pa.BufferReader(artifact.read("duplicates.parquet"))).to_pylist()
    assert {frozenset((row["key"], row["same_as"])) for row in rows} == {
        frozenset(("a/again.png", "a/0003.png")),
        frozenset(("b/wrong label.png", "a/0004.png")),
    }
    assert artifact.manifest.rows == 22


def test_more_classes_than_the_recipe_says(tmp_path: Path) -> None:
    pile = folder_of_classes(tmp_path / "pile", {"a": 1, "b": 1, "c": 1})
    with pytest.raises(UserError, match=r"3 classes \('a', 'b', 'c'\) but data.classes is 2"):
        run_stage(STAGE, folder_recipe(pile, "data.classes=2", "sample.images=4"), str(tmp_path / "root"))


def test_fashion_mnist_splits_and_limit(fashion_mnist: str, tmp_path: Path) -> None:
    source = f"data.source={{kind: fashion-mnist, path: '{fashion_mnist}'}}"
    recipe = folder_recipe("-", source, "shard.limit=60", "shard.rows_per_shard=40")
    artifact = run_stage(STAGE, recipe, str(tmp_path / "root"))
    assert artifact.manifest.facts["splits"] == {"train": 60, "test": 60}
    assert len(artifact.manifest.facts["classes"]) == 10
    assert all(row["key"].startswith("test/") for row in read_rows(artifact, "test"))
    larger = folder_recipe("-", source, "shard.limit=90")
    keys = {row["key"] for row in read_rows(artifact, "train")}
    more = run_stage(STAGE, larger, str(tmp_path / "root"))
    assert keys < {row["key"] for row in read_rows(more, "train")}


def test_a_key_listed_twice_counts_once() -> None:
    rows = [("a", 0, None, "f", 0, 1), ("b", 0, None, "f", 1, 1), ("a", 1, None, "f", 2, 1)]
    order = ordered(Listing(listed_rows(rows), ("x", "y")), Shard(test_share=0.0))
    assert sorted(order.rows.table()["key"].to_pylist()) == ["a", "b"] and order.counts == {"train": 2}
    assert [(r["key"], r["reason"]) for r in order.ruled_out.table().to_pylist()] == [("a", "key listed twice")]


def test_a_file_too_large_to_be_an_image_is_never_read(tmp_path: Path) -> None:
    class Forbidden:
        def read(self, file: str, start: int, length: int) -> bytes:
            raise AssertionError("read")

    refusal = shard._read(Forbidden(), "k", "f", 0, 10**9, max_pixels=1_000_000)  # type: ignore[arg-type]
    assert isinstance(refusal, shard.Refusal) and refusal.reason == "file too large"


def test_a_file_without_end_is_refused(tmp_path: Path) -> None:
    """A CSV names files without their size; this one grows for as long as somebody reads."""
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    source = CsvSource(str(tmp_path / "list.csv"))
    refusal = shard._read(source, "k", "endless.png", 0, UNKNOWN_LENGTH, max_pixels=100_000)
    assert isinstance(refusal, shard.Refusal) and refusal.reason == "file too large"


def test_a_large_source_is_given_up_early_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(bad: int) -> shard._Made:
        made = shard._Made()
        refused = [[f"{number}.jpg", "truncated image", ""] for number in range(bad)]
        made.add(Receipt(FileEntry("train/part-00000.parquet", 0, "", 1_000 - bad), "", {"refused": refused}))
        return made

    with pytest.raises(UserError, match=r"300 of the first 1,000 \(of 20,000\) images are unusable"):
        shard._stop_if_too_bad(seen(300), 20_000, Shard())
    shard._stop_if_too_bad(seen(199), 20_000, Shard())


def test_the_revision_stands_for_the_content_of_what_is_there(tmp_path: Path) -> None:
    folder_of_classes(tmp_path / "there", {"a": 1})
    assert shard.external(folder_recipe(tmp_path / "there", "data.revision=v1")) == {"source": "v1"}
    for overrides in ((), ("data.revision=v1",)):
        with pytest.raises(UserError, match="does not exist"):
            STAGE.fingerprint(folder_recipe(tmp_path / "nowhere", *overrides), {})


def test_other_images_under_the_same_recipe_are_another_artifact(tmp_path: Path) -> None:
    names = {
        STAGE.fingerprint(folder_recipe(folder_of_classes(tmp_path / name, classes)), {})[0]
        for name, classes in (("first", {"a": 2, "b": 2}), ("copy", {"a": 2, "b": 2}), ("second", {"a": 2, "c": 2}))
    }
    assert len(names) == 2


def test_a_class_that_no_part_of_the_training_split_has_is_refused(tmp_path: Path) -> None:
    recipe = folder_recipe(tmp_path, "data.classes=2", "shard.limit=5")
    with pytest.raises(UserError, match=r"1 of 2 classes have no image in the train split \(such as 'y'\).*limit 5"):
        shard._check_learnable({0}, ("x", "y"), recipe)
    shard._check_learnable({0}, ("x", "y"), folder_recipe(tmp_path, "data.allow_empty_classes=true"))


def test_a_source_that_changes_under_a_run_is_told(tmp_path: Path) -> None:
    pile = folder_of_classes(tmp_path / "pile", {"a": 2, "b": 2})
    recipe = folder_recipe(pile)
    name, sections = STAGE.fingerprint(recipe, {})
    (pile / "a" / "new.png").write_bytes(encoded(picture(9)))
    job = Job("shard", name, str(tmp_path / "root"), recipe.model_dump(mode="json"), {}, sections)
    with pytest.raises(UserError, match="is not what it was when this run looked at it"):
        perform(STAGE, job)


def _written_here(out: Storage, recipe: Recipe, jobs: list[dict[str, Any]]) -> Iterator[Receipt]:
    return (shard.write_part(job, out, recipe.data, recipe.shard) for job in jobs)


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_run_lists_its_source_once(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The command's preflight, the flow's, the fingerprint and the stage."""
    pile = folder_of_classes(tmp_path / "pile", {"a": 4, "b": 4})
    where = str(pile)
    if place == "bucket":
        where = f"{request.getfixturevalue('s3_root')}/pile"
        for file in pile.rglob("*.png"):
            Storage.at(where).upload(str(file), str(file.relative_to(pile)))
    listings: list[str] = []
    monkeypatch.setattr(folder, "walk", lambda at: (listings.append(at.url), walk(at))[1])
    monkeypatch.setattr(run, "tracked", lambda *arguments: nullcontext(tracking.Tracker()))
    monkeypatch.setattr(shard, "_written", _written_here)  # workers of Ray have no keys of this bucket
    source = f"data.source={{kind: folder, path: '{where}'}}"
    wanted = ("demo_tiny", [source, "data.classes=2", "sample.labels=random", *SMALL_BATCHES], str(tmp_path / "root"))
    with one_look():
        run.preflight((STAGE,), *wanted)
        with run.open_run("sfd-full", (STAGE,), *wanted, only="shard") as opened:
            artifact = perform(STAGE, opened.plan(STAGE, [])[1])
    assert artifact.manifest.rows == 8
    assert listings == [Storage.at(where).url]
    run.preflight((STAGE,), *wanted)
    assert len(listings) == 2, "what another run sees is looked at again"
