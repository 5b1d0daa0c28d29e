"""What a run is called: its recipe, and what it changes of that."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from configs.load import load_recipe

_SHOWN = 4
"""Fields that a name tells."""
_LONGEST = 24
"""Letters of a value; of a place, the last ones are told."""
_ELSEWHERE = ("images", "batch", "precision", "seed", "stages")
"""Fields of sampling that other sections have, too; solver and steps are sampling's wherever they stand."""
_NEVER = ("name", "published", "compute", "tracking", "report")
"""Sections that change nothing of what is made."""


def run_name(recipe: str, overrides: Sequence[str] = ()) -> str:
    """`demo guidance.scale=4`: the recipe and the fields that the overrides change, as a person would tell it."""
    loaded = load_recipe(recipe, overrides)
    if not overrides:
        return loaded.name
    before, now = (flat(each.model_dump(mode="json")) for each in (load_recipe(recipe), loaded))
    return said(loaded.name, {name: value for name, value in now.items() if before.get(name) != value})


def said(recipe: str, fields: Mapping[str, Any]) -> str:
    """A name of a recipe and values of `section.field`.

    Sampling's section goes without saying, but for fields that others have, too.
    """
    chosen = {name: value for name, value in fields.items() if name.partition(".")[0] not in _NEVER}
    shown = [f"{_plain(name)}={_short(value)}" for name, value in chosen.items()]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return f"{recipe} {', '.join(shown[-_SHOWN:])}{more}".rstrip()  # later stages are what is tried in turn


def _plain(name: str) -> str:
    left = name.removeprefix("sample.")
    return name if left in _ELSEWHERE else left


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain values by `section.field`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) <= _LONGEST:
        return text
    return f"…{text[-_LONGEST:]}" if "/" in text else f"{text[:_LONGEST]}…"
