"""Whether artifacts still are what their manifests describe: every file, by size and hash, many at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor

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
                found[entry.name] = _wrong(pool, entry.artifact, checked)
            elif entry.fault != "not finished":
                found[entry.name] = [entry.fault]
    return found


def _wrong(pool: Executor, artifact: Artifact, checked: Callable[[int], None]) -> list[str]:
    told = pool.map(lambda file: _fault(artifact.storage, file, checked), artifact.manifest.files)
    return [each for each in told if each]


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
            return _sized(file, place.size(file.path))
    except FileNotFoundError:
        return _sized(file, None)
    except UserError as error:
        return f"{file.path}: {error}"
    checked(size)
    if size != file.bytes:
        return _sized(file, size)
    found = digest.hexdigest()
    return "" if found == file.sha256 else f"{file.path} has SHA-256 {found[:12]}…, expected {file.sha256[:12]}…"


def _sized(file: FileEntry, size: int | None) -> str:
    told = "is missing" if size is None else f"has {size:,} bytes"
    return f"{file.path} {told}, expected {file.bytes:,} bytes"


def require_whole(artifacts: Mapping[Artifact, bool]) -> None:
    """See that the files of complete artifacts are there with the right sizes: one listing each, nothing is read.

    Args:
        artifacts: what is about to be used, and whether the command that uses it could make it anew.

    Raises:
        UserError: one is damaged; it says what was expected, what was found, and which options mend it.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        _refuse(artifacts, dict(zip(artifacts, pool.map(lost, artifacts), strict=True)))


def require_unchanged(artifacts: Mapping[Artifact, bool], checked: Callable[[int], None]) -> None:
    """The same for what the files hold: all of them are read and hashed, many at a time."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        _refuse(artifacts, {each: _wrong(pool, each, checked) for each in artifacts if each.is_complete()})


def _refuse(artifacts: Mapping[Artifact, bool], damage: Mapping[Artifact, list[str]]) -> None:
    told, mend = [], []
    for each, faults in damage.items():
        if faults:
            more = f" (and {len(faults) - 1:,} more)" if len(faults) > 1 else ""
            told.append(f"stage {each.stage}: {each.uri}/{faults[0]}{more}")
            mend.append(("" if artifacts[each] else f"--only {each.stage} ") + f"--force {each.stage}")
    if told:
        words = (" " if all(artifacts[each] for each, faults in damage.items() if faults) else ", then ").join(mend)
        raise UserError(f"{'; '.join(told)}; the same command with {words} makes what is damaged anew")


def lost(artifact: Artifact) -> list[str]:
    """What is not there as the manifest says, a line each."""
    if not artifact.is_complete():
        return []
    found = artifact.storage.sizes()
    return [_sized(f, found.get(f.path)) for f in artifact.manifest.files if found.get(f.path) != f.bytes]
