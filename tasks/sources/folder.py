"""Folders of class folders, local or at any fsspec URL: the folder's name is the class, all below it its images.

A test split may also lie in one folder, as ImageNet's does, with a file that has its labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge

import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import UserError
from infra.storage import Storage
from tasks.data.rows import Rows
from tasks.sources.base import REFUSALS, Listing, Row, identity_of_sorted, listed_rows
from tasks.sources.files import check_there
from tasks.sources.label_files import as_pairs, classes_of_images
from tasks.sources.tree import Tree
from tasks.sources.walk import real_place, walk

_Trees = Sequence[tuple[str, Tree]]
"""What keys of its images begin with, and the tree."""


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
        trees = [
            (prefix, Tree(root, walk(Storage.at(root)), flat and prefix == "test/")) for prefix, root in self._roots()
        ]
        train, classes = trees[0][1], trees[0][1].classes
        faults, named = list(train.shape_faults("data.source.path")), dict[str, str]()
        for _, tree in trees[1:]:
            if flat:
                named = self._flat(tree, classes) if classes else {}
            else:
                faults += tree.shape_faults("data.source.test_path")
                faults += self._strangers(tree, classes)
        return Listing(
            listed_rows(_rows(trees, classes, named)),
            tuple(classes),
            _refused(trees),
            notes=train.notes(),
            left_out=dict(sum((tree.left_out for _, tree in trees), Counter())),
            faults=tuple(faults),
            identity=_identity(trees, classes, named),
        )

    def read(self, file: str, start: int, length: int) -> bytes:
        tree, _, name = file.partition("/")
        _, root = self._roots()[int(tree)]
        return Storage.at(root).read_range(name, 0, length)

    def _roots(self) -> list[tuple[str, str]]:
        if self.test_path is None:
            return [("", self.path)]
        return [("train/", self.path), ("test/", self.test_path)]

    def _flat(self, tree: Tree, classes: list[str]) -> dict[str, str]:
        """The class of each image of a flat test split, in memory.

        What cannot be an image counts where lines go by order.
        """
        assert self.test_labels_path is not None
        names = tree.all_names()
        found = classes_of_images(self.test_labels_path, [name.rpartition("/")[2] for name in names], classes)
        return dict(zip(names, found, strict=True))

    def _check_apart(self) -> None:
        if self.test_path is None:
            return
        train, test = (real_place(Storage.at(root)) + "/" for root in (self.path, self.test_path))
        if train.startswith(test) or test.startswith(train):
            raise UserError(
                f"data.source: path {self.path} and test_path {self.test_path} hold the same images: name two trees "
                "beside each other, or leave test_path out to have shard.test_share of the first set aside"
            )

    def _strangers(self, tree: Tree, classes: list[str]) -> list[str]:
        unknown = sorted(set(tree.classes) - set(classes))
        if not unknown:
            return []
        return [
            f"data.source.test_path {tree.root}: classes {unknown[:5]} are not among those of {self.path}: name the "
            "test tree of the same classes"
        ]


def _rows(trees: _Trees, classes: Sequence[str], named: Mapping[str, str]) -> Iterator[Row]:
    """Images whose class is known; that of one in a flat split is in `named`."""
    labels = {name: label for label, name in enumerate(classes)}
    for number, (prefix, tree) in enumerate(trees):
        split = prefix.rstrip("/") or None
        for key, name, size in tree.images():
            label = labels.get(named.get(key, "") if tree.flat else key.partition("/")[0])
            if label is not None:
                yield prefix + key, label, split, f"{number}/{name}", 0, size


def _refused(trees: _Trees) -> Rows:
    found = Rows(REFUSALS)
    for prefix, tree in trees:
        for chunk in tree.refused.chunks():
            keys = pc.binary_join_element_wise(prefix, chunk["key"], "")
            found.add(pa.table([keys, chunk["reason"], chunk["detail"]], schema=REFUSALS))
    return found


def _identity(trees: _Trees, classes: Sequence[str], named: Mapping[str, str]) -> str:
    """A hash of names and sizes, of the labels of a flat split, and of the classes' order where it
    is not that of their characters."""
    found: list[Iterable[tuple[str, int | str]]] = [_below("test/", sorted(as_pairs(named)))]
    for prefix, tree in trees:
        found += [_below(prefix, tree.sizes()), _below(prefix, ((name, "folder") for name in sorted(tree.classes)))]
    if classes != sorted(classes):
        found.append(sorted((f"label {label}", name) for label, name in enumerate(classes)))
    return identity_of_sorted("folder", merge(*found, key=lambda pair: (pair[0], str(pair[1]))))


def _below(prefix: str, pairs: Iterable[tuple[str, int | str]]) -> Iterator[tuple[str, int | str]]:
    return ((prefix + name, what) for name, what in pairs)
