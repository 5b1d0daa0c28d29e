"""Folders of class folders, local or at any fsspec URL: the folder's name is the class, all below it its images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from infra.storage import Storage
from tasks.sources.base import Listing, Refusal, identity_of, listing_table

_SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}


@dataclass(frozen=True)
class FolderSource:
    """One tree, or one per split. Class names sort to labels; names that begin with a dot are ignored."""

    path: str
    test_path: str | None = None

    def identity(self) -> str:
        """A hash of names and sizes."""
        found: list[tuple[str, int | str]] = []
        for prefix, root in self._trees():
            files, folders = _files(root)
            found += [(prefix + name, size) for name, size in files]
            found += [(prefix + name, "folder") for name in folders]
        return identity_of("folder", found)

    def listing(self) -> Listing:
        rows: list[tuple[str, int, str | None, str, int, int]] = []
        refused: list[Refusal] = []
        notes: list[str] = []
        classes: list[str] = []
        for tree, (prefix, root) in enumerate(self._trees()):
            files, folders = _files(root)
            names = sorted(set(folders) | {name.split("/")[0] for name, _ in files if "/" in name})
            if not classes:
                classes = self._classes(root, names)
            unknown = sorted(set(names) - set(classes))
            if unknown:
                raise UserError(
                    f"data.source.test_path {root}: classes {unknown[:5]} are not among those of {self.path}"
                )
            labels = {name: label for label, name in enumerate(classes)}
            counts = dict.fromkeys(classes, 0)
            for name, size in files:
                key = prefix + name
                if "/" not in name:
                    refused.append(Refusal(_printable(key), "not in a class folder"))
                elif _printable(key) != key:
                    refused.append(Refusal(_printable(key), "name is not UTF-8"))
                else:
                    counts[name.split("/")[0]] += 1
                    split = prefix.rstrip("/") or None
                    rows.append((key, labels[name.split("/")[0]], split, f"{tree}/{name}", 0, size))
            notes += [f"class {name!r} has no images in {root}" for name, count in counts.items() if not count]
        return Listing(listing_table(rows), tuple(classes), tuple(refused), tuple(notes))

    def read(self, file: str, start: int, length: int) -> bytes:
        tree, _, name = file.partition("/")
        _, root = self._trees()[int(tree)]
        return Storage.at(root).read_range(name, 0, length)

    def _trees(self) -> list[tuple[str, str]]:
        if self.test_path is None:
            return [("", self.path)]
        return [("train/", self.path), ("test/", self.test_path)]

    def _classes(self, root: str, names: list[str]) -> list[str]:
        if not names:
            raise UserError(f"data.source.path {root} has no class folders: expected one folder of images per class")
        if len(names) > 1 and {name.lower() for name in names} <= _SPLIT_NAMES:
            raise UserError(
                f"data.source.path {root} holds the splits {', '.join(names)}, not classes: name the training tree "
                "in path and the other in test_path"
            )
        return names


def _files(root: str) -> tuple[list[tuple[str, int]], list[str]]:
    """(name, size) of every file below `root` in sorted order, and the names of its top folders."""
    storage = Storage.at(root)
    if storage.local:
        if not Path(storage.path).is_dir():
            raise UserError(
                f"data.source: folder {storage.path} does not exist or is no folder; check data.source.path"
            )
        found = sorted(_walk(storage.path, "", (os.path.realpath(storage.path),)))
        return [(name, size) for name, size in found if size >= 0], [name for name, size in found if size < 0]
    sizes = storage.sizes()
    if not sizes:
        raise UserError(f"data.source: there is nothing at {root}; check data.source.path")
    return sorted((name, size) for name, size in sizes.items() if not _hidden(name)), []


def _walk(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Files below a local folder, and its own folders with size -1.

    Links are followed, as trees of links are a common way to pick a subset; one that leads back to a folder it
    lies in is not.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = prefix + entry.name
            if entry.is_dir():
                real = os.path.realpath(entry.path)
                if real in above:
                    continue
                if not prefix:
                    yield name, -1
                yield from _walk(entry.path, name + "/", (*above, real))
            elif entry.is_file():
                yield name, entry.stat().st_size


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
