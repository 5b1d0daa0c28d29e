"""What sources of several files share: naming them, their sizes, and byte ranges of them."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import UserError
from infra.storage import Storage
from tasks.data.formats import HEAD_BYTES
from tasks.sources.names import is_leftover, normal, split_in

_READERS = 16  # threads that wait for storage
_AHEAD = 8  # files that are looked through at once
_SIGNS = "*?[{"
_MOST_FILES, _DIGITS = 1_000_000, 18
"""Of a range of names: more files than any source has, and few enough to list."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class File:
    """One file of a source."""

    path: str
    """A path or URL that :func:`read_range` takes."""
    name: str
    """Below the source, in the normal form: what keys are made of."""
    size: int
    mark: str
    """Changes whenever the content may have changed; empty where the storage cannot tell."""


def expand(path: str, suffix: str) -> list[File]:
    """The files that a file's name, a folder or a glob names, in the order of their names; one listing.

    Raises:
        UserError: there are none.
    """
    if path.endswith(suffix) and not any(sign in path for sign in _SIGNS):
        return [file_at(path)]
    folder, pattern = _root_of(path, suffix)
    storage = Storage.at(folder or ".")
    wanted = _in_braces(pattern)
    found = {name: info for name, info in storage.listed().items() if name in wanted or fnmatch(name, pattern)}
    if wanted and (missing := wanted - found.keys()):
        raise UserError(
            f"data.source: {len(missing)} of {len(wanted)} files of {path} are not there (such as {min(missing)})"
        )
    found = {name: info for name, info in found.items() if not any(map(is_leftover, name.split("/")))}
    if not found:
        raise UserError(
            f"data.source: no {suffix} files at {path}; name a file, a folder or a glob such as {path}/*{suffix}"
        )
    return [
        File(_joined(folder, name), normal(name), int(info["size"]), _mark(storage, name, info))
        for name, info in sorted(found.items())
    ]


def file_at(path: str) -> File:
    """One file by its path. Raises UserError where there is none."""
    storage, name = at(path)
    try:
        info = storage.info(name)
    except FileNotFoundError:
        raise UserError(f"data.source: {path} does not exist; check its name") from None
    return File(path, normal(name), int(info["size"]), _mark(storage, name, info))


def check_there(*paths: str | None) -> None:
    """Raises UserError where one of these files, folders or globs cannot be there."""
    for path in paths:
        if path is None:
            continue
        place = _root_of(path, "")[0] if any(sign in path for sign in _SIGNS) else path
        storage, name = at(place.rstrip("/"))
        if not storage.exists(name):
            raise UserError(f"data.source: {path} does not exist; check its name")


def by_split(kind: str, train: str, test: str | None, suffix: str) -> list[tuple[str | None, File]]:
    """Every file of a source with its split: `train` and `test`, or None where nothing tells them apart.

    With one path the names tell (`train-00000-of-00001.parquet`, `validation/0001.tar`), and a third split stays
    `validation`: the caller knows which of the two has labels.

    Raises:
        UserError: the same file is in both splits, or only some names tell a split.
    """
    files = expand(train, suffix)
    if test is not None:
        held_out = expand(test, suffix)
        both = {file.path for file in files} & {file.path for file in held_out}
        if both:
            raise UserError(
                f"data.source: {min(both)} is named by both path and test_path ({len(both)} files are): name training "
                "files in the one and others in the other"
            )
        return [*(("train", file) for file in files), *(("test", file) for file in held_out)]
    told = [split_in(file.name) for file in files]
    if len(set(told)) == 1:  # all of one split, which is the whole of it as far as this recipe goes
        return [(None, file) for file in files]
    loose = [file.name for file, split in zip(files, told, strict=True) if split is None]
    if loose:
        seen = ", ".join(sorted({split for split in told if split}))
        raise UserError(
            f"data.source.path {train}: names of files tell the splits {seen}, but not that of {loose[0]} "
            f"({len(loose)} files): name the training files in path and the others in test_path"
        )
    if "train" not in told:
        raise UserError(
            f"data.source.path {train} holds the splits {', '.join(sorted(set(map(str, told))))} and no training "
            "files: name the training files in path and the others in test_path"
        )
    splits: list[str | None] = list(told)
    if len(set(told)) == 2:
        splits = ["train" if split == "train" else "test" for split in told]
    return list(zip(splits, files, strict=True))


def in_turn(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What `work` gives for each item, in their order; a few are on their way in threads."""
    with ThreadPoolExecutor(_AHEAD) as threads:
        ahead: deque[Future[R]] = deque()
        for item in items:
            ahead.append(threads.submit(work, item))
            if len(ahead) > _AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def read_range(path: str, start: int, length: int) -> bytes:
    storage, name = at(path)
    return storage.read_range(name, start, length)


def read_heads(storage: Storage, names: Sequence[str]) -> Mapping[str, bytes]:
    """How these files begin; empty where one cannot be read."""

    def head(name: str) -> bytes:
        try:
            return storage.read_range(name, 0, HEAD_BYTES)
        except (OSError, UserError):
            return b""

    if not names:
        return {}
    with ThreadPoolExecutor(_READERS) as readers:
        return dict(zip(names, readers.map(head, names), strict=True))


@lru_cache(maxsize=4096)
def at(path: str) -> tuple[Storage, str]:
    """Storage of the folder that a file is in, and its name there."""
    folder, _, name = path.rpartition("/")
    return Storage.at(folder or ("/" if path.startswith("/") else ".")), name


def _root_of(path: str, suffix: str) -> tuple[str, str]:
    """The folder to list and the pattern below it."""
    if not any(sign in path for sign in _SIGNS):
        return path.rstrip("/") or "/", f"*{suffix}"
    parts = path.split("/")
    first = next(number for number, part in enumerate(parts) if any(sign in part for sign in _SIGNS))
    return "/".join(parts[:first]) or ("/" if path.startswith("/") else ""), "/".join(parts[first:])


def _in_braces(pattern: str) -> set[str]:
    """Names of shards written as `part-{0000..0146}.tar`; empty where a pattern has no such range."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    if len(parts) != 4:
        return set()
    before, first, last, after = parts
    if len(last) > _DIGITS or len(first) > _DIGITS or int(last) - int(first) >= _MOST_FILES:
        raise UserError(f"data.source: {pattern} names more than {_MOST_FILES:,} files, and at most so many are listed")
    return {f"{before}{number:0{len(first)}d}{after}" for number in range(int(first), int(last) + 1)}


def _joined(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if folder else name


def _mark(storage: Storage, name: str, info: Mapping[str, Any]) -> str:
    if storage.local:
        found = Path(storage.locate(name)).stat()
        return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
    known = [str(info[key]) for key in ("ETag", "etag", "LastModified", "updated", "md5Hash") if info.get(key)]
    return " ".join([str(info.get("size")), *known]) if known else ""
