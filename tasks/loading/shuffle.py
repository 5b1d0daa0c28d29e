"""The windows of an order that a stream is in, and the batches that they fill.

Entering a window brings in all of its rows. Latents, which are large, go straight to their places in the batches that
will serve them, up to a whole shuffle ahead; the rest waits in the window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tasks.data.tensors import FLIP
from tasks.loading.memory import Buffers
from tasks.loading.order import Order
from tasks.loading.placement import Placement
from tasks.loading.prefetch import each
from tasks.loading.row_groups import Group, GroupReader


@dataclass(frozen=True)
class Share:
    """What one worker serves: its slice of every global batch from image number `cursor` on."""

    cursor: int
    batch: int
    """Global, over all workers."""
    rank: int
    world: int

    @property
    def size(self) -> int:
        return self.batch // self.world

    def positions(self, number: int) -> np.ndarray:
        """int64 (size,): the images of batch `number`, counted from the cursor."""
        first = self.cursor + number * self.batch + self.rank * self.size
        return np.arange(first, first + self.size)

    def owners(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the batch, row of this worker's slice) that serve images of the run; either is out of range
        where this worker does not serve one from here on."""
        number, row = np.divmod(positions - self.cursor, self.batch)
        return number, row - self.rank * self.size


@dataclass(frozen=True)
class Rows:
    """What a batch is made of, in its order."""

    labels: np.ndarray
    """int64 (b,)."""
    flips: np.ndarray
    """bool (b,)."""
    items: dict[str, list[Any]]
    """Keys and encoded images."""
    latents: dict[str, np.ndarray]
    """float16 (b, …)."""


class _Key(NamedTuple):
    """Of a window."""

    epoch: int
    lane: int
    window: int


@dataclass(frozen=True)
class _Window:
    """Small values of a window's rows, in the order in which they are served."""

    labels: np.ndarray
    flips: np.ndarray
    items: dict[str, list[Any]]


@dataclass(frozen=True)
class _Piece:
    """Rows of a window that one group has."""

    lane: int
    group: int
    rows: slice
    """Of the group."""
    window: _Window
    turns: np.ndarray
    """When the window serves them."""
    latents: dict[str, Placement]
    """Where their latents go, by stored column."""


@dataclass(frozen=True)
class _Filling:
    """Latents of a batch to come."""

    values: np.ndarray
    places: list[memoryview]
    """Of every row."""


class Windows:
    """Fills one worker's batches, which are to be taken one after the other.

    items: columns whose rows are kept as `bytes` or `str`.
    latents: columns of float16 tensors, by the shape of a row.
    flips: take a row's latents from the `_flip` column where the order says so.
    pool: threads that read groups side by side.
    """

    def __init__(
        self,
        reader: GroupReader,
        order: Order,
        share: Share,
        buffers: Buffers,
        items: Sequence[str] = (),
        latents: Mapping[str, tuple[int, ...]] | None = None,
        flips: bool = False,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        self.reader, self.order, self.share, self.buffers = reader, order, share, buffers
        self.items, self.latents, self.flips, self.pool = tuple(items), dict(latents or {}), flips, pool
        self._entered: dict[_Key, _Window] = {}
        self._filling: dict[int, dict[str, _Filling]] = {}
        self._last: dict[int, tuple[int, Group]] = {}

    def take(self, number: int) -> Rows:
        """Batch `number`, the one after the last that was taken. Raises UserError as the reader does."""
        first = int(self.share.positions(number)[0])
        spans = [
            (_Key(epoch, span.lane, span.window), slice(span.start, span.stop))
            for epoch, place, length in _by_epoch(first, self.share.size, self.order.rows)
            for span in self.order.spans(place, place + length)
        ]
        keys = dict.fromkeys(key for key, _ in spans)
        lanes = {key.lane for key in keys}
        # A lane's old window makes room before its next one comes.
        self._entered = {key: w for key, w in self._entered.items() if key in keys or key.lane not in lanes}
        self._enter(key for key in keys if key not in self._entered)
        served = [(self._entered[key], rows) for key, rows in spans]
        return Rows(
            np.concatenate([window.labels[rows] for window, rows in served]),
            np.concatenate([window.flips[rows] for window, rows in served]),
            {name: [item for window, rows in served for item in window.items[name][rows]] for name in self.items},
            {name: filling.values for name, filling in self._filling.pop(number, {}).items()},
        )

    def _enter(self, keys: Iterable[_Key]) -> None:
        entered: dict[_Key, _Window] = {}

        def pieces() -> Iterator[_Piece]:
            for key in keys:
                tape_rows = self.order.window_rows(*key)
                count, first = len(tape_rows), int(tape_rows.min())
                positions = self.order.window_positions(key.lane, key.window, count)
                flips = self.order.flips(key.epoch, positions) if self.flips else np.zeros(count, bool)
                window = _Window(np.empty(count, np.int64), flips, {name: [None] * count for name in self.items})
                turns = np.argsort(tape_rows)  # of rows in the tape's order, which is the files'
                batches, slots = self.share.owners(key.epoch * self.order.rows + positions)
                for group, rows, part in self._stretch(key.epoch, first, count):
                    some = turns[part]
                    latents = self._placements(rows.start, batches[some], slots[some], flips[some])
                    yield _Piece(key.lane, group, rows, window, some, latents)
                entered[key] = window

        each(self.pool, self._read, pieces())
        self._entered |= entered

    def _stretch(self, epoch: int, first: int, count: int) -> Iterator[tuple[int, slice, slice]]:
        """The groups that make up consecutive rows of the tape: (group, rows of it, which of the stretch they are)."""
        groups, begins = self.order.tape(epoch)
        owner = int(np.searchsorted(begins, first, side="right")) - 1
        while owner < len(groups) and begins[owner] < first + count:
            begin, end = int(begins[owner]), int(begins[owner + 1])
            start, stop = max(first, begin), min(first + count, end)
            yield int(groups[owner]), slice(start - begin, stop - begin), slice(start - first, stop - first)
            owner += 1

    def _placements(
        self, first: int, batches: np.ndarray, slots: np.ndarray, flipped: np.ndarray
    ) -> dict[str, Placement]:
        """Where consecutive rows of a group, the first of them number `first`, go: by stored column."""
        found: dict[str, Placement] = {}
        ours = (batches >= 0) & (slots >= 0) & (slots < self.share.size)
        for suffix, chosen in (("", ours & ~flipped), (FLIP, ours & flipped)):
            at = np.flatnonzero(chosen)
            if not len(at) or not self.latents:
                continue
            goals = list(zip(batches[at].tolist(), slots[at].tolist(), strict=True))
            filling = {number: self._begun(number) for number in {number for number, _ in goals}}
            for name in self.latents:
                places = {number: columns[name].places for number, columns in filling.items()}
                found[name + suffix] = Placement(first + at, [places[number][slot] for number, slot in goals])
        return found

    def _begun(self, number: int) -> dict[str, _Filling]:
        """The latents of a batch to come, by column."""
        if number not in self._filling:
            self._filling[number] = {
                name: _Filling(*self.buffers.take_rows((self.share.size, *shape), np.float16))
                for name, shape in self.latents.items()
            }
        return self._filling[number]

    def _read(self, piece: _Piece) -> None:
        """Bring a piece's rows into its window and to where they are wanted. Pieces have no place in common."""
        last = self._last.get(piece.lane)  # the group at a window's end is the next one's first
        if last and last[0] == piece.group and piece.latents.keys() <= last[1].columns.keys():
            group = last[1]
            group.place(piece.latents)
        else:
            group = self.reader.read(piece.group, piece.latents)
        if piece.rows.stop < self.reader.group_rows[piece.group]:
            self._last[piece.lane] = (piece.group, group)
        piece.window.labels[piece.turns] = group.labels[piece.rows]
        for name, items in piece.window.items.items():
            for turn, item in zip(piece.turns.tolist(), group.items(name, piece.rows), strict=True):
                items[turn] = item


def _by_epoch(first: int, count: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """(epoch, first position in it, length) of consecutive image numbers."""
    while count:
        epoch, place = divmod(first, rows)
        length = min(rows - place, count)
        yield epoch, place, length
        first, count = first + length, count - length
