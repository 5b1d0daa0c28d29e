"""The one exception whose message is written for the person at the keyboard."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


_LONGEST = 3000
"""Characters of a line."""


def _shown(line: str) -> str:
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST - 1000]} … {line[-999:]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def brief(error: object, most: int = 200) -> str:
    """What an error says, on one line of so many characters; its kind, where it says nothing."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


class UserError(Exception):
    """A mistake that its reader can mend: the message says what, where, and what to do.

    The command line prints it as one line and exits with status 1; anything else is a defect of ours
    and keeps its traceback.

    What it quotes is often of others' making: of a line without end the middle is left out, and what a terminal would
    obey is spelled out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__("\n".join(map(_shown, str(message).split("\n"))))


class Unreachable(UserError):
    """Something outside did not answer: the same may go well a little later."""


def attempt(call: Callable[[], T]) -> T | UserError:
    """What a call returns, or the UserError that it raises, as a value: so it comes out of an actor
    or a task in its own words, where a raised one would end in Ray's traceback."""
    try:
        return call()
    except UserError as error:
        return error


def checked(value: T | UserError) -> T:
    """What :func:`attempt` gave. Raises the error that it is."""
    if isinstance(value, UserError):
        raise value
    return value
