from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import UserError
from tasks.data.decode import decode
from tasks.sources.fashion_mnist import TRAILERS, FashionMnistSource
from tasks.sources.fetch import _check, _move_in
from tasks.sources.folder import FolderSource
from tests.helpers.piles import encoded, folder_of_classes, picture


def test_fashion_mnist_rows_and_pixels(fashion_mnist: str) -> None:
    source = FashionMnistSource(fashion_mnist)
    listing = source.listing()
    table = listing.images
    assert table.num_rows == 70_000 and len(listing.classes) == 10
    assert len(set(table["key"].to_pylist())) == 70_000
    counts = table.group_by(["split", "label"]).aggregate([("key", "count")])["key_count"].to_pylist()
    assert sorted(counts) == [1000] * 10 + [6000] * 10
    row = table.slice(60_001, 1).to_pylist()[0]
    assert row["key"] == "test/00001"
    with gzip.open(Path(fashion_mnist) / "t10k-images-idx3-ubyte.gz") as file:
        raw = np.frombuffer(file.read(), np.uint8, 28 * 28, 16 + 28 * 28).reshape(28, 28)
    pixels = np.asarray(decode(source.read(row["file"], row["start"], row["length"])))
    assert np.array_equal(pixels, np.repeat(raw[..., None], 3, axis=2))


def test_fashion_mnist_is_the_same_wherever_it_lies(
    fashion_mnist: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(fashion_mnist, copy)
    for file in copy.iterdir():  # compressed by someone else
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()), compresslevel=1))
    monkeypatch.delenv("LATENTFORGE_FASHION_MNIST", raising=False)
    names = {FashionMnistSource(None).identity(), FashionMnistSource(str(copy)).identity()}
    monkeypatch.setenv("LATENTFORGE_FASHION_MNIST", fashion_mnist)
    names.add(FashionMnistSource(None).identity())
    assert len(names) == 1


def test_fashion_mnist_missing_or_damaged(fashion_mnist: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lacks train-images-idx3-ubyte\.gz"):
        FashionMnistSource(str(tmp_path)).identity()
    copy = tmp_path / "copy"
    shutil.copytree(fashion_mnist, copy)
    name = "train-labels-idx1-ubyte.gz"
    (copy / name).write_bytes((copy / name).read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{name} is damaged"):
        FashionMnistSource(str(copy)).listing()
    (copy / name).write_bytes(gzip.compress(b"\0\0\x08\x03 no labels"))
    with pytest.raises(UserError, match="not an idx file of 1 dimensions"):
        FashionMnistSource(str(copy)).listing()


def test_fetched_files_are_checked_and_moved_in_whole(fashion_mnist: str, tmp_path: Path) -> None:
    found, target = Path(fashion_mnist), tmp_path / "datasets" / "fashion-mnist"
    target.parent.mkdir()
    for name, trailer in TRAILERS.items():
        _check(found / name, trailer)
    with pytest.raises(ValueError, match="other content"):
        _check(found / "t10k-labels-idx1-ubyte.gz", TRAILERS["train-labels-idx1-ubyte.gz"])
    _move_in(found, list(TRAILERS), target)
    _move_in(found, list(TRAILERS), target)  # a second process comes late
    assert sorted(path.name for path in target.iterdir()) == sorted(TRAILERS)
    assert [path.name for path in target.parent.iterdir()] == ["fashion-mnist"]


def test_folder_lists_classes_keys_and_oddities(tmp_path: Path) -> None:
    root = folder_of_classes(tmp_path / "my images", {"Straße & Söhne": 2, "b c": 1})
    (root / "empty").mkdir()
    (root / "b c" / ".DS_Store").write_bytes(b"hidden")
    (root / "b c" / "deeper").mkdir()
    (root / "b c" / "deeper" / "x.webp").write_bytes(encoded(picture(), "WEBP"))
    (root / "readme.txt").write_text("no class")
    source = FolderSource(str(root))
    listing = source.listing()
    assert listing.classes == ("Straße & Söhne", "b c", "empty")
    rows = {row["key"]: row for row in listing.images.to_pylist()}
    assert set(rows) == {"Straße & Söhne/0000.png", "Straße & Söhne/0001.png", "b c/0002.png", "b c/deeper/x.webp"}
    assert rows["b c/deeper/x.webp"]["label"] == 1
    assert listing.left_out == {"system leftovers": 1, "no picture (.txt)": 1} and not listing.refused
    row = rows["Straße & Söhne/0001.png"]
    assert np.array_equal(np.asarray(decode(source.read(row["file"], 0, row["length"]))), np.asarray(picture(1)))


def test_folder_identity_changes_with_content_not_with_place(tmp_path: Path) -> None:
    first = folder_of_classes(tmp_path / "a", {"x": 2, "y": 2})
    second = folder_of_classes(tmp_path / "b", {"x": 2, "y": 2})
    assert FolderSource(str(first)).identity() == FolderSource(str(second)).identity()
    (second / "x" / "more.png").write_bytes(encoded(Image.new("L", (4, 4))))
    assert FolderSource(str(first)).identity() != FolderSource(str(second)).identity()


def test_folder_with_a_test_tree(tmp_path: Path) -> None:
    train = folder_of_classes(tmp_path / "train", {"x": 2, "y": 2})
    test = folder_of_classes(tmp_path / "val", {"y": 1})
    listing = FolderSource(str(train), str(test)).listing()
    assert [row["label"] for row in listing.images.to_pylist() if row["split"] == "test"] == [1]
    folder_of_classes(tmp_path / "other", {"z": 1})
    (fault,) = FolderSource(str(train), str(tmp_path / "other")).listing().faults
    assert "classes ['z'] are not among" in fault


def test_links_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    real = folder_of_classes(tmp_path / "real", {"x": 1, "y": 1})
    subset = tmp_path / "subset"
    subset.mkdir()
    (subset / "x").symlink_to(real / "x")
    (subset / "y").mkdir()
    (subset / "y" / "one.png").symlink_to(real / "y" / "0001.png")
    (subset / "y" / "back").symlink_to(subset)
    assert FolderSource(str(subset)).listing().images["key"].to_pylist() == ["x/0000.png", "y/one.png"]


def test_folder_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        FolderSource(str(tmp_path / "nowhere")).identity()
    (fault,) = FolderSource(str(tmp_path)).listing().faults
    assert "no class folders" in fault
    folder_of_classes(tmp_path / "train", {"x": 1})
    folder_of_classes(tmp_path / "val", {"x": 1})
    (fault,) = FolderSource(str(tmp_path)).listing().faults
    assert "holds the splits train, val, not classes" in fault
