"""Local copies of remote parts, so that later epochs read from disk; of bounded size, the least recently used goes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from configs.errors import UserError
from infra.artifacts import Artifact
from infra.storage import FileEntry

_PARTIAL, _LOCK = ".partial", ".lock"


def copy_name(entry: FileEntry) -> str:
    """Copies are named by their content, so several processes and artifacts share a folder."""
    return f"{entry.sha256}{Path(entry.path).suffix}"


def fetch(artifact: Artifact, entry: FileEntry, copy: Path, limit_bytes: int) -> FileIO:
    """A part's copy on local disk, open; fetched and checked against the manifest's hash if it is not there yet.

    What does not fit beside it is evicted first: the folder never holds more than `limit_bytes`, which must be enough
    for this part. Of several processes that want the same part, one fetches it. Raises UserError where the remote
    file is not the manifest's.
    """
    if found := _opened(copy, entry):
        return found
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_suffix(_PARTIAL)
    with _locked(partial) as file:
        if found := _opened(copy, entry):  # another process was faster
            return found
        data = artifact.storage.read_bytes(entry.path)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise UserError(
                f"{artifact.uri}/{entry.path} is damaged (its hash is not the manifest's); run the flow again with "
                f"--force {artifact.stage}"
            )
        with (copy.parent / f"room{_LOCK}").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file.truncate(0)
            _make_room(copy.parent, limit_bytes - len(data))
            file.truncate(len(data))  # others count it from here on
        file.write(data)
        file.flush()
        found = FileIO(partial)  # before another process can evict it
        partial.replace(copy)
        return found


def _locked(path: Path) -> BinaryIO:
    """The file of this name, created if need be, for this process alone: until it is closed or the process dies."""
    while True:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "wb")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):  # who held it before has given the file its final name
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


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
    os.utime(file.fileno(), ns=(time.time_ns(), status.st_mtime_ns))  # used just now, and not changed
    return file


def _make_room(folder: Path, bytes_left: int) -> None:
    """Evict the least recently used copies; one that a process has open lives on until it lets go."""
    found, total = [], 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process evicts too
            status = path.stat()
            total += status.st_size
            if path.suffix not in (_PARTIAL, _LOCK):
                found.append((status.st_atime_ns, status.st_size, path))
    for _, size, path in sorted(found):
        if total <= bytes_left:
            return
        path.unlink(missing_ok=True)
        total -= size
