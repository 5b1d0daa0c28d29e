"""Opening an artifact's parts, remote ones with a copy on local disk.

The copies are of bounded size together: the least recently used goes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any

from configs.errors import UserError
from infra.artifacts import Artifact
from infra.home import home
from infra.storage import FileEntry

_LOCK = ".lock"
_FETCHING = Lock()
"""One part at a time in a process's memory."""


def open_part(artifact: Artifact, entry: FileEntry, limit_bytes: int = 0) -> Any:
    """A part of the size that the manifest says, for reading: a local file is a `FileIO`.

    limit_bytes: keep copies of remote parts, together up to this size.

    Raises FileNotFoundError, EOFError where a local file is of another size, and as :func:`fetch`.
    """
    storage = artifact.storage
    if copy := copy_path(artifact, entry, limit_bytes):
        with _FETCHING:
            return fetch(artifact, entry, copy, limit_bytes)
    if not storage.local:  # of another size, it has no footer where it is looked for
        options = {"cache_type": "none", "size": entry.bytes}
        return storage.fs.open(storage.locate(entry.path), "rb", **options)
    file = FileIO(storage.locate(entry.path))
    if (size := os.fstat(file.fileno()).st_size) != entry.bytes:
        file.close()
        raise EOFError(f"{size} bytes, the manifest says {entry.bytes}")
    return file


def copy_path(artifact: Artifact, entry: FileEntry, limit_bytes: int) -> Path | None:
    """Where a part's copy is or will be; None where it is read in place."""
    copied = not artifact.storage.local and entry.bytes <= limit_bytes
    return home() / "cache" / copy_name(entry) if copied else None


def copy_name(entry: FileEntry) -> str:
    """Copies are named by their content, so several processes and artifacts share a folder."""
    return f"{entry.sha256}{Path(entry.path).suffix}"


def fetch(artifact: Artifact, entry: FileEntry, copy: Path, limit_bytes: int) -> FileIO:
    """A part's copy, open; fetched and checked against the manifest's hash if it is not there.

    What does not fit beside it is evicted first: the folder never holds more than `limit_bytes`,
    which must be enough for this part. Of several threads or processes that want the same part, one
    fetches it. Raises UserError where the remote file is not the manifest's.
    """
    if file := _opened(copy, entry):
        return file
    copy.parent.mkdir(parents=True, exist_ok=True)
    with _locked(copy.parent / f"{entry.sha256[:2]}{_LOCK}"):
        if file := _opened(copy, entry):  # another one was faster
            return file
        data = artifact.storage.read_bytes(entry.path)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise UserError(
                f"{artifact.uri}/{entry.path} is damaged (its hash is not the manifest's); "
                f"run the flow again with --force {artifact.stage}"
            )
        with _locked(copy.parent / f"room{_LOCK}"):
            _make_room(copy.parent, limit_bytes - len(data))
            (partial := copy.with_suffix(".partial")).write_bytes(data)
            file = FileIO(partial)  # before another process can evict it
            partial.replace(copy)
            return file


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock that is held by one thread of one process, and ends with it."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _opened(copy: Path, entry: FileEntry) -> FileIO | None:
    """A whole copy; open, it stays readable when it is evicted."""
    try:
        file = FileIO(copy)
    except FileNotFoundError:
        return None
    status = os.fstat(file.fileno())
    if status.st_size != entry.bytes:
        file.close()
        return None
    os.utime(file.fileno(), ns=(time.time_ns(), status.st_mtime_ns))  # used, but not changed
    return file


def _make_room(folder: Path, bytes_left: int) -> None:
    """Evict the least recently used; what a process has open lives on until it lets go."""
    files = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # a damaged copy is deleted without asking
            if path.suffix != _LOCK:
                files.append((path.stat().st_atime_ns, path.stat().st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= bytes_left:
            return
        path.unlink(missing_ok=True)
        total -= size
