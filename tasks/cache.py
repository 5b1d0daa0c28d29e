"""A local copy of remote parts, so that later epochs read from disk; of bounded size, the least recently used goes."""

from __future__ import annotations

import hashlib
import os
import uuid
from contextlib import suppress
from pathlib import Path

from configs.errors import UserError
from infra.artifacts import Artifact
from infra.storage import FileEntry


def local_copy(artifact: Artifact, entry: FileEntry, folder: Path, limit_bytes: int) -> Path:
    """The part on local disk, fetched and checked against the manifest's hash if it is not there yet.

    Files are named by their content, so several processes and artifacts share a folder; what does not fit beside
    this one is evicted first. Raises UserError where the remote file is not the manifest's.
    """
    path = folder / f"{entry.sha256}{Path(entry.path).suffix}"
    try:
        os.utime(path)  # used just now
        return path
    except FileNotFoundError:
        pass
    data = artifact.storage.read_bytes(entry.path)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise UserError(
            f"{artifact.uri}/{entry.path} is damaged (its hash is not the manifest's); run the flow again with "
            f"--force {artifact.stage}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _make_room(folder, limit_bytes - len(data))
    partial = folder / f".{uuid.uuid4().hex}.partial"
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _make_room(folder: Path, bytes_left: int) -> None:
    """Evict the least recently used files; one that a process still has mapped lives on until it lets go."""
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process evicts too
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= max(0, bytes_left):
            return
        path.unlink(missing_ok=True)
        total -= size
