"""What sources of several files share: naming them, their sizes, and byte ranges of them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from functools import lru_cache

from configs.errors import UserError
from infra.storage import Storage


def expand(path: str, suffix: str) -> list[str]:
    """The files that a file name, a folder or a glob in the last part of a path names, sorted.

    Raises:
        UserError: there are none.
    """
    if path.endswith(suffix) and not any(sign in path for sign in "*?["):
        return [path]
    folder, _, pattern = path.rpartition("/") if any(sign in path for sign in "*?[") else (path, "", f"*{suffix}")
    names = [name for name in Storage.at(folder or ".").names() if fnmatch(name, pattern)]
    if not names:
        raise UserError(
            f"data.source: no {suffix} files at {path}; name a file, a folder or a glob such as {path}/*{suffix}"
        )
    return [f"{folder}/{name}" if folder else name for name in names]


def sizes_of(paths: Sequence[str]) -> dict[str, int]:
    """Bytes of each file. Raises UserError naming one that is missing."""
    found = {}
    for path in paths:
        storage, name = _at(path)
        try:
            found[path] = storage.size(name)
        except FileNotFoundError:
            raise UserError(f"data.source: {path} does not exist") from None
    return found


def read_range(path: str, start: int, length: int) -> bytes:
    storage, name = _at(path)
    return storage.read_range(name, start, length)


@lru_cache(maxsize=4096)
def _at(path: str) -> tuple[Storage, str]:
    folder, _, name = path.rpartition("/")
    return Storage.at(folder or ("/" if path.startswith("/") else ".")), name
