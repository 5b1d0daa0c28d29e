"""Progress for whatever takes longer than a few seconds: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from infra import logs, metrics

if TYPE_CHECKING:
    from rich.progress import Progress

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_FIGURES = 2.0


_bars: list[Bar] = []
"""Those under way, the innermost last."""


def where() -> str:
    """How far the work is that this process shows now, for a person; empty where it shows none."""
    return _bars[-1].said if _bars else ""


def share() -> float | None:
    """Of the innermost work that this process shows now, 0 to 1; None where it shows none, or no end of it."""
    found = _bars[-1] if _bars else None
    return min(1.0, found._done / found._total) if found is not None and found._total else None


class Bar:
    """Use as `with Bar("encode", total=70_000, unit="images") as bar: bar.advance(256)`."""

    def __init__(self, what: str, total: int | None, unit: str = "images") -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._started, self._said = 0, time.monotonic(), time.monotonic()
        self._line = -1  # of which amount the last one told
        self._told, self._skipped, self._measured = 0, 0, self._started
        self._rich: Progress | None = None
        if sys.stderr.isatty():  # what measures a GPU elsewhere goes without this library
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._rich = Progress(
                TextColumn("{task.description:>14}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._rich.add_task(what, total=total, note="")

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._done += amount
        self._measure()
        if self._rich is not None:
            self._rich.update(self._task, advance=amount, note=note)
        elif time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._say(note)

    def skip(self, amount: int) -> None:
        """What an earlier attempt has done."""
        self._told += amount
        self._skipped += amount
        self.advance(amount)

    @property
    def said(self) -> str:
        return f"{self._done:,} {self._unit} of {self._what}"

    def move_to(self, done: int, note: str = "") -> None:
        self.advance(done - self._done, note)

    def _say(self, note: str = "") -> None:
        self._said, self._line = time.monotonic(), self._done
        seconds = self._said - self._started
        share = f" of {self._total:,} ({100 * self._done / self._total:.0f} %)" if self._total else ""
        rate = (self._done - self._skipped) / seconds if seconds > 0 else 0.0
        line = f"{self._what}: {self._done:,}{share} {self._unit}, {rate:,.0f}/s, {seconds:.0f} s {note}".rstrip()
        figures = {"images": self._done, "total": self._total, "images_per_second": round(rate, 1)}
        logs.say(line, "info", sys.stderr, stage=self._what, **figures)

    def _measure(self) -> None:
        """Tell Prometheus, often enough for a curve."""
        now = time.monotonic()
        ends = self._total is not None and self._done >= self._total
        if now - self._measured < _SECONDS_BETWEEN_FIGURES and not ends:
            return
        done, seconds = self._done - self._told, max(now - self._measured, 1e-9)
        metrics.progress(self._what, done, (self._total or self._done) - self._done, done / seconds)
        self._told, self._measured = self._done, now

    def __enter__(self) -> Self:
        _bars.append(self)
        if self._rich is not None:
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self in _bars and error is None:  # else it says how far the work came
            _bars.remove(self)
        if self._rich is not None:
            self._rich.stop()
        elif time.monotonic() - self._started > _SECONDS_BETWEEN_LINES and self._line != self._done:
            self._say()


class Bytes(Bar):
    """Told of bytes, and shows MiB."""

    def __init__(self, what: str, total: int) -> None:
        super().__init__(what, max(1, total >> 20), "MiB")
        self._bytes = 0

    def read(self, size: int) -> None:
        before, self._bytes = self._bytes >> 20, self._bytes + size
        self.advance((self._bytes >> 20) - before)
