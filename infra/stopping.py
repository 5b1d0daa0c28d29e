"""How a command stops: Ctrl-C or SIGTERM once, and what can be saved is saved; twice, and it leaves at once.

Only the command line takes signals this way (`take_signals`): a flow in Prefect's worker is stopped by Prefect, a
stage on a cluster by Ray.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

SECONDS = 10.0
"""From the first Ctrl-C until the command is back, whatever still goes on."""
_SAVING = 6.0
"""How much of that a training may take to save."""
_MARGIN = 0.5
_leaving = threading.Lock()


class Stopped(KeyboardInterrupt):
    """The command was asked to stop; `where` says how far the work is, for a person."""

    def __init__(self, number: int, where: str = "") -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        if where:
            _State.where = where


class _State:
    """Of this process's command."""

    taken = False
    number = 0
    """The signal that asked; 0 before."""
    where = ""
    """How far the work is, as whoever stopped it found."""
    options = ""
    """What of --force and --from the work under way needs to go on."""
    overdue = False
    farewell: Callable[[int], None] = lambda number: None
    """What is said at the very end; it takes no time."""
    ask: Callable[[], None] | None = None
    """How the work under way is asked to save and leave by itself."""


def take_signals(farewell: Callable[[int], None]) -> None:
    """Stop on Ctrl-C and SIGTERM as described above. For the main thread, once.

    farewell: called with the signal's number just before the process ends; it must take no time.
    """
    _State.taken, _State.farewell = True, farewell
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def take_again() -> None:
    """Take SIGTERM back from a library that took it; nothing where this process does not stop by itself."""
    if _State.taken and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _handle)


def where() -> str:
    """How far the work is that was stopped, for a person; empty where nobody found out."""
    return _State.where


def note_options(options: str) -> None:
    """What of --force and --from a command needs to go on with what is under way now; empty: none."""
    _State.options = options


def options() -> str:
    return _State.options


def asked() -> int:
    """The signal that asked this command to stop; 0 where none did, or where it does not take signals itself."""
    return _State.number


@contextmanager
def saving_first(ask: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """While this lasts, a first signal asks the work under way to save and leave, instead of ending it; gives whether
    one came.

    After Ctrl-C the work has a few seconds, after SIGTERM as long as whoever sent it waits. Outside of the command
    line SIGTERM alone is taken, and a second one does what it did before.
    """
    told = threading.Event()

    def note() -> None:
        told.set()
        ask()

    if threading.current_thread() is not threading.main_thread():
        yield told.is_set
        return
    usual = signal.getsignal(signal.SIGTERM)

    def once(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, usual)
        note()

    signal.signal(signal.SIGTERM, _handle if _State.taken else once)
    _State.ask = note
    try:
        yield told.is_set
    finally:
        _State.ask = None
        signal.signal(signal.SIGTERM, usual)


def leave() -> NoReturn:
    """End this process as stopped: what there is to say is said, and nothing is waited for that can end by itself."""
    _leave(_State.number)


def _handle(number: int, frame: Any) -> None:
    if _State.overdue:
        _State.overdue = False
        raise Stopped(_State.number)
    if _State.number:
        _leave(number)
    _State.number = number
    logging.disable(logging.CRITICAL)  # what libraries say of an interruption is nothing to act upon
    ask = _State.ask
    if number == signal.SIGINT:  # before anything is asked: storage may be away
        threading.Thread(target=_hurry, args=(ask is not None,), daemon=True).start()
    if ask is None:
        raise Stopped(number)
    try:
        ask()
    except Exception:
        raise Stopped(number) from None


def _hurry(saving: bool) -> None:
    """See that the command is back in time."""
    started = time.monotonic()
    if saving:
        time.sleep(_SAVING)
        if _State.ask is not None:  # it still saves
            _State.overdue = True
            os.kill(os.getpid(), signal.SIGINT)
    time.sleep(max(0.0, SECONDS - _MARGIN - (time.monotonic() - started)))
    _leave(_State.number)


def _leave(number: int) -> NoReturn:
    """End this process now; what it started ends with it."""
    if not _leaving.acquire(blocking=False):  # another thread says it this very moment
        time.sleep(_MARGIN)
        os._exit(128 + number)
    try:
        _State.farewell(number)
    finally:
        os._exit(128 + number)
