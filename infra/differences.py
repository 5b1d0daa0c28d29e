"""Why one artifact is not another: the fields, code and inputs in which their fingerprints differ.

A manifest holds all that its fingerprint hashes, so that the answer needs no recipe and no code of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from infra.inventory import Entry


@dataclass(frozen=True)
class Difference:
    """One reason, found in two artifacts of a stage: those that were asked about, or inputs of theirs."""

    stage: str
    what: str
    """A field as `train_dit.learning_rate`, `version`, or an input's stage."""
    before: Any
    after: Any

    def __str__(self) -> str:
        if self.what == "version":
            return f"{self.stage}: version {self.before} → {self.after}, the stage's code writes something else"
        if self.what.startswith("input "):
            return f"{self.stage}: {self.what} {_told(self.before)} → {_told(self.after)}"
        return f"{self.stage}: {self.what}: {_told(self.before)} → {_told(self.after)}"


_ABSENT = object()


def why(entries: Mapping[str, Entry], first: Entry, second: Entry) -> list[Difference]:
    """Every field and version in which two artifacts of a stage differ, those of their inputs too.

    An input in which they differ is looked into; where one of the two is not there any more, its name is all
    that can be told.

    Raises:
        UserError: they are of different stages, or one has no manifest.
    """
    if first.artifact.stage != second.artifact.stage:
        raise UserError(f"{first.name} and {second.name} are of different stages: give two of one stage")
    found: dict[Difference, None] = {}
    _compare(entries, first, second, found, set())
    return list(found)


def _compare(
    entries: Mapping[str, Entry],
    first: Entry,
    second: Entry,
    found: dict[Difference, None],
    seen: set[tuple[str, str]],
) -> None:
    if first.name == second.name or (first.name, second.name) in seen:
        return
    seen.add((first.name, second.name))
    for each in (first, second):
        if each.manifest is None:
            raise UserError(f"{each.name}: {each.fault}, so nothing says what it is made of")
    a, b = first.manifest, second.manifest
    assert a is not None and b is not None
    if a.stage_version != b.stage_version:
        found[Difference(a.stage, "version", a.stage_version, b.stage_version)] = None
    one, other = dict(_leaves(a.sections)), dict(_leaves(b.sections))
    for field in sorted(one.keys() | other.keys()):
        before, after = one.get(field, _ABSENT), other.get(field, _ABSENT)
        if before != after:
            found[Difference(a.stage, field, _plain(before), _plain(after))] = None
    for stage in sorted(a.inputs.keys() | b.inputs.keys()):
        names = [f"{stage}/{inputs[stage]}" if stage in inputs else None for inputs in (a.inputs, b.inputs)]
        there = [entries.get(name) if name else None for name in names]
        if names[0] == names[1]:
            continue
        if there[0] is not None and there[1] is not None and there[0].manifest and there[1].manifest:
            _compare(entries, there[0], there[1], found, seen)
        else:
            before, after = (name.partition("/")[2] if name else None for name in names)
            found[Difference(a.stage, f"input {stage}", before, after)] = None


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value by its path; lists are looked into as sections are, empty ones are values."""
    parts: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not parts or not value:
        yield path, value
        return
    for key, each in parts:
        yield from _leaves(each, f"{path}.{key}" if path else str(key))


def _plain(value: Any) -> Any:
    return None if value is _ABSENT else value if isinstance(value, str | int | float | bool | None) else str(value)


def _told(value: Any) -> str:
    return "nothing" if value is None else str(value)
