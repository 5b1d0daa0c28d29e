"""What is measured, in order of worth; every part by itself, so that one that fails costs no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.card import environment, golden
from benchmarks.gpu.encoding import encoding
from benchmarks.gpu.fashion import fashion
from benchmarks.gpu.loop import loading, stability
from benchmarks.gpu.records import Records
from benchmarks.gpu.sampling import sampling
from benchmarks.gpu.training import start, training, zero


@dataclass(frozen=True)
class Section:
    """Measurements of one kind, which may be asked for alone."""

    run: Callable[[Records, str], None]
    """Takes the records, and a folder for artifacts as a URL."""
    seconds: float
    """At most; what does not fit any more is skipped by name."""


SECTIONS = {
    "environment": Section(environment, 20),
    "golden": Section(golden, 20),
    "training": Section(training, 170),
    "sampling": Section(sampling, 55),
    "start": Section(start, 40),
    "stability": Section(stability, 65),
    "loading": Section(loading, 40),
    "encoding": Section(encoding, 120),
    "zero": Section(zero, 45),
    "fashion": Section(fashion, 70),
}
"""By name, in order of worth; together more than there is, for none is expected to use all of its own."""
