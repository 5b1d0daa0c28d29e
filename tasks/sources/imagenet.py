"""ImageNet's own archives: a tar of one tar per class, a flat validation tar and the file with its labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePosixPath

from configs.errors import UserError
from tasks.data.rows import Rows
from tasks.sources.base import Listing, Row, identity_of_rows, listed_rows, refusal_table
from tasks.sources.files import check_there, expand, read_range
from tasks.sources.label_files import classes_of_images
from tasks.sources.names import class_order
from tasks.sources.tars import Archive, Member, archives


@dataclass(frozen=True)
class ImageNetSource:
    """A tar of one tar per class for training, a flat tar and its label file for the test split."""

    path: str
    test_path: str | None = None
    test_labels_path: str | None = None

    def check_there(self) -> None:
        check_there(self.path, self.test_path, self.test_labels_path)

    def identity(self) -> str:
        return self.listing().identity

    def listing(self) -> Listing:
        (file,) = expand(self.path, ".tar")
        (train,) = archives([file], nested=True)
        inner = {PurePosixPath(member.name).stem for member in train.members() if member.name.endswith(".tar")}
        if not inner:
            raise UserError(f"data.source.path {self.path} holds no tars: expected a tar of one tar per class")
        classes = tuple(class_order(inner))
        labels = {name: label for label, name in enumerate(classes)}
        ruled_out, left_out = Rows.of(refusal_table(train.refused())), Counter[str]()
        test = self._test_rows(labels, ruled_out) if self.test_path is not None else []
        rows = listed_rows(chain(self._train_rows(train, labels, left_out), test))
        return Listing(
            rows,
            classes,
            ruled_out,
            left_out=dict(left_out),
            identity=identity_of_rows("imagenet", rows, classes, ruled_out),
        )

    def read(self, file: str, start: int, length: int) -> bytes:
        return read_range(file, start, length)

    def _train_rows(self, train: Archive, labels: dict[str, int], left_out: Counter[str]) -> Iterator[Row]:
        split = "train" if self.test_path is not None else None
        for member in train.members():
            archive, _, name = member.name.partition("/")
            wnid = PurePosixPath(archive).stem
            if member.picture and name and wnid in labels:
                yield f"train/{wnid}/{name}", labels[wnid], split, self.path, member.start, member.length
            elif name:
                left_out["no picture"] += 1

    def _test_rows(self, labels: dict[str, int], ruled_out: Rows) -> list[Row]:
        assert self.test_path is not None and self.test_labels_path is not None
        (file,) = expand(self.test_path, ".tar")
        (archive,) = archives([file])
        members = sorted((m for m in archive.members() if m.picture), key=lambda member: member.name)
        files = [PurePosixPath(member.name).name for member in members]
        named = classes_of_images(self.test_labels_path, files, tuple(labels))
        ruled_out.add(refusal_table(archive.refused()))
        return [self._test_row(member, labels[name]) for member, name in zip(members, named, strict=True)]

    def _test_row(self, member: Member, label: int) -> Row:
        assert self.test_path is not None
        return f"test/{member.name}", label, "test", self.test_path, member.start, member.length
