"""What names tell: which files systems leave behind, which split a file is of, in which order classes are.

Names are compared in one normal form (Unicode NFC), for the same name typed on another system has other bytes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

_LEFTOVERS = frozenset(
    (
        "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler", "lost+found", "@eadir",
        "#recycle", "system volume information", "network trash folder", "temporary items", "icon\r",
    )
)  # fmt: skip
_SPLITS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test",
}  # fmt: skip


def normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def is_leftover(part: str) -> bool:
    """Whether a system, and no person, put this file or folder there; hidden ones count as such."""
    return part.startswith(".") or part.lower() in _LEFTOVERS


def class_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their labels: numbers by value, anything else by characters."""
    found = sorted(set(names))
    return sorted(found, key=int) if found and all(_is_number(name) for name in found) else found


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) <= 18


def split_in(name: str) -> str | None:
    """`train`, `validation` or `test` where one part of a relative path says so; the innermost part counts."""
    for part in reversed(name.split("/")):
        words = re.split(r"[^a-z]+", part.lower())
        found = {_SPLITS[word] for word in words if word in _SPLITS}
        if len(found) == 1:
            return found.pop()
    return None


def are_splits(names: Sequence[str]) -> bool:
    """Whether folders of these names are splits and no classes."""
    return bool(names) and all(name.lower() in _SPLITS for name in names)
