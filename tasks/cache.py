"""Local copies of remote parts, so that later epochs read from disk; of bounded size, the least recently used goes."""

from __future__ import annotations

import fcntl
import hashlib
import os
from contextlib import suppress
from pathlib import Path

from configs.errors import UserError
from infra.artifacts import Artifact
from infra.storage import FileEntry

_PARTIAL, _LOCK = ".partial", ".lock"


def copy_name(entry: FileEntry) -> str:
    """Copies are named by their content, so several processes and artifacts share a folder."""
    return f"{entry.sha256}{Path(entry.path).suffix}"


def fetch(artifact: Artifact, entry: FileEntry, copy: Path, limit_bytes: int) -> None:
    """See that a part is on local disk, fetched and checked against the manifest's hash if it is not there yet.

    What does not fit beside it is evicted first: the folder never holds more than `limit_bytes`, which must be enough
    for this part. Of several processes that want the same part, one fetches it. Raises UserError where the remote
    file is not the manifest's.
    """
    if _there(copy, entry):
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_suffix(_PARTIAL)
    with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released with the file, also when the process dies
        if _there(copy, entry):  # another process was faster
            return
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
        partial.replace(copy)


def _there(copy: Path, entry: FileEntry) -> bool:
    try:
        if copy.stat().st_size != entry.bytes:
            return False
        os.utime(copy)  # used just now
        return True
    except FileNotFoundError:
        return False


def _make_room(folder: Path, bytes_left: int) -> None:
    """Evict the least recently used copies; one that a process still has mapped lives on until it lets go."""
    found, total = [], 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process evicts too
            status = path.stat()
            total += status.st_size
            if path.suffix not in (_PARTIAL, _LOCK):
                found.append((status.st_mtime_ns, status.st_size, path))
    for _, size, path in sorted(found):
        if total <= bytes_left:
            return
        path.unlink(missing_ok=True)
        total -= size
