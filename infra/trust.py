"""Whose code this process may run: that of files which recipes of its own jobs name with `trusted: true`.

What an artifact's manifest says of a file is no such word. Imports nothing that computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TRUSTED: set[tuple[str, str]] = set()


def trust(recipe: Mapping[str, Any]) -> None:
    """Note what a recipe that a person gave trusts. recipe: its plain values."""
    model = (recipe.get("train_vavae") or {}).get("model") or {}
    if model.get("kind") == "python" and model.get("trusted") is True:
        _TRUSTED.add((str(model["file"]), str(model["class_name"])))


def is_trusted(file: str, class_name: str) -> bool:
    return (file, class_name) in _TRUSTED
