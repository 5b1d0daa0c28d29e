"""Whether artifacts still are what their manifests describe: every file, by size and hash, many at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from configs.errors import UserError
from infra.artifacts import Artifact
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


def require_whole(artifacts: Mapping[Artifact, bool]) -> None:
    """See that the files of complete artifacts are there with the right sizes: one listing each, nothing is read.

    Args:
        artifacts: what is about to be used, and whether the command that uses it could make it anew.

    Raises:
        UserError: one is damaged; it says what was expected, what was found, and which options mend it.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        damage = [each for each in pool.map(_damage, artifacts) if each[1]]
    if damage:
        mend = [("" if artifacts[each] else f"--only {each.stage} ") + f"--force {each.stage}" for each, _ in damage]
        told = "; ".join(f"stage {each.stage}: {each.uri}/{lost}" for each, lost in damage)
        raise UserError(f"{told}; the same command with {', then '.join(mend)} makes what is damaged anew")


def _damage(artifact: Artifact) -> tuple[Artifact, str]:
    """The artifact, and its first file that is not there as it should be, in words; empty where all are."""
    if not artifact.is_complete():
        return artifact, ""
    found = artifact.storage.sizes()
    lost = [each for each in artifact.manifest.files if found.get(each.path) != each.bytes]
    if not lost:
        return artifact, ""
    size = found.get(lost[0].path)
    told = "is missing" if size is None else f"has {size:,} bytes"
    more = f" (and {len(lost) - 1:,} more files)" if len(lost) > 1 else ""
    return artifact, f"{lost[0].path} {told}, expected {lost[0].bytes:,} bytes{more}"
