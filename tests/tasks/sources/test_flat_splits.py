"""A test split in one folder with a file of its labels, as ImageNet is unpacked: every form in which labels come."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.io import savemat
from typer.testing import CliRunner

from configs import Recipe, UserError, load_recipe
from flows.__main__ import app
from tasks.plan.data import images_of
from tasks.sources.folder import FolderSource
from tasks.sources.imagenet import ImageNetSource
from tests.helpers.odd_sources import jpeg, labels_of, listed, recipe_of, tar, tree

CLASSES = ("n01440764", "n01443537", "n01484850")
RIGHT = [2, 0, 1, 1, 0]
"""Labels of the five images of the test split, in the order of their names."""
IDS = {"n01440764": 3, "n01443537": 1, "n01484850": 2}
"""Numbers of ImageNet's development kit, which follow no order that names tell."""
NAMES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 6)]
TRUTH = "ILSVRC2012_validation_ground_truth.txt"


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """`train` with three classes and `val` with five loose images."""
    root = tree(tmp_path / "set" / "train", dict.fromkeys(CLASSES, 4)).parent
    (root / "val").mkdir()
    for number, name in enumerate(NAMES):
        (root / "val" / name).write_bytes(jpeg(100 + number))
    return root


def _lines(values: list[object]) -> str:
    return "".join(f"{value}\n" for value in values)


def _kit(folder: Path) -> Path:
    """ImageNet's development kit, as it is unpacked."""
    data = folder / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    (data / TRUTH).write_text(_lines([IDS[CLASSES[label]] for label in RIGHT]))
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    savemat(data / "meta.mat", {"synsets": np.array([(n, wnid, "x, y") for wnid, n in IDS.items()], dtype=kind)})
    return data.parent


def _archived(folder: Path) -> Path:
    kit = _kit(folder / "made")
    with tarfile.open(folder / "devkit.tar.gz", "w:gz") as archive:
        archive.add(kit, kit.name)
    return folder / "devkit.tar.gz"


def _written(name: str, text: str, **beside: str):  # type: ignore[no-untyped-def]
    def make(folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        for other, content in beside.items():
            (folder / f"{other}.txt").write_text(content)
        (folder / name).write_text(text)
        return folder / name

    return make


SHUFFLED = [(NAMES[n], RIGHT[n]) for n in (3, 0, 4, 2, 1)]
FORMS = {
    "names by order": _written("l.txt", _lines([CLASSES[n] for n in RIGHT])),
    "numbers by order": _written("l.txt", _lines(RIGHT)),
    "pairs": _written("l.txt", _lines([f"{name} {CLASSES[n]}" for name, n in SHUFFLED])),
    "pairs with folders": _written("l.txt", _lines([f"val/{name} {CLASSES[n]}" for name, n in SHUFFLED])),
    "Caffe's": _written("val.txt", _lines([f"{name} {n}" for name, n in SHUFFLED])),
    "numbers with synsets": _written(
        "val.txt", _lines([f"{name} {2 - n}" for name, n in SHUFFLED]), synsets=_lines(list(reversed(CLASSES)))
    ),
    "numbers from 1 with synsets": _written(
        "val.txt", _lines([n + 1 for n in RIGHT]), synset_words=_lines(["n0 none", *(f"{n} a fish" for n in CLASSES)])
    ),
    "Kaggle's": _written(
        "LOC_val_solution.csv",
        "ImageId,PredictionString\n" + _lines([f"{name[:-5]},{CLASSES[n]} 1 2 3 4" for name, n in SHUFFLED]),
    ),
    "development kit": _kit,
    "its folder": lambda folder: _kit(folder) / "data",
    "its file": lambda folder: _kit(folder) / "data" / TRUTH,
    "its archive": _archived,
}


def _recipe(root: Path, labels: Path) -> Recipe:
    return recipe_of("folder", root / "train", 3, test_path=str(root / "val"), test_labels_path=str(labels))


@pytest.mark.parametrize("form", FORMS)
def test_labels_in_every_form(unpacked: Path, form: str) -> None:
    labels = FORMS[form](unpacked / "labels")
    listing = listed(_recipe(unpacked, labels))
    assert listing.classes == CLASSES
    assert labels_of(listing) == {"train": [0] * 4 + [1] * 4 + [2] * 4, "test": RIGHT}
    row = next(row for row in listing.images.to_pylist() if row["key"] == f"test/{NAMES[3]}")
    source = FolderSource(str(unpacked / "train"), str(unpacked / "val"), str(labels))
    assert source.read(row["file"], 0, row["length"]) == jpeg(103)


@pytest.mark.parametrize("form", ["Caffe's", "its archive"])
def test_imagenets_archive_takes_the_same_forms(unpacked: Path, form: str) -> None:
    inner = [(f"{name}.tar", tar(None, [(f"{name}_0.JPEG", jpeg(n))])) for n, name in enumerate(CLASSES)]
    tar(unpacked / "train.tar", inner)
    tar(unpacked / "val.tar", [(name, jpeg(n)) for n, name in enumerate(NAMES)])
    source = ImageNetSource(
        str(unpacked / "train.tar"), str(unpacked / "val.tar"), str(FORMS[form](unpacked / "labels"))
    )
    assert labels_of(source.listing())["test"] == RIGHT


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_written("l.txt", _lines(RIGHT[:4])), r"has 4 lines of one class each, but there are 5 images"),
        (_written("l.txt", f"{NAMES[0]} {CLASSES[0]}\n"), rf"has no class for {NAMES[1]} and 3 more"),
        (
            _written("l.txt", _lines([3, 1, 2, 2, 1])),
            r"labels run from 1 to 3 and are expected from 0 to 2.*synsets\.txt",
        ),
        (_written("l.txt", _lines([0, 490, 1, 2, 0])), r"labels run from 0 to 490"),
        (
            _written("l.txt", _lines(["n9", *CLASSES, "n9"])),
            r"'n9' is not a class of the training images \(such as 'n0",
        ),
        (_written(TRUTH, _lines(RIGHT)), r"counts classes in an order of its own.*meta\.mat.*devkit_t12\.tar\.gz"),
        (lambda folder: folder / "none.txt", r"none\.txt does not exist"),
        (lambda folder: folder.parent / "train", r"is a folder without ILSVRC2012_validation_ground_truth"),
    ],
)
def test_labels_that_do_not_fit_are_refused(unpacked: Path, make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=words):
        listed(_recipe(unpacked, make(unpacked / "labels")))


def test_a_damaged_kit_is_told(unpacked: Path) -> None:
    kit = _kit(unpacked / "labels")
    (kit / "data" / "meta.mat").write_bytes(b"no matrix")
    with pytest.raises(UserError, match=r"meta\.mat cannot be read .*fetch the kit again"):
        listed(_recipe(unpacked, kit))
    (unpacked / "kit.tar.gz").write_bytes(_archived(unpacked / "whole").read_bytes()[:150])
    with pytest.raises(UserError, match=r"kit\.tar\.gz is not a whole archive"):
        listed(_recipe(unpacked, unpacked / "kit.tar.gz"))


def test_labels_need_a_split(tmp_path: Path) -> None:
    source = json.dumps({"kind": "folder", "path": str(tmp_path), "test_labels_path": "labels.txt"})
    with pytest.raises(UserError, match="test_labels_path is set but test_path is not"):
        load_recipe("demo_tiny", [f"data.source={source}"])


def test_mended_labels_are_another_source_and_a_copy_is_the_same(unpacked: Path, tmp_path: Path) -> None:
    def identity(labels: Path) -> str:
        return FolderSource(str(unpacked / "train"), str(unpacked / "val"), str(labels)).identity()

    first = identity(FORMS["names by order"](unpacked / "labels"))
    assert identity(FORMS["development kit"](unpacked / "elsewhere")) == first, "the same labels in another form"
    mended = [RIGHT[1], RIGHT[0], *RIGHT[2:]]
    (unpacked / "labels" / "l.txt").write_text(_lines([CLASSES[n] for n in mended]))
    assert identity(unpacked / "labels" / "l.txt") != first


def test_a_file_that_is_no_picture_takes_no_line(unpacked: Path) -> None:
    (unpacked / "val" / "Thumbs.db").write_bytes(b"x")
    (unpacked / "val" / "readme.txt").write_text("ours")
    (unpacked / "val" / NAMES[1]).unlink()
    (unpacked / "val" / NAMES[1]).symlink_to("/nowhere.JPEG")
    listing = FolderSource(
        str(unpacked / "train"), str(unpacked / "val"), str(FORMS["numbers by order"](unpacked / "labels"))
    ).listing()
    assert labels_of(listing)["test"] == [RIGHT[0], *RIGHT[2:]]
    assert [one.reason for one in listing.refused] == ["link to nothing"]
    assert listing.left_out == {"system leftovers": 1, "no picture (.txt)": 1}


@pytest.mark.parametrize("form", ["Caffe's", "development kit"])
def test_look_finds_the_labels_beside(unpacked: Path, home: Path, form: str) -> None:
    labels = FORMS[form](unpacked)
    done = CliRunner().invoke(app, ["look", str(unpacked), "--images", "3", "--output", str(unpacked / "l.png")])
    assert done.exit_code == 0, done.output
    told, _, section = done.output.partition("\n\n")
    assert "train 12 · test 5" in told and "to mend" not in told
    assert yaml.safe_load(section)["data"]["source"] == {
        "kind": "folder",
        "path": f"{unpacked}/train",
        "test_path": f"{unpacked}/val",
        "test_labels_path": str(labels),
    }


def test_a_plan_counts_the_split(unpacked: Path) -> None:
    found = images_of(_recipe(unpacked, FORMS["pairs"](unpacked / "labels")))
    assert (found.train, found.test) == (12, 5)


def test_thousands_of_images_in_one_folder(tmp_path: Path) -> None:
    """Only names, sizes and lines are looked at."""
    tree(tmp_path / "train", {"a": 1, "b": 1})
    (tmp_path / "val").mkdir()
    first = tmp_path / "val" / "00000.jpg"
    first.write_bytes(jpeg())
    for number in range(1, 5_000):
        (tmp_path / "val" / f"{number:05d}.jpg").hardlink_to(first)
    text = io.StringIO()
    text.writelines(f"{'ab'[number % 2]}\n" for number in range(5_000))
    (tmp_path / "labels.txt").write_text(text.getvalue())
    listing = FolderSource(str(tmp_path / "train"), str(tmp_path / "val"), str(tmp_path / "labels.txt")).listing()
    assert labels_of(listing)["test"] == [number % 2 for number in range(5_000)]
