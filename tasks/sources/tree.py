"""One tree of class folders as it was found: which files are pictures, which folders are classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import compress

import pyarrow as pa
import pyarrow.compute as pc

from infra.storage import Storage
from tasks.data import formats
from tasks.data.rows import Rows, in_order, sized
from tasks.sources import names
from tasks.sources.base import REFUSALS, Refusal, refusal_table
from tasks.sources.files import read_heads
from tasks.sources.walk import AT_ONCE, FILES, Found

_SORTED = FILES.append(pa.field("picture", pa.bool_()))
_TWINS = "two files whose names differ only in their form"


class Tree:
    """Names are below its root and in their normal form; what is told of files comes in the order of names."""

    def __init__(self, root: str, found: Found, flat: bool = False) -> None:
        """flat: folders are no classes; all pictures count, wherever they lie."""
        self.root, self.flat = root, flat
        self.refused, self.left_out = found.refused, found.left_out
        self.classes: list[str] = []
        self._deeper, self._files, self._loose = found.folders, Rows(_SORTED), Rows(REFUSALS)
        without = self._sort_out(found.files)
        self._strays = set() if flat else without  # such as annotations beside the classes
        if flat:
            return
        self.classes = names.class_order(self._deeper.keys() - self._strays)
        self.left_out.update({f"folder without pictures ({name})": 1 for name in sorted(self._strays)})
        if self.classes:
            for chunk in self._loose.chunks():
                self.refused.add(chunk)

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Of every file in a place where an image could be."""
        for key, _, size, _ in self._rows():
            if key.partition("/")[0] not in self._strays:
                yield key, size

    def images(self) -> Iterator[tuple[str, str, int]]:
        """Name, name on disk, and size."""
        return ((key, name, size) for key, name, size, picture in self._rows() if picture)

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
        """Keep one file of each name, and whether it is a picture; folders at the top with files, but no pictures."""
        storage, before = Storage.at(self.root), None
        with_files, with_pictures = set[str](), set[str]()
        for some in sized(in_order(found, "key", "name"), AT_ONCE):
            keys = some["key"].to_pylist()
            again = [key == earlier for key, earlier in zip(keys, [before, *keys], strict=False)]
            before = keys[-1]
            if any(again):
                twice = [Refusal(key, "key listed twice", _TWINS) for key in compress(keys, again)]
                self.refused.add(refusal_table(twice))
                some = some.filter(pc.invert(pa.array(again)))
            pictures = self._are_pictures(storage, *(some[name].to_pylist() for name in FILES.names))
            self._files.add(some.append_column(_SORTED.field("picture"), pa.array(pictures, pa.bool_())))
            with_files |= _tops(keys)
            with_pictures |= _tops(compress(some["key"].to_pylist(), pictures))
        for chunk in self.refused.chunks():
            with_pictures |= _tops(chunk["key"].to_pylist())
        return with_files - with_pictures

    def _are_pictures(self, storage: Storage, keys: list[str], on_disk: list[str], sizes: list[int]) -> list[bool]:
        """By their names, and where those do not tell, by how they begin; refuse what only seems to be one."""
        suffixes = list(map(formats.suffix, keys))
        heads = read_heads(storage, [name for name, *of in zip(on_disk, suffixes, sizes, strict=True) if _unclear(*of)])
        refused, loose, pictures = [], [], []
        for key, name, suffix in zip(keys, on_disk, suffixes, strict=True):
            head = heads.get(name, b"")
            instead = formats.unreadable(suffix) or (formats.what_instead(head) if head else None)
            seems = suffix in formats.PICTURES or (suffix not in formats.OTHERS and formats.looks_like_picture(head))
            outside = not self.flat and "/" not in key
            if not seems:
                self.left_out[f"no picture (.{suffix})" if suffix else "no picture"] += 1
            elif instead is not None:
                refused.append(Refusal(key, *instead))
            elif outside:
                loose.append(Refusal(key, "not in a class folder"))
            pictures.append(seems and instead is None and not outside)
        self.refused.add(refusal_table(refused))
        self._loose.add(refusal_table(loose))
        return pictures

    def _rows(self) -> Iterator[tuple[str, str, int, bool]]:
        for some in sized(self._files.chunks(), AT_ONCE):
            yield from zip(*(some[name].to_pylist() for name in _SORTED.names), strict=True)


def _unclear(suffix: str, size: int) -> bool:
    """Whether it takes a look into a file to tell what it is."""
    if suffix in formats.PICTURES:
        return 0 < size <= formats.POINTER_BYTES
    return suffix not in formats.OTHERS


def _tops(keys: Iterable[str]) -> set[str]:
    """Folders at the top in which these files are."""
    return {top for top, slash, _ in (key.partition("/") for key in keys) if slash}
