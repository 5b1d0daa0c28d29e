"""One tree of class folders as it was found: which files are pictures, which folders classes."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from infra.storage import Storage
from tasks.data import formats
from tasks.data.rows import AS_OBJECTS, Rows, in_order, sized, tuples
from tasks.sources import names
from tasks.sources.base import REFUSALS
from tasks.sources.files import read_heads
from tasks.sources.walk import FILES, Found

_SORTED = FILES.append(pa.field("picture", pa.bool_()))
_TWINS = "two files whose names differ only in their form"


class Tree:
    """Names are below its root and in their normal form, and files come in the order of names."""

    def __init__(self, root: str, found: Found, flat: bool = False) -> None:
        """flat: folders are no classes; all pictures count, wherever they lie."""
        self.root, self.flat = root, flat
        self.refused, self.left_out = found.refused, found.left_out
        self.classes: list[str] = []
        self._deeper, self._files, self._loose = found.folders, Rows(_SORTED), Rows(REFUSALS)
        strays = self._sort_out(found.files)  # such as annotations beside the classes
        self._strays = set() if flat else strays
        if flat:
            return
        self.classes = names.class_order(self._deeper.keys() - self._strays)
        self.left_out.update({f"folder without pictures ({name})": 1 for name in sorted(self._strays)})
        if self.classes:
            for chunk in self._loose.chunks():
                self.refused.add(chunk)

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Of every file in a place where an image could be."""
        for key, _, size, _ in self._files.tuples():
            if key.partition("/")[0] not in self._strays:
                yield key, size

    def images(self) -> Iterator[tuple[str, str, int]]:
        """Name, name on disk, and size."""
        return ((key, name, size) for key, name, size, picture in self._files.tuples() if picture)

    def all_names(self) -> list[str]:
        """Of all images in memory, those that are refused among them, sorted."""
        return sorted([*(key for key, _, _ in self.images()), *self.refused.table()["key"].to_pylist()])

    def notes(self) -> tuple[str, ...]:
        """Where the only class holds folders: whether those were meant."""
        inner = sorted(self._deeper[self.classes[0]]) if len(self.classes) == 1 else []
        if len(inner) < 2:
            return ()
        return (
            f"the one class {self.classes[0]!r} holds {len(inner)} folders ({', '.join(inner[:3])}, …): if these are "
            f"the classes, set data.source.path to {self.root.rstrip('/')}/{self.classes[0]}",
        )

    def shape_faults(self, option: str) -> Iterator[str]:
        """Trees that are no folder of class folders, and what was probably meant."""
        if self._loose.num_rows and not self.classes:
            yield (
                f"{option} {self.root} holds {self._loose.num_rows} images and no class folders, so their classes "
                "cannot be told: "
                + (
                    "name the folder above it, which has one folder of images per class"
                    if option == "data.source.path"
                    else "name the file of their labels in data.source.test_labels_path, sort them into one folder per "
                    "class, list both splits with their labels in a file and use kind: csv, or leave test_path out to "
                    "have shard.test_share of the training tree set aside"
                )
            )
        elif not self.classes:
            yield f"{option} {self.root} has no class folders: expected one folder of images per class"
        elif names.are_splits(self.classes) and (len(self.classes) > 1 or self._deeper[self.classes[0]]):
            yield (
                f"{option} {self.root} holds the splits {', '.join(self.classes)}, not classes: name the training "
                "tree in path and the other in test_path"
            )

    def _sort_out(self, found: Rows) -> set[str]:
        """Keep one file of each name, and whether it is a picture.

        Returns folders at the top with files, but no pictures.
        """
        storage, before = Storage.at(self.root), None
        tops: dict[bool, set[str]] = {False: set(), True: set()}
        for some in sized(in_order(found, "key", "name"), AS_OBJECTS):
            files = []
            for key, name, size in tuples([some]):
                if key == before:
                    self.refused.append(key, "key listed twice", _TWINS)
                else:
                    files.append((key, name, size))
                before = key
            heads = read_heads(storage, [name for key, name, size in files if _unclear(key, size)])
            for key, name, size in files:
                picture = self._is_picture(key, heads.get(name, b""))
                self._files.append(key, name, size, picture)
                tops[picture].add(_top(key))
        tops[True].update(_top(key) for key, _, _ in self.refused.tuples())
        return tops[False] - tops[True] - {""}

    def _is_picture(self, key: str, head: bytes) -> bool:
        """By its name, and where that does not tell, by how it begins.

        What only seems to be one is refused.
        """
        suffix = formats.suffix(key)
        instead = formats.unreadable(suffix) or (formats.what_instead(head) if head else None)
        known = suffix in formats.PICTURES or suffix in formats.OTHERS
        if suffix in formats.OTHERS or not (known or formats.looks_like_picture(head)):
            self.left_out[f"no picture (.{suffix})" if suffix else "no picture"] += 1
        elif instead is not None:
            self.refused.append(key, *instead)
        elif not self.flat and "/" not in key:
            self._loose.append(key, "not in a class folder", "")
        else:
            return True
        return False


def _unclear(key: str, size: int) -> bool:
    """Whether it takes a look into a file to tell what it is."""
    suffix = formats.suffix(key)
    if suffix in formats.PICTURES:
        return 0 < size <= formats.POINTER_BYTES
    return suffix not in formats.OTHERS


def _top(key: str) -> str:
    """The folder at the top that a file is in; empty where it is in none."""
    top, slash, _ = key.partition("/")
    return top if slash else ""
