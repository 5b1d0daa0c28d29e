"""Where compiled graphs are kept: what one process has compiled, another loads in seconds."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra import logs
from infra.home import home

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
"""torch's own environment variable. A folder that several machines see serves them all: files are written whole, and
their names say code, shapes, torch and kind of device."""


def keep_compiled() -> Path:
    """Called before anything is compiled: graphs go to a folder of the home, or to where FOLDER says, and not to the
    temporary folder that torch would take, which a restarted machine or container has lost.

    torch writes that folder into the variable as soon as its compiler is imported, which many a call does; so one that
    stands there was said by nobody.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    said = os.environ.get(FOLDER)
    path = home() / "compiled" if said in (None, default_cache_dir()) else Path(said)
    os.environ[FOLDER] = str(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def once_a_machine(what: str, patience: float = 600.0) -> Iterator[None]:
    """Compiling: of all processes of this machine and home that come to the same graph, the first makes it, and the
    others wait and then find it where graphs are kept, all at the same time.

    For frozen networks, whose processes know nothing of one another. Workers of a training step together, and one that
    waits for another's graph while that one waits for its gradients would wait for ever.

    Args:
        what: is compiled, for people.
        patience: seconds after which a process compiles for itself.
    """
    folder = home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(f"graph {what}".encode()).hexdigest()[:16]
    with (folder / name).open("w") as file:
        began, wanted = time.monotonic(), fcntl.LOCK_EX
        while not _taken(file.fileno(), wanted):
            if wanted == fcntl.LOCK_EX:
                logs.say(f"another process is compiling {what}: waiting for its graph")
                wanted = fcntl.LOCK_SH  # together with all others that wait
            if time.monotonic() - began > patience:
                logs.say(f"{what} is not compiled after {patience:.0f} s: compiling it here, too", "warning")
                break
            time.sleep(0.1)
        yield


def _taken(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
