"""One process of a machine at a time where two would get into each other's way."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from infra import logs
from infra.home import home


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """Nobody else who asks for this address, on this machine and in this home folder, goes on meanwhile.

    The lock ends with the process, however that ends.
    """
    folder = home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / hashlib.sha256(uri.encode()).hexdigest()[:16]).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logs.say(f"another process makes {uri}: waiting for it", "warning")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
