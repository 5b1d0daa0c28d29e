"""Folders of class folders, local or at any fsspec URL: the folder's name is the class, all below it its images.

A test split may also lie in one folder, as ImageNet's does, with a file that has its labels.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import UserError
from infra.storage import Storage
from tasks.data import formats
from tasks.data.rows import Rows
from tasks.sources import names
from tasks.sources.base import Listing, Refusal, Row, identity_of, listed_rows, refusal_table
from tasks.sources.files import check_there, read_heads
from tasks.sources.label_files import as_pairs, classes_of_images

_MISSING = -1
"""Instead of a size: the file is a link to nothing."""


@dataclass(frozen=True)
class FolderSource:
    """One tree, or one per split. Class names sort to labels (numbers by value); what systems leave is ignored."""

    path: str
    test_path: str | None = None
    test_labels_path: str | None = None
    """Says of which class the images of a flat `test_path` are (see `label_files`)."""

    def check_there(self) -> None:
        check_there(self.path, self.test_path, self.test_labels_path)

    def identity(self) -> str:
        return self.listing().identity

    def listing(self) -> Listing:
        self._check_apart()
        flat = self.test_labels_path is not None
        trees = [(prefix, root, _tree(root, flat and prefix == "test/")) for prefix, root in self._trees()]
        classes = trees[0][2].classes
        faults = list(trees[0][2].shape_faults("data.source.path"))
        named: dict[str, str] = {}
        for _, _, tree in trees[1:]:
            if flat:
                named = self._flat(tree, classes) if classes else {}
            else:
                faults += tree.shape_faults("data.source.test_path")
                faults += self._strangers(tree, classes)
        labels = {name: label for label, name in enumerate(classes)}
        rows: list[Row] = []
        refused: list[Refusal] = []
        left_out: Counter[str] = Counter()
        for number, (prefix, _, tree) in enumerate(trees):
            left_out += tree.left_out
            refused += [Refusal(prefix + one.key, one.reason, one.detail) for one in tree.refused]
            of = named if number and flat else {name: name.split("/")[0] for name in tree.images}
            rows += [
                (prefix + name, labels[of[name]], prefix.rstrip("/") or None, f"{number}/{real}", 0, size)
                for name, (real, size) in tree.images.items()
                if of.get(name) in labels
            ]
        return Listing(
            listed_rows(rows),
            tuple(classes),
            Rows.of(refusal_table(refused)),
            notes=trees[0][2].notes(),
            left_out=dict(left_out),
            faults=tuple(faults),
            identity=self._identity(trees, classes, named),
        )

    def read(self, file: str, start: int, length: int) -> bytes:
        tree, _, name = file.partition("/")
        _, root = self._trees()[int(tree)]
        return Storage.at(root).read_range(name, 0, length)

    def _trees(self) -> list[tuple[str, str]]:
        if self.test_path is None:
            return [("", self.path)]
        return [("train/", self.path), ("test/", self.test_path)]

    def _flat(self, tree: _Tree, classes: list[str]) -> dict[str, str]:
        """The class of each image of a flat test split. What cannot be an image counts where lines go by order."""
        assert self.test_labels_path is not None
        names_ = sorted([*tree.images, *(one.key for one in tree.refused)])
        found = classes_of_images(self.test_labels_path, [name.rpartition("/")[2] for name in names_], classes)
        return dict(zip(names_, found, strict=True))

    def _identity(self, trees: list[tuple[str, str, _Tree]], classes: list[str], named: dict[str, str]) -> str:
        """A hash of names and sizes, of the labels of a flat split, and of the classes' order where it is not that of
        their characters."""
        found = as_pairs({f"test/{name}": label for name, label in named.items()})
        for prefix, _, tree in trees:
            found += [(prefix + name, size) for name, size in tree.sizes.items()]
            found += [(prefix + name, "folder") for name in tree.classes]
        if classes != sorted(classes):
            found += [(f"label {label}", name) for label, name in enumerate(classes)]
        return identity_of("folder", found)

    def _check_apart(self) -> None:
        if self.test_path is None:
            return
        train, test = (_real(Storage.at(root)) + "/" for root in (self.path, self.test_path))
        if train.startswith(test) or test.startswith(train):
            raise UserError(
                f"data.source: path {self.path} and test_path {self.test_path} hold the same images: name two trees "
                "beside each other, or leave test_path out to have shard.test_share of the first set aside"
            )

    def _strangers(self, tree: _Tree, classes: list[str]) -> list[str]:
        unknown = sorted(set(tree.classes) - set(classes))
        if not unknown:
            return []
        return [
            f"data.source.test_path {tree.root}: classes {unknown[:5]} are not among those of {self.path}: name the "
            "test tree of the same classes"
        ]


@dataclass
class _Tree:
    """One tree as it was found, names below its root and in their normal form."""

    root: str
    sizes: dict[str, int] = field(default_factory=dict)
    """Of every file in a place where an image could be."""
    images: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Name on disk and size, by name."""
    classes: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    loose: int = 0
    """Pictures that are in no class folder."""
    deeper: dict[str, set[str]] = field(default_factory=dict)
    """Folders within each class folder."""

    def notes(self) -> tuple[str, ...]:
        """Where the only class holds folders: whether those were meant."""
        inner = sorted(self.deeper[self.classes[0]]) if len(self.classes) == 1 else []
        if len(inner) < 2:
            return ()
        return (
            f"the one class {self.classes[0]!r} holds {len(inner)} folders ({', '.join(inner[:3])}, …): if these are "
            f"the classes, set data.source.path to {self.root.rstrip('/')}/{self.classes[0]}",
        )

    def shape_faults(self, option: str) -> Iterator[str]:
        """Trees that are no folder of class folders, and what was probably meant."""
        if self.loose and not self.classes:
            yield (
                f"{option} {self.root} holds {self.loose} images and no class folders, so their classes cannot be "
                "told: "
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
        elif names.are_splits(self.classes) and (len(self.classes) > 1 or self.deeper[self.classes[0]]):
            yield (
                f"{option} {self.root} holds the splits {', '.join(self.classes)}, not classes: name the training "
                "tree in path and the other in test_path"
            )


def _tree(root: str, flat: bool = False) -> _Tree:
    """Everything below `root`, in one listing, and the heads of the few files whose names do not tell what they are.

    flat: folders are no classes; all pictures count, wherever they lie.
    """
    tree, storage = _Tree(root), Storage.at(root)
    real: dict[str, str] = {}
    folders: set[str] = set()
    for name, size in _entries(storage, tree.left_out):
        key = names.normal(name)
        if size is None:
            folders.add(key)
        elif _printable(key) != key:
            tree.refused.append(Refusal(_printable(key), "name is not UTF-8"))
        elif size == _MISSING:
            tree.refused.append(Refusal(key, "link to nothing", "the linked file is not there: fetch it"))
            folders.add(key.rpartition("/")[0])
        elif key in real:
            tree.refused.append(Refusal(key, "key listed twice", "two files whose names differ only in their form"))
        else:
            real[key], tree.sizes[key] = name, size
    _sort_out(tree, storage, real)
    if flat:
        return tree
    tree.deeper = _deeper(folders | {key.rpartition("/")[0] for key in real})
    with_images = {name.split("/")[0] for name in [*tree.images, *(one.key for one in tree.refused)] if "/" in name}
    with_files = {name.split("/")[0] for name in real if "/" in name}
    strays = with_files - with_images  # such as annotations beside the classes
    tree.classes = names.class_order(set(tree.deeper) - strays)
    tree.left_out.update({f"folder without pictures ({name})": 1 for name in sorted(strays)})
    tree.sizes = {name: size for name, size in tree.sizes.items() if name.split("/")[0] not in strays}
    for name in [name for name in tree.images if "/" not in name]:
        del tree.images[name]
        tree.loose += 1
        if tree.classes:
            tree.refused.append(Refusal(name, "not in a class folder"))
    return tree


def _sort_out(tree: _Tree, storage: Storage, real: dict[str, str]) -> None:
    """Which files are pictures: by their names, and where those do not tell, by how they begin."""
    suffixes = {key: formats.suffix(key) for key in real}
    tiny = [k for k, s in suffixes.items() if s in formats.PICTURES and 0 < tree.sizes[k] <= formats.POINTER_BYTES]
    unknown = [k for k, s in suffixes.items() if s not in formats.PICTURES and s not in formats.OTHERS]
    heads = read_heads(storage, [real[key] for key in (*tiny, *unknown)])
    for key, suffix in suffixes.items():
        head = heads.get(real[key])
        instead = formats.unreadable(suffix) or (formats.what_instead(head) if head else None)
        if suffix in formats.OTHERS or (suffix not in formats.PICTURES and not formats.looks_like_picture(head or b"")):
            tree.left_out[f"no picture (.{suffix})" if suffix else "no picture"] += 1
        elif instead is not None:
            tree.refused.append(Refusal(key, *instead))
        else:
            tree.images[key] = (real[key], tree.sizes[key])


def _deeper(folders: set[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for folder in folders:
        parts = folder.split("/")
        if parts[0]:
            found[parts[0]].update(parts[1:2])
    return dict(found)


def _entries(storage: Storage, left_out: Counter[str]) -> Iterator[tuple[str, int | None]]:
    """(name, size) of every file below a storage, in sorted order; folders have None for a size.

    Raises:
        UserError: there is nothing there, or a part of it cannot be read.
    """
    if storage.local:
        if not Path(storage.path).is_dir():
            raise UserError(
                f"data.source: folder {storage.path} does not exist or is no folder; check data.source.path"
            )
        unreadable: list[str] = []
        yield from sorted(_walk(storage.path, "", (_real(storage),), left_out, unreadable), key=lambda pair: pair[0])
        if unreadable:
            raise UserError(
                f"data.source: {len(unreadable)} folders in {storage.path} cannot be read (such as {unreadable[0]!r}): "
                "check their permissions"
            )
        return
    listed = storage.listed()
    if not listed:
        raise UserError(f"data.source: there is nothing at {storage.url}; check data.source.path")
    above = {name[:at] for name in listed for at in range(len(name)) if name[at] == "/"}
    for name, info in sorted(listed.items()):
        marker = name.strip("/") in above or name.endswith("/") or info.get("type") == "directory" or not name
        if any(map(names.is_leftover, name.split("/"))):
            left_out["system leftovers"] += 1
        elif marker:  # an empty object that stands for a folder
            if name.strip("/"):
                yield name.strip("/"), None
        else:
            yield name, int(info["size"])


def _walk(
    folder: str, prefix: str, above: tuple[str, ...], left_out: Counter[str], unreadable: list[str]
) -> Iterator[tuple[str, int | None]]:
    """Files below a local folder with their sizes, and its folders with None.

    Links are followed, as trees of links are a common way to pick a subset; one that leads back to a folder it
    lies in is not.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        unreadable.append(prefix.rstrip("/") or ".")
        return
    for entry in entries:
        name = prefix + entry.name
        if names.is_leftover(entry.name):
            left_out["system leftovers"] += 1
        elif entry.is_dir():
            real = os.path.realpath(entry.path)
            if real in above:
                left_out["link to a folder above itself"] += 1
                continue
            yield name, None
            yield from _walk(entry.path, name + "/", (*above, real), left_out, unreadable)
        elif entry.is_file():
            yield name, entry.stat().st_size
        elif entry.is_symlink() and not os.path.exists(entry.path):
            yield name, _MISSING
        else:
            left_out["not a regular file"] += 1


def _real(storage: Storage) -> str:
    return os.path.realpath(storage.path) if storage.local else storage.url


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
