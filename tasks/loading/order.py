"""In which order a loader serves rows: a pure function of (seed, epoch), cheap at any position.

Each epoch permutes the row groups of all files into one long *tape* and cuts the tape into *lanes*
of equal length. Positions of the epoch take `RUN` rows from each lane in turn; a lane serves its
stretch of the tape window by window, shuffled inside the window. So whoever serves a contiguous
slice of every global batch reads few lanes and holds few windows, and rows of one batch come from
far apart. Data small enough to hold is one lane and one window: a uniform shuffle. (Our choice;
streaming loaders do the same with shards per node, which makes the order depend on the nodes.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from tasks.randomness import stream

LANES = 32
RUN = 32


@dataclass(frozen=True)
class Order:
    """Rows in groups, to be served once per epoch."""

    group_rows: tuple[int, ...]
    """Rows of every row group, in the files' order."""
    seed: int
    shuffled_rows: int = 16_384
    """Rows among which shuffling is uniform, over all lanes; what all workers together hold."""

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

    @lru_cache(maxsize=4)  # noqa: B019 - orders are few and small
    def tape(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of groups, and where on the tape each begins (one entry more)."""
        groups = stream(self.seed, epoch, 0).permutation(len(self.group_rows))
        return groups, np.concatenate([[0], np.cumsum(np.array(self.group_rows)[groups])])

    def locate(self, epoch: int, tape_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The groups that rows of the tape lie in, and which rows of those they are."""
        groups, begins = self.tape(epoch)
        place = np.searchsorted(begins, tape_rows, side="right") - 1
        return groups[place], tape_rows - begins[place]

    def windows(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Who serves positions of an epoch: their lane, its window and the turn in that window."""
        dealt, within = np.divmod(positions, RUN)
        round_, lane = np.divmod(dealt, self.lanes)
        window, turn = np.divmod(round_ * RUN + within, self.window)
        return lane, window, turn

    def window_rows(self, epoch: int, lane: int, window: int) -> np.ndarray:
        """Tape rows of a window in the order in which it serves them."""
        rounds, rest = divmod(self.rows, self.lanes * RUN)
        lane_start = lane * rounds * RUN + min(rest, lane * RUN)
        lane_rows = rounds * RUN + min(RUN, max(0, rest - lane * RUN))
        before = window * self.window
        shuffled = stream(self.seed, epoch, 1, lane, window)
        return lane_start + before + shuffled.permutation(min(self.window, lane_rows - before))

    def window_positions(self, lane: int, window: int, count: int) -> np.ndarray:
        """Positions of the epoch at which a window serves its turns: inverse of :meth:`windows`."""
        turns = window * self.window + np.arange(count)
        return (turns // RUN) * (self.lanes * RUN) + lane * RUN + turns % RUN

    def flips(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """bool (N,): whether the images at these positions of the epoch are served mirrored."""
        base = stream(self.seed, epoch, 2).integers(2**64, dtype=np.uint64)
        return (_mixed(positions.astype(np.uint64) + base) >> np.uint64(63)).astype(bool)

    def places(self, images: np.ndarray) -> np.ndarray:
        """Where squares are cut from these images of the run: uniform in [0, 1), float64 (N, 2)."""
        base = stream(self.seed, 3).integers(2**64, size=2, dtype=np.uint64)
        return (_mixed(images.astype(np.uint64)[:, None] + base) >> np.uint64(11)) * 2.0**-53


def _mixed(values: np.ndarray) -> np.ndarray:
    """A 64-bit finaliser (the public SplitMix64 constants): neighbours give unrelated bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
