"""One process of a machine at a time where two would get into each other's way."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra import logs
from infra.home import home


@contextmanager
def alone(what: str, does: str = "makes") -> Iterator[None]:
    """Nobody else who asks for this address or name, on this machine and in this home folder, goes on meanwhile.

    The lock ends with the process, however that ends.

    Args:
        what: what is made or used.
        does: what is done with it, for whoever has to wait.
    """
    with _lock(what).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logs.say(f"another process {does} {what}: waiting for it", "warning")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def held(what: str) -> bool:
    """Whether a process of this machine and home folder is alone with this address or name now."""
    with _lock(what).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _lock(what: str) -> Path:
    folder = home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / hashlib.sha256(what.encode()).hexdigest()[:16]
