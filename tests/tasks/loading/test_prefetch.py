from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Iterator

import pytest

from tasks.loading.prefetch import Prefetcher


class Source:
    """Counts without end, and says whether it is still referred to."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def items(self, fail_at: int | None = None) -> Iterator[int]:
        try:
            for number in itertools.count():
                if number == fail_at:
                    raise OSError("no more")
                yield number
        finally:
            self.released.set()


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_items_come_in_order_and_errors_in_their_place(ahead: int) -> None:
    with Prefetcher(Source().items(fail_at=5), ahead) as stream:
        assert list(itertools.islice(stream, 5)) == [0, 1, 2, 3, 4]
        with pytest.raises(OSError, match="no more"):
            next(stream)
        assert list(stream) == []
    with Prefetcher(iter([1, 2]), ahead) as stream:
        assert list(stream) == [1, 2] and list(stream) == []


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_closed_stream_has_let_go(ahead: int) -> None:
    source, before = Source(), threading.active_count()
    with Prefetcher(source.items(), ahead) as stream:
        assert next(stream) == 0
    assert threading.active_count() == before and source.released.is_set()
    assert list(stream) == []
    stream.close()


def test_a_forgotten_stream_ends_its_thread() -> None:
    source = Source()
    stream = Prefetcher(source.items(), 2)
    next(stream)
    del stream
    gc.collect()
    assert source.released.wait(30)
