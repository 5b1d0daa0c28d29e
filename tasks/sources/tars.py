"""Images inside tar archives, listed from the headers and read by byte range: nothing is ever unpacked to disk.

ImageNet's archives (a tar of per-class tars, a flat validation tar) and WebDataset tars differ only in how a
member's name gives its label.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from configs.errors import UserError
from infra.storage import Storage
from tasks.sources.base import Listing, Refusal, identity_of, listing_table
from tasks.sources.files import expand, read_range, sizes_of

Row = tuple[str, int, str | None, str, int, int]


@dataclass(frozen=True)
class Member:
    """A regular file in an archive, as a byte range of the outermost one."""

    name: str
    start: int
    length: int


@dataclass(frozen=True)
class ImageNetSource:
    """A tar of one tar per class for training, a flat tar and its label file for the test split."""

    path: str
    test_path: str | None = None
    test_labels_path: str | None = None

    def identity(self) -> str:
        chosen = [path for path in (self.path, self.test_path, self.test_labels_path) if path]
        return identity_of("imagenet", [(PurePosixPath(path).name, sizes_of([path])[path]) for path in chosen])

    def listing(self) -> Listing:
        members, refused = _members(self.path)
        inner = {PurePosixPath(m.name).stem: m for m in members if m.name.endswith(".tar")}
        if not inner:
            raise UserError(f"data.source.path {self.path} holds no tars: expected a tar of one tar per class")
        classes = tuple(sorted(inner))
        rows: list[Row] = []
        notes = []
        for label, name in enumerate(classes):
            images, bad = _members(self.path, inner[name])
            refused += bad
            rows += [(f"train/{name}/{m.name}", label, "train", self.path, m.start, m.length) for m in images]
            notes += [] if images else [f"class {name!r} has no images in {self.path}"]
        if self.test_path is not None:
            rows += self._test_rows({name: label for label, name in enumerate(classes)}, refused)
        return Listing(listing_table(rows), classes, tuple(refused), tuple(notes))

    def read(self, file: str, start: int, length: int) -> bytes:
        return read_range(file, start, length)

    def _test_rows(self, labels: dict[str, int], refused: list[Refusal]) -> list[Row]:
        assert self.test_path is not None and self.test_labels_path is not None
        members, bad = _members(self.test_path)
        members.sort(key=lambda member: member.name)
        names = _class_of_each(self.test_labels_path, [PurePosixPath(m.name).name for m in members])
        unknown = sorted(set(names) - set(labels))
        if unknown:
            raise UserError(
                f"data.source.test_labels_path {self.test_labels_path}: {unknown[0]!r} is not a class of the training "
                f"archive (such as {next(iter(labels))!r}); give class names, not numbers"
            )
        refused += bad
        return [
            (f"test/{m.name}", labels[name], "test", self.test_path, m.start, m.length)
            for m, name in zip(members, names, strict=True)
        ]


@dataclass(frozen=True)
class WebDatasetSource:
    """Tars in which files of one name, up to the first dot of the last part, form a sample."""

    path: str
    test_path: str | None = None

    def identity(self) -> str:
        found = {
            f"{split}/{PurePosixPath(t).name}": n for split, tars in self._tars() for t, n in sizes_of(tars).items()
        }
        return identity_of("webdataset", found)

    def listing(self) -> Listing:
        rows: list[Row] = []
        refused: list[Refusal] = []
        for split, tars in self._tars():
            for tar in tars:
                members, bad = _members(tar)
                refused += bad
                for row in _samples(members, tar, split if self.test_path else None):
                    refused.append(row) if isinstance(row, Refusal) else rows.append(row)
        classes = tuple(str(label) for label in range(1 + max((row[1] for row in rows), default=-1)))
        return Listing(listing_table(rows), classes, tuple(refused))

    def read(self, file: str, start: int, length: int) -> bytes:
        return read_range(file, start, length)

    def _tars(self) -> list[tuple[str, list[str]]]:
        found = [("train", expand(self.path, ".tar"))]
        return found if self.test_path is None else [*found, ("test", expand(self.test_path, ".tar"))]


def _samples(members: list[Member], tar: str, split: str | None) -> Iterator[Row | Refusal]:
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        path = PurePosixPath(member.name)
        stem, _, extension = path.name.partition(".")
        samples.setdefault(str(path.parent / stem), {})[extension.lower()] = member
    for name, parts in samples.items():
        key = f"{PurePosixPath(tar).name}/{name}"
        image = next((m for kind, m in parts.items() if kind not in ("cls", "json", "txt")), None)
        if image is None or "cls" not in parts:
            yield Refusal(key, "no image in the sample" if image is None else "no .cls label in the sample")
            continue
        text = read_range(tar, parts["cls"].start, min(parts["cls"].length, 64)).decode(errors="replace").strip()
        if not text.isdigit():
            yield Refusal(key, "label is not a number", text)
            continue
        yield key, int(text), split, tar, image.start, image.length


def _members(path: str, inside: Member | None = None) -> tuple[list[Member], list[Refusal]]:
    """Regular files of a tar, or of a tar within it; names that lead elsewhere and special files are refused."""
    folder, _, name = path.rpartition("/")
    members: list[Member] = []
    refused: list[Refusal] = []
    offset = inside.start if inside else 0
    try:
        with Storage.at(folder or ".").open(name) as whole:
            file: Any = whole if inside is None else _Window(whole, inside.start, inside.length)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    parts = PurePosixPath(member.name).parts
                    key = f"{name}/{member.name}".encode("utf-8", "backslashreplace").decode()
                    if member.isdir() or (parts[-1:] and parts[-1].startswith(".")):
                        continue
                    if not member.isreg() or member.issparse():
                        refused.append(Refusal(key, "not a regular file in its archive"))
                    elif member.name.startswith("/") or ".." in parts:
                        refused.append(Refusal(key, "unsafe path in its archive"))
                    else:
                        clean = str(PurePosixPath(member.name)).encode("utf-8", "backslashreplace").decode()
                        members.append(Member(clean, offset + member.offset_data, member.size))
    except FileNotFoundError:
        raise UserError(f"data.source: {path} does not exist") from None
    except (tarfile.TarError, EOFError) as error:
        within = f" (in its member {inside.name})" if inside else ""
        raise UserError(
            f"data.source: {path}{within} is not a whole, uncompressed tar ({error}); decompress or fetch it again"
        ) from None
    return members, refused


class _Window(io.RawIOBase):
    """A byte range of a file, as a file."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        data: bytes = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


def _class_of_each(path: str, names: list[str]) -> list[str]:
    """Class names of files in their order, from lines of `name class`, or of one class each."""
    folder, _, name = path.rpartition("/")
    try:
        text = Storage.at(folder or ".").read_bytes(name).decode()
    except FileNotFoundError:
        raise UserError(f"data.source.test_labels_path {path} does not exist") from None
    lines = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
    if lines and len(lines[0]) == 1 and len(lines) == len(names):
        return [words[0] for words in lines]
    table = {PurePosixPath(words[0]).stem: words[1] for words in lines if len(words) > 1}
    missing = [name for name in names if PurePosixPath(name).stem not in table]
    if missing:
        raise UserError(
            f"data.source.test_labels_path {path} has no class for {missing[0]} and {len(missing) - 1} more"
        )
    return [table[PurePosixPath(name).stem] for name in names]
