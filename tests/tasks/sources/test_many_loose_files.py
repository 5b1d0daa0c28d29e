"""Loose files and lists of them: the same listing as ever, in memory that does not grow."""

from __future__ import annotations

import os
import random
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from configs import UserError
from infra import outages, storage
from infra.storage import Storage
from tasks.data import rows
from tasks.sources import base, csv_file, tree
from tasks.sources.base import Listing, Refusal
from tasks.sources.csv_file import CsvSource
from tasks.sources.folder import FolderSource
from tests.helpers.failing_s3 import FailingS3
from tests.helpers.memory import peak_bytes

PICTURE = b"\xff\xd8\xff".ljust(300)


def _few_at_once(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(rows, "HELD_BYTES", 100 * count)
    monkeypatch.setattr(rows, "_SAMPLED", 100)
    monkeypatch.setattr(rows, "AT_ONCE", 2 * count)
    for module in (rows, tree):
        monkeypatch.setattr(module, "AS_OBJECTS", count)
    monkeypatch.setattr(csv_file, "_BLOCK", 10 * count)


@pytest.fixture(params=["in memory", "on disk"])
def bounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "on disk":
        _few_at_once(monkeypatch, 2)


def _pile(root: Path) -> Path:
    """Numbers as classes, one name in two forms, a link to nothing, a page, a folder of no pictures."""
    twins = [f"2/{unicodedata.normalize(form, 'é.jpg')}" for form in ("NFC", "NFD")]
    pictures = ["2/0.jpg", "2/1.jpg", "10/0.jpg", "10/größer/1.jpg", "10/10/2.jpg", "loose.jpg", *twins]
    others = ["notes/a.txt", "notes/b.json", "2/Thumbs.db", "10/page.jpg", "10/unknown"]
    for name in (*pictures, *others):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PICTURE if name in pictures else b"<html>")
    (root / twins[1]).write_bytes(PICTURE + b"NFD")
    (root / "2" / "gone.jpg").symlink_to("/nowhere.jpg")
    return root


PAGE = Refusal("10/page.jpg", "HTML page", "a download was answered by a page: fetch the image again")
TWICE = Refusal("2/é.jpg", "key listed twice", "two files whose names differ only in their form")
GONE = Refusal("2/gone.jpg", "link to nothing", "the linked file is not there: fetch it")
LOOSE = Refusal("loose.jpg", "not in a class folder")


def _is_the_pile(found: Listing, refused: tuple[Refusal, ...] = (PAGE, GONE, TWICE, LOOSE)) -> None:
    """As it was before listings were streamed."""
    assert found.identity == "46afc221bbb77600b070bb8b9d48842b"
    assert found.classes == ("2", "10")
    keys = {row["key"]: (row["label"], row["length"]) for row in found.images.to_pylist()}
    picture, larger = len(PICTURE), len(PICTURE) + 3  # of the twins the first on disk is decomposed
    assert keys == {
        "2/0.jpg": (0, picture), "2/1.jpg": (0, picture), "2/é.jpg": (0, larger), "10/0.jpg": (1, picture),
        "10/größer/1.jpg": (1, picture), "10/10/2.jpg": (1, picture),
    }  # fmt: skip
    assert found.refused == refused
    assert list(found.left_out.items()) == [
        ("system leftovers", 1), ("no picture", 1), ("no picture (.txt)", 1), ("no picture (.json)", 1),
        ("folder without pictures (notes)", 1),
    ]  # fmt: skip


def test_a_tree_is_what_it_was(tmp_path: Path, bounds: None) -> None:
    _is_the_pile(FolderSource(str(_pile(tmp_path))).listing())


@pytest.mark.parametrize("seed", range(3))
def test_a_tree_is_the_same_in_whatever_order_a_disk_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    scandir = os.scandir

    @contextmanager
    def shuffled(path: str) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        yield random.Random(seed).sample(found, len(found))

    monkeypatch.setattr(os, "scandir", shuffled)
    _is_the_pile(FolderSource(str(_pile(tmp_path))).listing())


def test_a_list_is_what_it_was(tmp_path: Path, bounds: None) -> None:
    _pile(tmp_path)
    lines = ["2/0.jpg,2,train", "10/0.jpg,10,test", "nowhere.jpg,2,", ",2,", "2/0.jpg,10,train", "2/1.jpg,-1,"]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *lines]))
    found = CsvSource(str(tmp_path / "list.csv")).listing()
    assert found.identity == "ef149a45f9a9c73ad14e7522f492bc7f"
    assert found.classes == tuple(map(str, range(11)))
    assert [(row["key"], row["label"], row["split"], row["length"]) for row in found.images.to_pylist()] == [
        ("2/0.jpg", 2, "train", 300), ("10/0.jpg", 10, "test", 300), ("2/0.jpg", 10, "train", 300),
    ]  # fmt: skip
    assert [(one.key, one.reason) for one in found.refused] == [
        ("2/1.jpg", "no label"), ("?", "no path"), ("nowhere.jpg", "no such file"),
    ]  # fmt: skip


def test_lines_find_remote_files_and_keep_their_order(bounds: None, tmp_path: Path) -> None:
    """Of two storages, in any order, twice or not there."""
    here, there = Storage.at("memory://joined/here"), Storage.at("memory://joined/there")
    (tmp_path / "own.jpg").write_bytes(b"own")
    wanted: list[tuple[str, int]] = [(str(tmp_path / "own.jpg"), 3)]
    for number in range(40):
        for place in (here, there):
            place.write_bytes(f"{number % 3}/{number}.jpg", bytes(number))
            wanted += [(f"{place.url}/{number % 3}/{number}.jpg", number)] * (number % 4)
    wanted += [(f"{there.url}/none{number}.jpg", -1) for number in range(5)]
    random.Random(0).shuffle(wanted)
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{name},0\n" for name, _ in wanted))
    found = CsvSource(str(tmp_path / "list.csv")).listing()
    assert [(row["key"], row["length"]) for row in found.images.to_pylist()] == [
        (name, size) for name, size in wanted if size >= 0
    ]
    assert {one.key for one in found.refused} == {name for name, size in wanted if size < 0}


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (b"caf\xe9.jpg,1\n", r"can't decode byte 0xe9 in position 204: invalid continuation byte"),
        (b"caf\xe2\x82", r"can't decode bytes in position 204-205: unexpected end of data"),
        (b"a.jpg,\0\n", r"it has NUL bytes"),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_what_is_no_text_is_told_with_its_place(
    bounds: None, tmp_path: Path, last: bytes, words: str, mark: bytes
) -> None:
    (tmp_path / "list.csv").write_bytes(mark + b"path,label\n" + b"000.jpg,1\n" * 19 + last)
    with pytest.raises(UserError, match=words):
        CsvSource(str(tmp_path / "list.csv")).listing()


def test_a_bucket_tells_a_few_names_at_a_time_and_again_only_those(
    tmp_path: Path, s3_root: str, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Storage.at(f"{s3_root}/pile")
    for path in _pile(tmp_path).rglob("*.*"):
        if path.is_file():
            place.upload(str(path), str(path.relative_to(tmp_path)))
    place.upload(str(tmp_path / "10" / "unknown"), "10/unknown")
    Storage.at(s3_root).write_bytes("list.csv", b"path,label\npile/2/1.jpg,0\npile/10/0.jpg,1\npile/2/0.jpg,0\n")
    monkeypatch.setattr(storage, "_NAMES_AT_ONCE", 2)
    monkeypatch.setattr(outages, "_FIRST_WAIT", 0.001)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    answered = []
    for fails in (lambda *_: False, lambda number, method, path: "list-type" in path and number % 3 == 0):
        proxy = FailingS3(s3_server["AWS_ENDPOINT_URL"], fails)
        with proxy.running() as endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            _is_the_pile(FolderSource(place.url).listing(), (PAGE, TWICE, LOOSE))
            found = CsvSource(f"{s3_root}/list.csv").listing()
            assert found.images["key"].to_pylist() == [f"pile/{name}" for name in ("2/1.jpg", "10/0.jpg", "2/0.jpg")]
        answered.append(len(proxy.listed) - proxy.failed)
    assert proxy.failed and answered[0] == answered[1] > 5


def test_other_storages_tell_the_same_in_portions() -> None:
    place = Storage.at("memory://portions")
    for name in ("a/1.jpg", "a/b/2.jpg", "c/3.jpg", "4.jpg", "5.jpg.partial"):
        place.write_bytes(name, name.encode())
    ((here, folders),) = place.top()
    below = [portion for folder in folders for portion in place.portions(folder)]
    assert folders == ["a/", "c/"] and here == {"4.jpg": 5}
    assert here | below[0] | below[1] == place.sizes()
    assert not any(map(any, Storage.at("memory://nowhere").top()))


def _folder_of(count: int, root: Path) -> FolderSource:
    """One file under many names."""
    first = root / f"{count}" / "a" / "first.jpg"
    first.parent.mkdir(parents=True)
    first.write_bytes(PICTURE)
    for number in range(1, count):
        first.with_name(f"{number:09d}.jpg").hardlink_to(first)
    return FolderSource(str(root / f"{count}"))


def _list_of(count: int, root: Path) -> CsvSource:
    _folder_of(count, root)
    lines = [f"{count}/a/{number:09d}.jpg,{number % 3},train\n" for number in range(1, count)]
    (root / f"{count}.csv").write_text("".join(["path,label,split\n", f"{count}/a/first.jpg,0,test\n", *lines]))
    return CsvSource(str(root / f"{count}.csv"))


@pytest.mark.parametrize("make", [_folder_of, _list_of])
def test_memory_does_not_grow_with_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[int, Path], FolderSource | CsvSource]
) -> None:
    _few_at_once(monkeypatch, 200)
    monkeypatch.setattr(base, "_AT_ONCE", 200)
    assert make(100, tmp_path).listing().rows.num_rows == 100  # and what is imported on the way
    few, many = (peak_bytes(make(count, tmp_path).listing) for count in (2_000, 8_000))
    assert many < 1.5 * few, "6,000 files more would be four times as much"
