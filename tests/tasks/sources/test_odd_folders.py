"""Folders as people have them: what systems leave, links to nothing, numbers, other alphabets, one level too high."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from configs import UserError
from infra.storage import Storage
from tasks.sources.base import identity_of
from tasks.sources.folder import FolderSource
from tests.helpers.odd_sources import jpeg, labels_of, listed, recipe_of, tree


def test_what_systems_leave_is_no_class(tmp_path: Path) -> None:
    tree(tmp_path, {"cats": 3, "dogs": 3, "__MACOSX/cats": 1, "@eaDir": 1, "$RECYCLE.BIN": 1})
    (tmp_path / "cats" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "cats" / "._000.jpg").write_bytes(b"\0\5\x16\7")
    listing = listed(recipe_of("folder", tmp_path, 2))
    assert listing.classes == ("cats", "dogs") and listing.images.num_rows == 6
    assert listing.left_out == {"system leftovers": 5} and not listing.refused
    clean = tree(tmp_path / "copy", {"cats": 3, "dogs": 3})
    assert FolderSource(str(clean)).identity() == listing.identity


def test_files_that_are_no_pictures_are_counted_by_kind(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 2, "b": 2, "annotations": 0})
    for name, data in {
        "a/000.txt": b"a caption", "a/000.ogg": b"OggS", "b/x.dat": b"\0\1\2", "b/drawing.svg": b"<svg/>",
        "b/photo.dat": jpeg(), "b/no suffix": jpeg(), "annotations/000.xml": b"<xml/>", "list.csv": b"a,b",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
    listing = listed(recipe_of("folder", tmp_path, 2))
    assert listing.classes == ("a", "b")
    assert {key for key in listing.images["key"].to_pylist() if "00" not in key} == {"b/photo.dat", "b/no suffix"}
    assert listing.left_out == {
        "no picture (.txt)": 1, "no picture (.ogg)": 1, "no picture (.dat)": 1, "no picture (.svg)": 1,
        "no picture (.xml)": 1, "no picture (.csv)": 1, "folder without pictures (annotations)": 1,
    }  # fmt: skip
    assert not listing.refused


def test_links_to_nothing_are_told_and_counted(tmp_path: Path) -> None:
    store = tree(tmp_path / "store", {"cats": 4, "dogs": 4})
    links = tmp_path / "links"
    for name in ("cats", "dogs"):
        (links / name).mkdir(parents=True)
        for number, image in enumerate(sorted((store / name).iterdir())):
            target = image if name == "cats" or number == 0 else Path("/nowhere") / image.name
            (links / name / image.name).symlink_to(target)
    recipe = recipe_of("folder", links, 2, "shard.max_bad_share=0.5")
    listing = listed(recipe)
    assert listing.images.num_rows == 5
    assert [(one.key, one.reason) for one in listing.refused] == [
        (f"dogs/00{n}.jpg", "link to nothing") for n in (1, 2, 3)
    ]
    with pytest.raises(UserError, match=r"3 of 8 images are unusable before any is read \(3 link to nothing.*0\.38"):
        listed(recipe_of("folder", links, 2))


def test_numbers_are_in_numeric_order(tmp_path: Path) -> None:
    tree(tmp_path, {str(number): 1 for number in range(12)})
    listing = listed(recipe_of("folder", tmp_path, 12))
    assert listing.classes == tuple(map(str, range(12)))
    labels = {row["key"].split("/")[0]: row["label"] for row in listing.images.to_pylist()}
    assert labels["2"] == 2 and labels["10"] == 10
    names = [(f"{n}/000.jpg", len(jpeg())) for n in range(12)] + [(f"{n}", "folder") for n in range(12)]
    assert listing.identity != identity_of("folder", names), "made before, its labels had another order"


def test_plain_trees_keep_the_identity_they_had(tmp_path: Path) -> None:
    tree(tmp_path / "train", {"x": 2, "y": 1})
    tree(tmp_path / "val", {"y": 1})
    size = len(jpeg())
    one = [("x/000.jpg", size), ("x/001.jpg", size), ("y/000.jpg", size), ("x", "folder"), ("y", "folder")]
    assert FolderSource(str(tmp_path / "train")).identity() == identity_of("folder", one)
    two = [(f"train/{name}", what) for name, what in one] + [("test/y/000.jpg", size), ("test/y", "folder")]
    assert FolderSource(str(tmp_path / "train"), str(tmp_path / "val")).identity() == identity_of("folder", two)


def test_times_are_no_part_of_the_identity(tmp_path: Path) -> None:
    one, two = tree(tmp_path / "a", {"x": 2}), tree(tmp_path / "b", {"x": 2})
    for path in two.rglob("*"):
        os.utime(path, (1, 1))
    assert FolderSource(str(one)).identity() == FolderSource(str(two)).identity()


def test_one_name_in_two_normal_forms_is_one_class(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    tree(tmp_path / "train", {composed: 3, "tea": 3})
    tree(tmp_path / "val", {apart: 2, "tea": 1})
    listing = listed(recipe_of("folder", tmp_path / "train", 2, test_path=str(tmp_path / "val")))
    assert listing.classes == (composed, "tea")
    assert labels_of(listing) == {"train": [0, 0, 0, 1, 1, 1], "test": [0, 0, 1]}
    row = next(row for row in listing.images.to_pylist() if row["key"] == f"test/{composed}/001.jpg")
    source = FolderSource(str(tmp_path / "train"), str(tmp_path / "val"))
    assert source.read(row["file"], 0, row["length"]) == jpeg(1)
    assert (
        FolderSource(str(tree(tmp_path / "a", {composed: 1}))).identity()
        == FolderSource(str(tree(tmp_path / "b", {apart: 1}))).identity()
    )


def test_a_flat_validation_folder_is_refused_with_the_way_out(tmp_path: Path) -> None:
    tree(tmp_path / "train", {"n01": 20, "n02": 20})
    tree(tmp_path, {"val": 5})
    recipe = recipe_of("folder", tmp_path / "train", 2, test_path=str(tmp_path / "val"))
    with pytest.raises(UserError, match=r"val holds 5 images and no class folders.*one folder per class.*kind: csv"):
        listed(recipe)


def test_folders_one_level_off_say_which_was_meant(tmp_path: Path) -> None:
    tree(tmp_path / "set", {"a": 3, "b": 3})
    with pytest.raises(UserError, match=rf"has 1 class \('set'\).*data\.source\.path to {tmp_path}/set"):
        listed(recipe_of("folder", tmp_path, 2))
    with pytest.raises(UserError, match=r"holds 3 images and no class folders.*name the folder above it"):
        listed(recipe_of("folder", tmp_path / "set" / "a", 2))
    tree(tmp_path / "whole" / "train", {"a": 3, "b": 3})
    with pytest.raises(UserError, match="holds the splits train, not classes"):
        listed(recipe_of("folder", tmp_path / "whole", 2))


@pytest.mark.parametrize("classes", [10, 2])
def test_other_numbers_of_classes_are_refused_with_what_follows(tmp_path: Path, classes: int) -> None:
    tree(tmp_path, {"a": 3, "b": 3, "c": 3})
    recipe = recipe_of("folder", tmp_path, classes, "sample.labels=balanced", "sample.images=40")
    with pytest.raises(UserError) as caught:
        listed(recipe)
    message = str(caught.value)
    assert f"has 3 classes ('a', 'b', 'c') but data.classes is {classes}: set data.classes to 3" in message
    assert "then sample.images 40 cannot be balanced over data.classes 3: use 39" in message


def test_classes_without_images_are_refused_unless_meant(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 3, "b": 0, "c": 3})
    with pytest.raises(UserError, match=r"1 of 3 classes have no images to learn from \('b'\)"):
        listed(recipe_of("folder", tmp_path, 3))
    assert listed(recipe_of("folder", tmp_path, 3, "data.allow_empty_classes=true")).classes == ("a", "b", "c")
    assert listed(recipe_of("folder", tmp_path, 10, "data.allow_empty_classes=true")).images.num_rows == 6


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 3, "b": 3, "c": 0})
    for number in range(4):
        (tmp_path / "a" / f"photo{number}.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    with pytest.raises(UserError) as caught:
        listed(recipe_of("folder", tmp_path, 10))
    message = str(caught.value)
    assert "(1) 4 of 10 images are unusable" in message and "install pillow-heif" in message
    assert "(2) data.source has 3 classes" in message and "(3) 1 of 3 classes have no images" in message


def test_one_class_is_a_source(tmp_path: Path) -> None:
    tree(tmp_path, {"faces": 6})
    listing = listed(recipe_of("folder", tmp_path, 1))
    assert listing.classes == ("faces",) and labels_of(listing) == {"all": [0] * 6} and not listing.notes
    tree(tmp_path, {"faces/a": 2, "faces/b": 2})
    (note,) = listed(recipe_of("folder", tmp_path, 1)).notes
    assert "the one class 'faces' holds 2 folders (a, b, …)" in note


def test_splits_that_overlap_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "again").symlink_to(tmp_path / "a")
    for test in (tmp_path, tmp_path / "a", tmp_path / "again"):
        with pytest.raises(UserError, match="hold the same images"):
            FolderSource(str(tmp_path), str(test)).listing()


def test_an_empty_test_tree_is_refused(tmp_path: Path) -> None:
    tree(tmp_path / "train", {"a": 3, "b": 3})
    tree(tmp_path / "val", {"a": 0, "b": 0})
    with pytest.raises(UserError, match="the test split is empty"):
        listed(recipe_of("folder", tmp_path / "train", 2, test_path=str(tmp_path / "val")))


def test_batches_larger_than_the_data_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 10, "b": 10})
    with pytest.raises(UserError, match=r"train_dit\.batch 19 is more than all.*18 in the training split.*most 18"):
        listed(recipe_of("folder", tmp_path, 2, "train_dit.batch=19"))
    listed(recipe_of("folder", tmp_path, 2, "train_dit.batch=18"))


def test_a_source_without_anything_to_score_on_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 3, "b": 3})
    with pytest.raises(UserError, match=r"no test split of its own and shard\.test_share is 0"):
        listed(recipe_of("folder", tmp_path, 2, "shard.test_share=0.0"))
    by_training = ("shard.test_share=0.0", "evaluate.reference=train", "evaluate.classifier=null", "train_dit.batch=6")
    smaller = ("train_vavae.batch=6", "train_semvae.batch=6")
    listed(recipe_of("folder", tmp_path, 2, *by_training, *smaller))
    watched = "train_dit.validation={every: 6}", "compute.train={preview_every: 6, preview_scored: 4}"
    with pytest.raises(UserError, match=r"leave out train_dit\.validation and compute\.train\.preview_scored"):
        listed(recipe_of("folder", tmp_path, 2, *by_training, *smaller, *watched))


def test_pointers_of_git_lfs_and_annex_are_named(tmp_path: Path) -> None:
    tree(tmp_path, {"cats": 0, "dogs": 0})
    for number in range(9):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{number:064d}\nsize 90405\n"
        (tmp_path / "cats" / f"{number}.jpg").write_text(pointer)
    (tmp_path / "dogs" / "0.jpg").write_text("/annex/objects/SHA256E-s90405--0.jpg\n")
    with pytest.raises(
        UserError, match=r"10 of 10 images are unusable.*9 Git LFS pointer.*git lfs pull.*git annex get"
    ):
        listed(recipe_of("folder", tmp_path, 2))


def test_unreadable_folders_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {"a": 1, "b": 1, "c": 1})
    scandir = os.scandir

    def refuse(path: str) -> object:  # tests run as a user who may read everything
        if str(path).endswith(("/a", "/c")):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"2 folders in .* cannot be read \(such as 'a'\): check their permissions"):
        FolderSource(str(tmp_path)).listing()


def test_markers_of_a_bucket_are_folders_and_no_images(tmp_path: Path, s3_root: str) -> None:
    """Also: a copy of a folder in a bucket is the same source, whatever signs its names have."""
    names = ("with space.jpg", "a+b.jpg", "50%25.jpg", "q?v=1.jpg", "hash#1.jpg", "[x].jpg", "star*.jpg", "größe.jpg")
    tree(tmp_path, {"class one": 0, "two+2": 0, "empty class": 0})
    for folder in ("class one", "two+2"):
        for name in names:
            (tmp_path / folder / name).write_bytes(jpeg())
    storage = Storage.at(f"{s3_root}/odd")
    for path in tmp_path.rglob("*.jpg"):
        storage.fs.pipe_file(storage.locate(str(path.relative_to(tmp_path))), path.read_bytes())
    bucket, _, prefix = storage.path.partition("/")
    for marker in ("", "class one/", "empty class/"):
        storage.fs.call_s3("put_object", Bucket=bucket, Key=f"{prefix}/{marker}", Body=b"")
    for url in (storage.url, storage.url + "/"):
        listing = FolderSource(url).listing()
        assert listing.classes == ("class one", "empty class", "two+2")
        assert listing.images.num_rows == 16 and not listing.refused
        assert listing.identity == FolderSource(str(tmp_path)).identity()
    row = next(row for row in listing.images.to_pylist() if row["key"] == "two+2/50%25.jpg")
    assert FolderSource(storage.url).read(row["file"], 0, row["length"]) == jpeg()
