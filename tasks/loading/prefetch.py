"""Items prepared before they are asked for, by a thread that ends with their consumer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """An iterator over the same items. Close it, or leave its `with` block, to be done with it.

    ahead: items that a thread prepares before they are asked for; 0 prepares them in the caller's
        thread. An error met while preparing is raised where the item would have come.
    """

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self._items = items
        self._thread = ThreadPoolExecutor(1, "prefetch") if ahead else None
        self._coming: deque[Future[T]] = deque()
        if self._thread is not None:
            self._coming.extend(self._thread.submit(next, items) for _ in range(ahead))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._thread is None:
            return next(self._items)
        self._coming.append(self._thread.submit(next, self._items))
        return self._coming.popleft().result()

    def close(self) -> None:
        """End the thread and wait until it has let go of files. Closing again does nothing."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread, self._items = None, iter(())
        self._coming.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
