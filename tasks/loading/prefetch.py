"""Items prepared ahead by a thread that ends with the stream it works for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")

_POLL = 0.1
"""Seconds in which a thread with a full queue notices that nobody wants more."""


def each(pool: ThreadPoolExecutor | None, do: Callable[[T], None], work: Iterable[T]) -> None:
    """Do it to every item, by a pool's threads where there is one. Raises the first error met, in the items' order."""
    if pool is None:
        for item in work:
            do(item)
        return
    futures = []
    try:
        futures += [pool.submit(do, item) for item in work]
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)  # nobody writes to memory any more


class Stream(Generic[T]):
    """An iterator over the same items. Close it, or leave its `with` block, to be done with it.

    ahead: items that a thread prepares before they are asked for; 0 prepares them in the caller's thread. An error met
        while preparing is raised where the item would have come.
    """

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self._items: Iterator[T] | None = items
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if ahead:
            # The thread knows nothing of this object, so that a forgotten stream is collected, and the thread ends.
            work = (items, self._ready, self._closed)
            self._thread = threading.Thread(target=_prepare, args=work, name="stream", daemon=True)
            self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._items is None:
            raise StopIteration
        if self._thread is None:
            return next(self._items)
        item, error = self._ready.get()
        if error is not None:
            self.close()
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread and wait until it has let go of files and memory. Closing again does nothing."""
        self._items = None
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self._closed.set()  # without waiting: whichever thread collects us may be one that ours waits for


def _prepare(items: Iterator[Any], ready: queue.Queue[Any], closed: threading.Event) -> None:
    try:
        for item in items:
            _hand_over((item, None), ready, closed)
            del item  # its memory serves a later one as soon as the consumer lets go of it
            if closed.is_set():
                return
        _hand_over((None, StopIteration()), ready, closed)
    except BaseException as error:
        _hand_over((None, error), ready, closed)


def _hand_over(item: Any, ready: queue.Queue[Any], closed: threading.Event) -> None:
    while not closed.is_set():
        try:
            ready.put(item, timeout=_POLL)
            return
        except queue.Full:
            continue
