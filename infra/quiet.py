"""A command's console shows what stages say; what libraries say beside it goes to a file whose path is named.

Ray brings lines of its processes to the console of the command that started it, `(name pid=1) text`. Those that a
stage's own workers say are marked (`infra/logs.py`) and appear without the prefix. Controllers, daemons, logging in
their own forms and tracebacks of processes that come and go are not for people: an error that matters ends the command
and is told there. Workers of a cluster that was there before do not know of marks; there, lines are told by their form.
What is written past Python (Ray's `core_worker.cc` in this process) or by processes that start meanwhile goes to the
descriptor 2, which leads to the file as long as the command works.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from infra import stopping
from infra.home import home
from infra.logs import MARK, MARKED, in_json

_KEPT_FILES = 20
_ERRORS = 2
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PREFIX = re.compile(r"^\((?P<who>.*?)(?: pid=\d+(?:, ip=[^)]*)?)\) ?")
_DAEMON = re.compile(r"^\((?:raylet|autoscaler|gcs_server|pid=\d+)[^)]*\)")
_BAR = re.compile(r"\s*(?P<stage>\w+) [━·]{20} ")
_ERASE = "\x1b[2K"
_CONTROLLERS = ("TrainController", "SplitCoordinator", "AutoscalingRequester", "ActorLocationTracker", "_StatsActor")
_LIBRARY = re.compile(
    r"^\[?\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[.,]\d+"  # a logger's time
    r"|^\[\d{4}-\d\d-\d\d .*\]|\b\w+\.cc:\d+"
    r"|^[WIEC]\d{4} "
    r"|^\s*(Traceback \(most recent|File \"|\^+\s*$|~+\^)"
    r"|^\s+\w.*\(.*\)$|^\[State Transition\]|^Attempting to start|^Started training worker"
    r"|Warning: |^\s*warnings\.warn\("
)


def shown(line: str, marked: bool = False) -> str | None:
    """A line as a person should see it; None where it is a library's.

    marked: whether workers mark what a stage says.
    """
    plain = _COLOUR.sub("", line)
    if MARK in line:
        found = _PREFIX.match(plain)
        return plain[found.end() if found else 0 :].replace(MARK, "")
    if _DAEMON.match(plain):
        return None
    found = _PREFIX.match(plain)
    if found is None:
        return line
    text = plain[found.end() :]
    if marked or found["who"].startswith(_CONTROLLERS) or _LIBRARY.search(text):
        return None
    return text


class Log:
    """The file of one command, named at its end where there is something in it."""

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self.path: Path | None = None

    def open(self) -> TextIO:
        if self._file is None:
            folder = home() / "logs"
            folder.mkdir(parents=True, exist_ok=True)
            for old in sorted(folder.glob("*.log"))[:-_KEPT_FILES]:
                _forget(old)
            self.path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
            self._file = self.path.open("a", encoding="utf-8")
            with suppress(OSError):  # a disk without locks, where no log is deleted
                fcntl.flock(self._file, fcntl.LOCK_SH)
        return self._file

    def write(self, line: str) -> None:
        file = self.open()
        file.write(_COLOUR.sub("", line) + "\n")
        file.flush()

    def close(self) -> None:
        """Leave the file where something is in it."""
        if self._file is not None and self.path is not None:
            self._file.close()
            with suppress(FileNotFoundError):  # somebody cleared the folder
                if self.path.stat().st_size:
                    return
                self.path.unlink()
            self.path = None


def _forget(old: Path) -> None:
    """Delete a log, unless the command that writes it still works: a training does for days."""
    with suppress(OSError), old.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        old.unlink()


class LastLine:
    """The line at the end of a terminal where a training's bar is drawn over itself; a command's two streams share it.

    It stands without an end, so that whatever else is written there can spoil a bar but is never itself drawn over.
    """

    def __init__(self) -> None:
        self._open: TextIO | None = None
        self._stage = ""

    def draw(self, stream: TextIO, line: str) -> bool:
        """Whether the line is one of a bar, and stands there now."""
        found = _BAR.match(line)
        if found is None or not stream.isatty():
            return False
        if found["stage"] != self._stage:
            self.end()
        self._open, self._stage = stream, found["stage"]
        stream.write(f"\r{_ERASE}{line[: shutil.get_terminal_size().columns - 1]}")
        stream.flush()
        return True

    def end(self) -> None:
        """Before anything else is written."""
        if self._open is not None:
            self._open.write("\n")
            self._open.flush()
            self._open = None


class Console:
    """A stream that keeps lines of libraries from another one. All else goes through as it comes."""

    def __init__(self, stream: TextIO, log: Log, marked: bool = False, last: LastLine | None = None) -> None:
        self._stream, self._log, self._marked = stream, log, marked
        self._last = last or LastLine()
        self._end_follows = False

    def write(self, text: str) -> int:
        if self._end_follows and text == "\n":  # `print` writes the end of a line by itself
            self._end_follows = False
            return 1
        if "(" not in text[:16] and MARK not in text:  # bars, and everything that no process of Ray's said
            self._last.end()
            return self._stream.write(text)
        for line in text.splitlines(keepends=True):
            kept = shown(line.rstrip("\n"), self._marked)
            if kept is None or (stopping.asked() and _BAR.match(kept)):  # a command that stops has one more word
                self._log.write(line.rstrip("\n"))
            elif not self._last.draw(self._stream, kept):
                self._last.end()
                self._stream.write(kept + "\n" * line.endswith("\n"))
                continue
            self._end_follows = not line.endswith("\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def console() -> Iterator[Log]:
    """While a command works. The log's path is named at the end, where there is something in it.

    Whoever stops a command has one line to read, which says where it goes on.
    """
    log, last, before = Log(), LastLine(), (sys.stdout, sys.stderr)
    marked = not os.environ.get("RAY_ADDRESS") and not in_json()
    try:
        with _past_python_to(log) as errors:
            out, err = (cast(TextIO, Console(each, log, marked, last)) for each in (before[0], errors))
            sys.stdout, sys.stderr = out, err
            _lead(errors, err)
            if marked:
                os.environ[MARKED] = "1"
            try:
                yield log
            finally:
                _lead(err, errors)
                last.end()
    finally:
        os.environ.pop(MARKED, None)
        sys.stdout, sys.stderr = before
        log.close()
        if log.path is not None and not stopping.asked():
            print(f"what libraries said beside this is in {log.path}", file=sys.stderr)


@contextmanager
def _past_python_to(log: Log) -> Iterator[TextIO]:
    """Descriptor 2 leads to the log; gives a stream that leads where it led before."""
    ours = sys.__stderr__
    if ours is None or ours is not sys.stderr or ours.fileno() != _ERRORS:  # somebody redirected it
        yield sys.stderr
        return
    ours.flush()
    kept = os.dup(_ERRORS)  # for good: what begins to log meanwhile may have a last word
    stream = open(kept, "w", buffering=1, encoding=ours.encoding, errors=ours.errors)  # noqa: SIM115
    try:
        os.dup2(log.open().fileno(), _ERRORS)
        _lead(ours, stream)
        yield stream
    finally:
        _lead(stream, ours)
        os.dup2(kept, _ERRORS)


def _lead(before: TextIO, now: TextIO) -> None:
    """Handlers of loggers from one stream to another; Prefect's write by a console of its own."""
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", ()):
            if vars(handler).get("stream") is before:  # others ask for the stream of the moment
                handler.setStream(now)
                if hasattr(handler, "console"):
                    handler.console.file = now
