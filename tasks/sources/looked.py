"""A run looks at its source once: what it saw holds until the run ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from tasks.sources.base import Listing, Source

_lock = Lock()
_seen: dict[Source, Listing] = {}
_runs = 0


@contextmanager
def one_look() -> Iterator[None]:
    """Within it :func:`listing_of` lists every source once, in whatever thread; nested ones share the outermost's."""
    global _runs
    with _lock:
        _runs += 1
    try:
        yield
    finally:
        with _lock:
            _runs -= 1
            if not _runs:
                _seen.clear()


def listing_of(source: Source) -> Listing:
    """The source's listing, from memory where this run has looked already."""
    with _lock:
        if source not in _seen:
            listing = source.listing()
            if not _runs:
                return listing
            _seen[source] = listing
        return _seen[source]
