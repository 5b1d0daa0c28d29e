"""A figure and where it comes from: a plan shows no number without its source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A number in base units (images, bytes, requests, FLOPs, hours, seconds, dollars)."""

    value: float
    source: str
