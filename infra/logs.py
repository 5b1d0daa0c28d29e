"""What a stage says while it runs: lines for people, or one JSON object a line where LATENTFORGE_LOGS=json asks.

Stages as Ray jobs always speak JSON, so that whoever follows one reads progress and mistakes back as they were.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

FORMAT = "LATENTFORGE_LOGS"
"""The environment variable: `json`, or anything else for text."""
MARKED = "LATENTFORGE_MARKED_LINES"
"""Set by a command for the processes that Ray starts for it, so that it tells their lines from those of libraries."""
MARK = "\u2063"
"""Ends a marked line: an invisible separator, which its command takes off."""
_START = '{"time": '
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Line:
    """One line, and the figures it was made of."""

    message: str
    level: str = "info"
    """`info`, `warning` or `error`."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Plain JSON. Progress has `stage`, `images`, `total` and `images_per_second`."""


def say(message: str, level: str = "info", file: TextIO | None = None, **fields: Any) -> None:
    """Print a line at once: the message for people, the fields with it for programs. `file` defaults to stdout."""
    text = _object(Line(message, level, fields)) if in_json() else message
    if MARKED in os.environ and not in_json():
        text = text.replace("\n", f"{MARK}\n") + MARK
    # In one piece, or the lines of other processes would come between an unbuffered line and its end.
    print(text + "\n", end="", file=file or sys.stdout, flush=True)


def read(text: str) -> Line:
    """A line of a stage's output as it was said; anything else is its own message. Ray's prefixes are left out."""
    text = _COLOUR.sub("", text).rstrip()
    start = text.find(_START)
    if start < 0:
        return Line(text)
    try:
        values, _ = json.JSONDecoder().raw_decode(text, start)
        return Line(values.pop("message"), values.pop("level"), {k: v for k, v in values.items() if k != "time"})
    except (ValueError, KeyError):
        return Line(text)


def in_json() -> bool:
    return os.environ.get(FORMAT) == "json"


def set_up() -> None:
    """Let libraries' warnings take the same form; nothing where text is asked for."""
    if in_json():
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter())
        logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {"logger": record.name}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return _object(Line(record.getMessage(), record.levelname.lower(), fields))


def _object(line: Line) -> str:
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
    return json.dumps({"time": stamp, "level": line.level, "message": line.message, **line.fields}, default=str)
