"""Whether artifacts still are what their manifests describe: every file, by size and hash, many at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from configs.errors import UserError
from infra.inventory import Entry
from infra.storage import FileEntry, Storage

_AT_ONCE = 8
_BLOCK = 16 << 20


def faults(entries: Iterable[Entry], checked: Callable[[int], None] = lambda size: None) -> dict[str, list[str]]:
    """What is wrong with each artifact that has a manifest, by name; empty lists where nothing is.

    Args:
        entries: what to read; unfinished ones have nothing to be held to and are left out.
        checked: told the bytes of every file once it is read.
    """
    found: dict[str, list[str]] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for entry in entries:
            if entry.manifest is not None:
                place = entry.artifact.storage
                told = pool.map(lambda file, place=place: _fault(place, file, checked), entry.manifest.files)
                found[entry.name] = [each for each in told if each]
            elif entry.fault != "not finished":
                found[entry.name] = [entry.fault]
    return found


def _fault(place: Storage, file: FileEntry, checked: Callable[[int], None]) -> str:
    digest, size = hashlib.sha256(), 0
    try:
        while size < file.bytes:
            block = place.read_range(file.path, size, min(_BLOCK, file.bytes - size))
            if not block:
                break
            digest.update(block)
            size += len(block)
        if size == file.bytes and place.size(file.path) != size:
            return f"{file.path}: longer than its {file.bytes} bytes"
    except FileNotFoundError:
        return f"{file.path}: missing"
    except UserError as error:
        return f"{file.path}: {error}"
    checked(size)
    if size != file.bytes:
        return f"{file.path}: {size} of {file.bytes} bytes"
    return "" if digest.hexdigest() == file.sha256 else f"{file.path}: its content is another (hash)"
