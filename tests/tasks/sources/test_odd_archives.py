"""WebDataset tars, Parquet and ImageNet's archives in the forms people have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs import UserError
from tasks.sources import memory, tars
from tasks.sources.imagenet import ImageNetSource
from tasks.sources.parquet import ParquetSource
from tasks.sources.webdataset import WebDatasetSource
from tests.helpers.odd_sources import hub, jpeg, labels_of, listed, png, recipe_of, tar, webdataset

SIX = range(6)


def _cls(number: int) -> bytes:
    return str(number % 3).encode()


def test_several_pictures_in_a_sample_are_told_and_a_field_chooses(tmp_path: Path) -> None:
    webdataset(tmp_path / "0.tar", [{"cls": _cls(n), "seg.png": png(n), "jpg": jpeg(n)} for n in SIX])
    with pytest.raises(UserError, match=r"6 samples have several pictures \(jpg, seg\.png\).*data\.source\.image.*jpg"):
        listed(recipe_of("webdataset", tmp_path, 3))
    for image, data in (("jpg", jpeg), ("seg.png", png)):
        listing = listed(recipe_of("webdataset", tmp_path, 3, image=image))
        source = WebDatasetSource(str(tmp_path))
        read = [source.read(row["file"], row["start"], row["length"]) for row in listing.images.to_pylist()]
        assert read == [data(n) for n in SIX]


def test_a_picture_is_known_by_what_it_is(tmp_path: Path) -> None:
    samples = [{"npy": b"\x93NUMPY", "cls": _cls(n), "input.img": jpeg(n), "ogg": b"OggS"} for n in SIX]
    webdataset(tmp_path / "0.tar", samples)
    listing = listed(recipe_of("webdataset", tmp_path, 3))
    assert listing.images["length"].to_pylist() == [len(jpeg(n)) for n in SIX]


@pytest.mark.parametrize("value", [lambda n: n % 3, lambda n: ("cat", "dog", "eel")[n % 3]])
def test_labels_in_json(tmp_path: Path, value: object) -> None:
    samples = [{"jpg": jpeg(n), "json": json.dumps({"label": value(n), "width": 8}).encode()} for n in SIX]  # type: ignore[operator]
    webdataset(tmp_path / "0.tar", samples)
    assert labels_of(listed(recipe_of("webdataset", tmp_path, 3))) == {"all": [0, 1, 2, 0, 1, 2]}


def test_a_field_of_the_json_can_be_named(tmp_path: Path) -> None:
    samples = [{"jpg": jpeg(n), "json": json.dumps({"meta": {"kind": f"k{n % 2}"}}).encode()} for n in SIX]
    webdataset(tmp_path / "0.tar", samples)
    with pytest.raises(UserError, match=r"no sample has a label \(the first has jpg, json with meta\).*json\.FIELD"):
        listed(recipe_of("webdataset", tmp_path, 2))
    listing = listed(recipe_of("webdataset", tmp_path, 2, label="json.meta.kind"))
    assert listing.classes == ("k0", "k1") and labels_of(listing) == {"all": [0, 1, 0, 1, 0, 1]}


def test_names_are_classes(tmp_path: Path) -> None:
    webdataset(tmp_path / "0.tar", [{"jpg": jpeg(n), "cls": (b"cat\n", b"dog", b"eel")[n % 3]} for n in SIX])
    listing = listed(recipe_of("webdataset", tmp_path, 3))
    assert listing.classes == ("cat", "dog", "eel") and labels_of(listing) == {"all": [0, 1, 2, 0, 1, 2]}


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "csv"])
def test_labels_from_one_on(tmp_path: Path, kind: str) -> None:
    numbers = [1 + n % 3 for n in SIX]
    place = tmp_path
    match kind:
        case "webdataset":
            webdataset(tmp_path / "0.tar", [{"jpg": jpeg(n), "cls": str(n).encode()} for n in numbers])
        case "parquet":
            hub(tmp_path / "x.parquet", numbers, names=None)
        case "csv":
            place = tmp_path / "list.csv"
            for n in SIX:
                (tmp_path / f"{n}.jpg").write_bytes(jpeg(n))
            place.write_text("path,label\n" + "".join(f"{n}.jpg,{number}\n" for n, number in enumerate(numbers)))
    with pytest.raises(UserError, match=r"labels run from 1 to 3 and none is 0: set data\.source\.first_label to 1"):
        listed(recipe_of(kind, place, 3))
    listing = listed(recipe_of(kind, place, 3, first_label=1))
    assert listing.classes == ("1", "2", "3") and labels_of(listing) == {"all": [0, 1, 2, 0, 1, 2]}


def test_splits_of_one_folder_are_kept_apart(tmp_path: Path) -> None:
    webdataset(tmp_path / "imagenet1k-train-0000.tar", [{"jpg": jpeg(n), "cls": _cls(n)} for n in SIX])
    webdataset(tmp_path / "imagenet1k-validation-00.tar", [{"jpg": jpeg(n), "cls": _cls(n)} for n in range(3)])
    assert labels_of(listed(recipe_of("webdataset", tmp_path, 3))) == {"train": [0, 1, 2, 0, 1, 2], "test": [0, 1, 2]}
    webdataset(tmp_path / "more.tar", [{"jpg": jpeg(), "cls": b"0"}])
    with pytest.raises(UserError, match=r"tell the splits train, validation, but not that of more\.tar"):
        listed(recipe_of("webdataset", tmp_path, 3))


def test_tars_of_one_name_in_two_trees_do_not_collide(tmp_path: Path) -> None:
    for split in ("train", "val"):
        webdataset(tmp_path / split / "000.tar", [{"jpg": jpeg(n), "cls": _cls(n)} for n in SIX])
    listing = listed(recipe_of("webdataset", tmp_path / "train", 3, test_path=str(tmp_path / "val")))
    assert len(set(listing.images["key"].to_pylist())) == 12
    with pytest.raises(UserError, match="is named by both path and test_path"):
        listed(recipe_of("webdataset", tmp_path / "train", 3, test_path=str(tmp_path / "train" / "0*.tar")))


def test_mended_labels_are_another_source(tmp_path: Path) -> None:
    """Names and sizes stay as they were: what the labels say is part of the identity, wherever they lie."""
    found: dict[str, set[str]] = {}

    def keep(kind: str, identity: str) -> None:
        found.setdefault(kind, set()).add(identity)

    for shift in (0, 1):
        webdataset(tmp_path / "w.tar", [{"jpg": jpeg(), "cls": _cls(n + shift)} for n in SIX])
        keep("cls", WebDatasetSource(str(tmp_path / "w.tar")).identity())
        samples = [{"jpg": jpeg(), "json": json.dumps({"label": (n + shift) % 3}).encode()} for n in SIX]
        webdataset(tmp_path / "j.tar", samples)
        keep("json", WebDatasetSource(str(tmp_path / "j.tar")).identity())
        hub(tmp_path / "p.parquet", [(n + shift) % 3 for n in SIX])
        keep("parquet", ParquetSource(str(tmp_path / "p.parquet")).identity())
        inner = [(f"n{k}.tar", tar(None, [(f"n{k}_{n}.JPEG", jpeg(n)) for n in range(2)])) for k in range(3)]
        tar(tmp_path / "train.tar", inner)
        tar(tmp_path / "val.tar", [(f"val_{n}.JPEG", jpeg(n)) for n in SIX])
        (tmp_path / "val.txt").write_text("".join(f"n{(n + shift) % 3}\n" for n in SIX))
        keep(
            "devkit", ImageNetSource(*(str(tmp_path / name) for name in ("train.tar", "val.tar", "val.txt"))).identity()
        )
    assert {kind: len(each) for kind, each in found.items()} == {"cls": 2, "json": 2, "parquet": 2, "devkit": 2}


def test_a_copy_of_archives_is_the_same_source(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        webdataset(tmp_path / folder / "0.tar", [{"jpg": jpeg(n), "cls": _cls(n)} for n in SIX])
        hub(tmp_path / folder / "0.parquet", [n % 3 for n in SIX])
    for kind in (WebDatasetSource, ParquetSource):
        assert kind(str(tmp_path / "a")).identity() == kind(str(tmp_path / "b")).identity()


def test_archives_are_looked_through_once_and_again_when_they_change(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    index = tars._index
    monkeypatch.setattr(tars, "_index", lambda file, *rest: (passes.append(file.path), index(file, *rest))[1])
    path = tmp_path / "0.tar"
    webdataset(path, [{"jpg": jpeg(n), "cls": b"0"} for n in SIX])
    first = WebDatasetSource(str(path)).listing().images
    assert WebDatasetSource(str(path)).listing().images == first
    assert len(passes) == 2, "written just now: it may change again within one tick of its time"
    monkeypatch.setattr(memory, "_SETTLED_SECONDS", -60.0)
    for _ in range(3):
        assert WebDatasetSource(str(path)).listing().images == first
    assert len(passes) == 3
    webdataset(path, [{"jpg": jpeg(n), "cls": b"1"} for n in SIX])
    assert WebDatasetSource(str(path)).listing().images["label"].to_pylist() == [1] * 6
    assert len(passes) == 4
    for file in (home / "sources").iterdir():
        file.write_bytes(b"damaged")
    assert WebDatasetSource(str(path)).listing().images["label"].to_pylist() == [1] * 6


def test_files_of_one_name_in_subfolders_are_told_apart(tmp_path: Path) -> None:
    for name in ("de", "fr"):
        hub(tmp_path / name / "train-00000-of-00001.parquet", [n % 3 for n in SIX])
        webdataset(tmp_path / name / "000.tar", [{"jpg": jpeg(n), "cls": _cls(n)} for n in SIX])
    for kind in ("parquet", "webdataset"):
        listing = listed(recipe_of(kind, tmp_path, 3))
        assert len(set(listing.images["key"].to_pylist())) == 12
    assert listed(recipe_of("parquet", tmp_path, 3)).notes == ("files of 2 folders are pooled: de, fr",)


def test_a_split_whose_labels_are_hidden_is_left_out_and_told(tmp_path: Path) -> None:
    data = tmp_path / "data"
    hub(data / "train-00000-of-00001.parquet", [n % 3 for n in SIX])
    hub(data / "test-00000-of-00001.parquet", [-1] * 4)
    with pytest.raises(UserError, match=r"no image outside the training split has a label \(test\)"):
        listed(recipe_of("parquet", data, 3))
    hub(data / "validation-00000-of-00001.parquet", [n % 3 for n in range(3)])
    listing = listed(recipe_of("parquet", data, 3))
    assert labels_of(listing) == {"train": [0, 1, 2, 0, 1, 2], "test": [0, 1, 2]}
    assert listing.left_out == {"without labels (test)": 4} and not listing.refused
    hub(data / "test-00000-of-00001.parquet", [0] * 4)
    with pytest.raises(UserError, match=r"splits train \(6 images\), validation \(3\) and test \(4\), all with labels"):
        listed(recipe_of("parquet", data, 3))


def test_columns_of_parquet_are_known_by_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    hub(path, [n % 2 for n in SIX], names=None, image=[jpeg(n) for n in SIX])
    assert list(ParquetSource(str(path)).scan(str(path))) == [jpeg(n) for n in SIX]
    structs = [{"bytes": jpeg(n)} for n in SIX]
    hub(path, ["b", "a"] * 3, names=None, image=None, img=structs, thing=[b"no picture"] * 6)
    listing = listed(recipe_of("parquet", path, 2))
    assert listing.classes == ("a", "b") and labels_of(listing) == {"all": [1, 0] * 3}
    assert list(ParquetSource(str(path)).scan(str(path))) == [jpeg(n) for n in SIX]
    hub(path, [0] * 6, names=None, image=None, img=structs, other=structs)
    with pytest.raises(
        UserError, match=r"no column 'image'.*img, other could be meant: name it in data\.source\.image"
    ):
        ParquetSource(str(path)).listing()


def test_an_archive_without_a_test_split_has_a_share_set_aside(tmp_path: Path) -> None:
    inner = [(f"n{k}.tar", tar(None, [(f"n{k}_{n}.JPEG", jpeg(n)) for n in range(3)])) for k in range(2)]
    tar(tmp_path / "train.tar", inner)
    assert labels_of(listed(recipe_of("imagenet", tmp_path / "train.tar", 2))) == {"all": [0, 0, 0, 1, 1, 1]}


def test_parquet_that_only_names_its_images_is_told(tmp_path: Path) -> None:
    hub(tmp_path / "x.parquet", [0, 1], names=None, image=[{"bytes": None, "path": f"{n}.jpg"} for n in range(2)])
    with pytest.raises(UserError, match=r"column 'image' holds no encoded images \(only paths\?\)"):
        ParquetSource(str(tmp_path)).listing()


def test_shards_in_braces_are_those_of_the_range(tmp_path: Path) -> None:
    """The notation that lists of WebDataset shards are published in."""
    for number in range(12):
        webdataset(tmp_path / f"part-{number:04d}.tar", [{"jpg": jpeg(number), "cls": b"0"}])
    listing = WebDatasetSource(f"{tmp_path}/part-{{0002..0010}}.tar").listing()
    assert listing.images["key"].to_pylist() == [f"part-{number:04d}.tar/000000" for number in range(2, 11)]
    with pytest.raises(UserError, match=r"3 of 5 files of .* are not there \(such as part-0012\.tar\)"):
        WebDatasetSource(f"{tmp_path}/part-{{0010..0014}}.tar").listing()
    two = WebDatasetSource(f"{tmp_path}/part-{{0000..0001}}.tar", f"{tmp_path}/part-{{0011..0011}}.tar").listing()
    assert labels_of(two) == {"train": [0, 0], "test": [0]}
