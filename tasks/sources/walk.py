"""What lies below a root of loose files, listed once, in parallel.

Memory holds names of folders, never one for each file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from threading import Lock

import pyarrow as pa

from configs.errors import UserError
from infra.storage import Storage
from tasks.data.rows import Rows
from tasks.sources import names
from tasks.sources.base import REFUSALS
from tasks.sources.files import in_turn

FILES = pa.schema([("key", pa.string()), ("name", pa.string()), ("size", pa.int64())])
"""One row per file: its name in the normal form, its name on disk, and its bytes."""
_LISTED = pa.schema([("name", pa.string()), ("size", pa.int64())])
_MISSING = -1
"""Instead of a size: the file is a link to nothing."""
_Folder = tuple[str, tuple[str, ...]]
"""Its name below the root, and where it and all above it really are."""


class Found:
    """What a walk finds. Several threads add to it, and it is the same whichever comes first."""

    def __init__(self) -> None:
        self.files = Rows(FILES)
        """In no order; several may have one key."""
        self.refused = Rows(REFUSALS)
        self.folders: dict[str, set[str]] = {}
        """Names of the folders within each folder at the top, in the normal form."""
        self.unreadable: list[str] = []
        self._left_out: Counter[str] = Counter()
        self._first: dict[str, list[str]] = {}
        self._lock = Lock()

    def file(self, name: str, size: int) -> None:
        """A file by its name below the root."""
        key = names.normal(name)
        shown = _printable(key)
        with self._lock:
            if shown != key:
                self.refused.append(shown, "name is not UTF-8", "")
            elif size == _MISSING:
                fetch = "the linked file is not there: fetch it"
                self.refused.append(key, "link to nothing", fetch)
            else:
                self.files.append(key, name, size)

    def folder(self, name: str) -> None:
        """A folder by its name below the root; empty for the root."""
        top, *within = names.normal(name).split("/", 2)[:2]
        if top:
            with self._lock:
                self.folders.setdefault(top, set()).update(within)

    def leave_out(self, what: str, name: str) -> None:
        """Count what is no file of a source."""
        parts = name.split("/")
        with self._lock:
            self._left_out[what] += 1
            self._first[what] = min(self._first.get(what, parts), parts)

    @property
    def left_out(self) -> Counter[str]:
        """In the order in which each kind comes first in the tree."""
        order = sorted(self._first, key=self._first.__getitem__)
        return Counter({what: self._left_out[what] for what in order})


def walk(storage: Storage) -> Found:
    """Everything below a storage; folders are listed in parallel.

    Raises:
        UserError: there is nothing there, or a part of it cannot be read.
    """
    found = Found()
    if storage.local:
        _walk_local(storage, found)
    else:
        _walk_remote(storage, found)
    return found


def real_place(storage: Storage) -> str:
    """The root of a storage; of a local one with all links followed."""
    return os.path.realpath(storage.path) if storage.local else storage.url


def list_remote(storage: Storage, take: Callable[[Mapping[str, int]], object]) -> None:
    """Hand over names and sizes of all files of a remote storage, in portions.

    Folders at its top are listed in parallel; `take` is called by one thread at a time.
    """
    lock = Lock()

    def take_folder(folder: str) -> None:
        for sizes in storage.portions(folder):
            with lock:
                take(sizes)

    folders: list[str] = []
    for sizes, here in storage.top():
        take(sizes)
        folders += here
    for _ in in_turn(take_folder, folders):
        pass


def _walk_local(storage: Storage, found: Found) -> None:
    if not Path(storage.path).is_dir():
        raise UserError(f"data.source: folder {storage.path} does not exist or is no folder; check data.source.path")
    level: list[_Folder] = [("", (real_place(storage),))]
    while level:
        inner = in_turn(lambda folder: _look(storage.path, folder, found), level)
        level = list(chain.from_iterable(inner))
    if found.unreadable:
        first = min(found.unreadable, key=lambda name: name.split("/"))
        raise UserError(
            f"data.source: {len(found.unreadable)} folders in {storage.path} cannot be read (such "
            f"as {first!r}): check their permissions"
        )


def _look(root: str, folder: _Folder, found: Found) -> list[_Folder]:
    """The folders in a local one, after all else in it was added."""
    folder_name, above = folder
    inner: list[_Folder] = []
    try:
        with os.scandir(os.path.join(root, folder_name)) as entries:
            for entry in entries:
                name = f"{folder_name}/{entry.name}" if folder_name else entry.name
                real = _sort(entry, name, above, found)
                if real is not None:
                    inner.append((name, (*above, real)))
    except PermissionError:
        found.unreadable.append(folder_name or ".")
    return inner


def _sort(entry: os.DirEntry[str], name: str, above: tuple[str, ...], found: Found) -> str | None:
    """Add what is in a folder; of a folder to be looked into, where it really is.

    Links are followed, as trees of links are a common way to pick a subset; one that leads back to
    a folder it lies in is not.
    """
    if names.is_leftover(entry.name):
        found.leave_out("system leftovers", name)
    elif entry.is_dir():
        real = os.path.join(above[-1], entry.name)
        if entry.is_symlink():
            real = os.path.realpath(entry.path)
        if real not in above:
            found.folder(name)
            return real
        found.leave_out("link to a folder above itself", name)
    elif entry.is_file():
        found.file(name, entry.stat().st_size)
    elif entry.is_symlink() and not os.path.exists(entry.path):
        found.file(name, _MISSING)
    else:
        found.leave_out("not a regular file", name)
    return None


def _walk_remote(storage: Storage, found: Found) -> None:
    """Files of a bucket; an empty object of a folder's name stands for that folder."""
    listed, above = Rows(_LISTED), set[str]()

    def take(sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            listed.append(name, size)
            folder, slash, _ = name.rpartition("/")
            while slash and folder not in above:
                above.add(folder)
                folder, slash, _ = folder.rpartition("/")

    list_remote(storage, take)
    if not listed.num_rows and not storage.sizes():  # which finds a file of this name as well
        raise UserError(f"data.source: there is nothing at {storage.url}; check data.source.path")
    for name, size in listed.tuples():
        if any(map(names.is_leftover, name.split("/"))):
            found.leave_out("system leftovers", name)
        elif name and name.strip("/") not in above and not name.endswith("/"):
            found.file(name, size)
            found.folder(name.rpartition("/")[0])
        else:
            found.folder(name.strip("/"))


def _printable(name: str) -> str:
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()
