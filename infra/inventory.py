"""What lies under a root, what each artifact was made from and what uses it, and what may go.

The artifacts themselves say all of it: manifests what they were made from, and the record of a begun run
beside an unfinished one what it reads. Nothing else is kept anywhere.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from configs.errors import UserError
from infra.artifacts import MANIFEST, Artifact, Manifest
from infra.storage import Storage

RUN_FILE = "run.json"
"""Beside an artifact that is being made: the MLflow run that began it, and what it is made from."""
RECENT_SECONDS = 3600.0
"""How long after its last write an artifact counts as a running flow's."""
_AT_ONCE = 16
_PLACE = re.compile(r"(?P<stage>[^/]+)/(?P<fingerprint>[0-9a-f]{16})(?P<file>(?:\.new)?/.+)")
_FINGERPRINT = re.compile(r"\b[0-9a-f]{16}\b")


@dataclass(frozen=True)
class Entry:
    """One artifact's folder, finished or not."""

    artifact: Artifact
    manifest: Manifest | None
    """None where it is not finished, or where the manifest is damaged."""
    fault: str
    """Why there is no manifest; empty where there is one."""
    bytes: int
    """Of all files there, those that no manifest describes too, and a replacement's that is being made."""
    written: float
    """When the last of them was written, in seconds since 1970."""
    made_from: tuple[str, ...]
    """Names of the artifacts that it reads, whether or not they are there."""

    @property
    def name(self) -> str:
        """`stage/fingerprint`."""
        return f"{self.artifact.stage}/{self.artifact.fingerprint}"


@dataclass(frozen=True)
class Choice:
    """What would go and why the rest stays."""

    gone: tuple[Entry, ...]
    """Users before what they use, so that an interruption leaves nothing that misses its inputs."""
    kept: Mapping[str, str]
    """Reason by name."""


def read(root: str, stage: str = "") -> dict[str, Entry]:
    """Everything under a root by `stage/fingerprint`, the stages in alphabetical order and the oldest first.

    stage: only its artifacts. One listing, and one read for each artifact, side by side.
    """
    storage = Storage.at(root)
    folders: dict[tuple[str, str], dict[str, tuple[int, float]]] = {}
    for path, told in storage.listed(stage).items():
        place = _PLACE.fullmatch(path)
        if place is not None:
            files = folders.setdefault((place["stage"], place["fingerprint"]), {})
            files[place["file"].removeprefix("/")] = int(told["size"]), _modified(told)
    known = {fingerprint: f"{stage}/{fingerprint}" for stage, fingerprint in folders}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(lambda item: _entry(storage.url, item[0], item[1], known), folders.items()))
    return {each.name: each for each in sorted(found, key=lambda each: (each.artifact.stage, each.written))}


def written_since(entry: Entry) -> bool:
    """Whether a file of an artifact or of its replacement was written after it was read here."""
    places = entry.artifact.storage, entry.artifact.beside
    files = [told for place in places for told in place.listed().values()]
    return any(_modified(told) > entry.written for told in files)


def users(entries: Mapping[str, Entry]) -> dict[str, list[str]]:
    """By name, the names of those that were made from it."""
    found: dict[str, list[str]] = {name: [] for name in entries}
    for name, entry in entries.items():
        for needed in entry.made_from:
            if needed in found:
                found[needed].append(name)
    return found


def one(entries: Mapping[str, Entry], wanted: str) -> Entry:
    """The artifact that somebody means by `stage/fingerprint`, its beginning, or the fingerprint's alone.

    Raises:
        UserError: none is meant, or several are.
    """
    tail = wanted.rstrip("/")
    for count in (2, 1):
        named = "/".join(tail.split("/")[-count:])
        fit = [name for name in entries if name.startswith(named) or name.partition("/")[2].startswith(named)]
        if len(fit) == 1:
            return entries[fit[0]]
        if fit:
            raise UserError(f"{wanted} may be {', '.join(fit[:5])}: give more of its fingerprint")
    raise UserError(f"no artifact {wanted} under this root: `latentforge artifacts list` shows what there is")


def choose(
    entries: Mapping[str, Entry],
    keep_last: int | None = None,
    older_than: float | None = None,
    named: Collection[str] = (),
    unfinished: bool = False,
    now: float | None = None,
    locked: Callable[[str], bool] = lambda uri: False,
) -> Choice:
    """What may go under such rules; with several, what all of them let go.

    Whatever is kept keeps all that it was made from. What a flow reads or writes now is kept: what a
    process of this machine has locked, and what was written within the last hour, finished or not.

    Args:
        keep_last: how many of each stage's newest finished artifacts stay.
        older_than: seconds; what was written later stays.
        named: only these may go; all of them where it is empty.
        unfinished: whether unfinished ones may go. A killed stage would go on from them.
        now: seconds since 1970.
        locked: whether a process of this machine is making the artifact at this address.
    """
    now = time.time() if now is None else now
    kept: dict[str, str] = {}
    ranks: dict[str, int] = {}
    for name, entry in sorted(entries.items(), key=lambda item: -item[1].written):
        age, stage = now - entry.written, entry.artifact.stage
        ranks[stage] = ranks.get(stage, 0) + (entry.manifest is not None)
        if locked(entry.artifact.uri) or age < RECENT_SECONDS:
            kept[name] = "written within the last hour or just now"
        elif named and name not in named:
            kept[name] = "not named"
        elif not entry.fault and keep_last is not None and ranks[stage] <= keep_last:
            kept[name] = f"one of the {keep_last} newest of {stage}"
        elif older_than is not None and age < older_than:
            kept[name] = "younger than that"
        elif entry.fault and not unfinished:
            kept[name] = entry.fault
    for name in list(kept):
        for needed in closure(entries, entries[name].made_from):
            kept.setdefault(needed, f"{name} needs it")
    order = _users_first(entries, [name for name in entries if name not in kept])
    return Choice(tuple(entries[name] for name in order), kept)


def closure(entries: Mapping[str, Entry], names: Iterable[str]) -> set[str]:
    """These and all that they were made from, as far as it is there."""
    seen: set[str] = set()
    queue = [name for name in names if name in entries]
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue += [needed for needed in entries[name].made_from if needed in entries]
    return seen


def _users_first(entries: Mapping[str, Entry], names: list[str]) -> list[str]:
    uses = {name: closure(entries, entries[name].made_from) for name in names}
    return sorted(names, key=lambda name: (-len(uses[name]), name))


def _entry(
    root: str, place: tuple[str, str], files: Mapping[str, tuple[int, float]], known: Mapping[str, str]
) -> Entry:
    artifact = Artifact(root, *place)
    manifest, fault = None, "not finished"
    made_from: list[str] = []
    if MANIFEST in files:
        try:
            manifest, fault = artifact.manifest, ""
            made_from = [f"{stage}/{fingerprint}" for stage, fingerprint in manifest.inputs.items()]
            made_from += _mentioned(manifest.facts, known) + _mentioned(manifest.sections, known)
        except UserError as error:
            fault = str(error)
    elif RUN_FILE in files:
        with suppress(FileNotFoundError, ValueError):  # finished, deleted or half written since the listing
            begun = json.loads(artifact.storage.read_bytes(RUN_FILE))
            made_from = [f"{stage}/{fingerprint}" for stage, fingerprint in begun.get("inputs", {}).items()]
            made_from += _mentioned(begun.get("sections"), known)
    unique = tuple(name for name in dict.fromkeys(made_from) if name != "/".join(place))
    written = max(when for _, when in files.values())
    return Entry(artifact, manifest, fault, sum(size for size, _ in files.values()), written, unique)


def _mentioned(values: Any, known: Mapping[str, str]) -> list[str]:
    """Artifacts beside the DAG (an image classifier, a reference) that a stage names among its facts."""
    return [known[text] for text in _FINGERPRINT.findall(json.dumps(values)) if text in known]


def _modified(told: Mapping[str, Any]) -> float:
    """Seconds since 1970 of what a storage says of a file: a folder says seconds, a bucket a date."""
    found = told.get("mtime") or told.get("LastModified") or 0.0
    return found.timestamp() if isinstance(found, datetime) else float(found)
