"""In which order a loader serves rows: a pure function of (seed, epoch), cheap at any position of any epoch.

Each epoch permutes the row groups of all files into one long *tape* and cuts the tape into *lanes* of equal length.
Positions of the epoch take `run` rows from each lane in turn; a lane serves its stretch of the tape window by window,
shuffled inside the window. So whoever serves a contiguous slice of every global batch reads few lanes and holds few
windows, and rows of one batch come from far apart. Data small enough to hold is one lane and one window: a uniform
shuffle. (Our choice; streaming loaders do the same with shards per node, which makes the order depend on the nodes.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

LANES = 32
RUN = 32


@dataclass(frozen=True)
class Span:
    """Consecutive positions of an epoch that one window of one lane serves."""

    lane: int
    window: int
    start: int
    """Within the window."""
    stop: int


@dataclass(frozen=True)
class Order:
    """Rows in groups, to be served once per epoch."""

    group_rows: tuple[int, ...]
    """Rows of every row group, in the files' order."""
    seed: int
    shuffled_rows: int = 16_384
    """Rows among which shuffling is uniform, over all lanes; what all workers together hold in memory."""

    @cached_property
    def rows(self) -> int:
        return sum(self.group_rows)

    @property
    def lanes(self) -> int:
        return 1 if self.rows <= self.shuffled_rows else LANES

    @property
    def window(self) -> int:
        """Rows of a lane that are shuffled together."""
        return max(1, self.shuffled_rows // self.lanes)

    def lane_rows(self, lane: int) -> int:
        """Length of a lane: what dealing `run` rows to each lane in turn leaves it with."""
        rounds, rest = divmod(self.rows, self.lanes * RUN)
        return rounds * RUN + min(RUN, max(0, rest - lane * RUN))

    def lane_start(self, lane: int) -> int:
        """Where on the tape a lane begins."""
        rounds, rest = divmod(self.rows, self.lanes * RUN)
        return lane * rounds * RUN + min(rest, lane * RUN)

    def tape(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of groups, and where on the tape each begins (one entry more than groups)."""
        return _tape(self, epoch)

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """Who serves positions [start, stop) of an epoch, in their order."""
        while start < stop:
            dealt, within = divmod(start, RUN)
            round_, lane = divmod(dealt, self.lanes)
            ordinal = round_ * RUN + within
            window, offset = divmod(ordinal, self.window)
            count = min(stop - start, RUN - within, self.window - offset)
            yield Span(lane, window, offset, offset + count)
            start += count

    def window_rows(self, epoch: int, lane: int, window: int) -> np.ndarray:
        """Tape rows of a window in the order in which it serves them."""
        first = self.lane_start(lane) + window * self.window
        count = min(self.window, self.lane_rows(lane) - window * self.window)
        return first + _random(self.seed, epoch, 1, lane, window).permutation(count)

    def window_positions(self, lane: int, window: int, count: int) -> np.ndarray:
        """Positions of the epoch that a window's rows are served at: the inverse of :meth:`spans`."""
        ordinals = window * self.window + np.arange(count)
        return (ordinals // RUN) * (self.lanes * RUN) + lane * RUN + ordinals % RUN

    def flips(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """bool (N,): whether the images at these positions of the epoch are served mirrored."""
        base = _random(self.seed, epoch, 2).integers(2**64, dtype=np.uint64)
        return (_mixed(positions.astype(np.uint64) + base) >> np.uint64(63)).astype(bool)


@lru_cache(maxsize=4)
def _tape(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    groups = _random(order.seed, epoch, 0).permutation(len(order.group_rows))
    begins = np.concatenate([[0], np.cumsum(np.array(order.group_rows, dtype=np.int64)[groups])])
    return groups, begins


def _random(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([word % 2**64 for word in words])))


def _mixed(values: np.ndarray) -> np.ndarray:
    """A 64-bit finaliser (the public SplitMix64 constants): neighbouring counters give unrelated bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
