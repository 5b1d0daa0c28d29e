"""What a training tells its tracker, sent in batches by a thread: a slow or lost tracker holds up no step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from functools import partial

from infra import logs
from infra.tracking import Tracker

Point = tuple[str, float, int]
"""Name, value, images seen."""

_PATIENCE = 60.0
"""Seconds that the end of a training waits for its tracker."""
_KEPT_POINTS = 100_000


class Sender:
    """Of one tracker. What cannot be sent now goes with the next batch; training goes on without a tracker."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tracking")
        self._lock = threading.Lock()
        self._waiting: list[Point] = []
        self._last: Future[None] | None = None
        self._told = False

    def points(self, points: list[Point]) -> None:
        """Begin to send points, and those that are left from before."""
        with self._lock:
            self._waiting = (self._waiting + points)[-_KEPT_POINTS:]
        if self._last is None or self._last.done():
            self._begin(self._send)

    def file(self, name: str, data: bytes) -> None:
        """Begin to send a small file; it is lost where that fails."""
        self._begin(partial(self._tracker.file, name, data))

    def finish(self) -> None:
        """Send what is left and wait for it, up to a minute."""
        try:
            self._begin(self._send).result(_PATIENCE)
        except TooLong:
            logs.say(f"the tracker did not answer within {_PATIENCE:.0f} seconds")
        if self._waiting:
            logs.say(f"{len(self._waiting)} logged values did not reach the tracker")

    def _begin(self, send: Callable[[], None]) -> Future[None]:
        self._last = self._thread.submit(self._guarded, send)
        return self._last

    def _guarded(self, send: Callable[[], None]) -> None:
        try:
            send()
        except Exception as error:  # of any kind: nothing that a tracker does may end a training
            if not self._told:
                self._told = True
                logs.say(f"the tracker cannot be reached, training goes on ({error})")

    def _send(self) -> None:
        with self._lock:
            points, self._waiting = self._waiting, []
        try:
            self._tracker.series(points)
        except BaseException:
            with self._lock:
                self._waiting = points + self._waiting
            raise
        self._told = False
