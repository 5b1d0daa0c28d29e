"""The shuffle buffer: whole windows of an order come in, batch after batch goes out.

A window is arrays with the rows that this worker serves, as they lie in their row groups, and at
which of these rows each of its turns is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from tasks.data.plain_pages import take
from tasks.data.tensors import FLIP
from tasks.loading.order import Order
from tasks.loading.row_groups import Columns, RowGroupReader

MIRRORED = "mirrored"
"""A column that the order adds: whether a row is served mirrored, bool."""


@dataclass(frozen=True)
class Share:
    """What one worker serves: its slice of every global `batch` from image number `cursor` on."""

    cursor: int
    batch: int
    rank: int
    world: int

    @property
    def size(self) -> int:
        return self.batch // self.world

    def images(self, number: int) -> np.ndarray:
        """int64 (size,): the images of batch `number`, counted from the cursor."""
        first = self.cursor + number * self.batch + self.rank * self.size
        return np.arange(first, first + self.size)

    def serves(self, images: np.ndarray) -> np.ndarray:
        """bool (N,): which images of the run this worker serves."""
        ours = (images - self.cursor) % self.batch // self.size == self.rank
        return ours & (images >= self.cursor)


_Name = tuple[int, int, int]
"""Of a window: epoch, lane, number of the window in that lane."""


@dataclass
class _Window:
    """The rows of one window that this worker serves."""

    left: int
    """Rows that have not been served."""
    places: np.ndarray
    """int (turns,): at which of the rows a turn is, of the turns that this worker serves."""
    columns: Columns
    """(rows, …) each; `mirrored` among them."""


_Piece = tuple[int, int, np.ndarray, Columns]
"""Rows of a window that lie in one row group: the window's lane, the group, rows of it, int (n,)
ascending, and where they go, as which `mirrored` is there already."""


class ShuffleBuffer:
    """Gives one worker's batches, which are to be taken one after the other.

    It holds at most the rows of `order.shuffled_rows` that this worker serves, each once (mirrored
    or not), and for every lane of theirs what was decoded of one row group (of more while windows
    come in). Where one batch spans several windows of a lane, it holds these windows.

    columns: to be served, without `_flip`; the reader reads these.
    flips: take a row's tensors from the `_flip` column where the order says so.
    pool: threads that read row groups side by side.
    """

    def __init__(
        self,
        reader: RowGroupReader,
        order: Order,
        share: Share,
        columns: Sequence[str],
        flips: bool = False,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        self._reader, self._order, self._share = reader, order, share
        self._columns, self._flips = tuple(columns), flips
        self._map: Callable[..., Iterable[Any]] = pool.map if pool else map
        self._windows: dict[_Name, _Window] = {}
        self._last: dict[int, tuple[int, Columns]] = {}
        """By lane: the group in which its next window may begin, and what was decoded of it."""

    def take(self, number: int, out: Columns) -> Columns:
        """Columns of batch `number`, the batch after the last that was taken, and `mirrored`.

        out: where tensors go, float16 (images of the batch, values); the rest comes in new arrays.
        Raises UserError as the reader does.
        """
        images = self._share.images(number)
        epochs, positions = np.divmod(images, self._order.rows)
        lanes, windows, turns = self._order.windows(positions)
        names = list(zip(epochs.tolist(), lanes.tolist(), windows.tolist(), strict=True))
        runs = [(names[where.start], where) for where in _stretches(names)]
        missing = [column for column in (MIRRORED, *self._columns) if column not in out]
        rows = out | self._empty(missing, len(images))
        here = [run for run in runs if run[0] in self._windows]
        absent = [run for run in runs if run[0] not in self._windows]
        for some in (here, absent):  # so that windows are served before the next ones come
            self._enter(dict.fromkeys(name for name, _ in some if name not in self._windows))
            for name, where in some:
                window, served = self._windows[name], turns[where]
                for column, values in rows.items():
                    take(window.columns[column], window.places[served], values[where])
                window.left -= len(served)
                if not window.left:
                    del self._windows[name]
        return rows

    def _enter(self, names: Iterable[_Name]) -> None:
        """Bring in these windows."""
        pieces = [piece for name in names for piece in self._pieces(name)]
        read = zip(pieces, self._map(self._read, pieces), strict=True)
        self._last = self._last | {lane: (group, kept) for (lane, group, *_), kept in read}

    def _pieces(self, name: _Name) -> Iterator[_Piece]:
        """Make room for a window; what is to be put there."""
        order, (epoch, lane, number) = self._order, name
        tape_rows = order.window_rows(epoch, lane, number)
        positions = order.window_positions(lane, number, len(tape_rows))
        turns = np.argsort(tape_rows)  # as the rows lie in their groups
        turns = turns[self._share.serves(epoch * order.rows + positions[turns])]
        places = np.empty(len(tape_rows), np.intp)
        places[turns] = np.arange(len(turns))
        columns = self._empty((MIRRORED, *self._columns), len(turns))
        columns[MIRRORED][:] = self._flips & order.flips(epoch, positions[turns])
        self._windows[name] = _Window(len(turns), places, columns)
        groups, rows = order.locate(epoch, tape_rows[turns])
        for where in _stretches(groups.tolist()):
            out = {column: values[where] for column, values in columns.items()}
            yield lane, int(groups[where.start]), rows[where], out

    def _read(self, piece: _Piece) -> Columns:
        """Put the rows of a piece where they go. Returns what was decoded of their group."""
        lane, group, rows, out = piece
        last, kept = self._last.get(lane, (-1, None))
        mirrored = np.flatnonzero(out[MIRRORED])
        tensors = [c for c in self._columns if out[c].ndim > 1 and len(mirrored)]
        flipped = self._empty(tensors, len(mirrored))
        wanted = {column: (rows, out[column]) for column in self._columns}
        wanted |= {column + FLIP: (rows[mirrored], flipped[column]) for column in tensors}
        kept = self._reader.read(group, wanted, kept if last == group else None)
        for column in tensors:
            out[column][mirrored] = flipped[column]
        return kept

    def _empty(self, columns: Iterable[str], rows: int) -> Columns:
        """Memory for rows."""
        empty = self._reader.empty
        return {c: np.empty(rows, bool) if c == MIRRORED else empty(c, rows) for c in columns}


def _stretches(values: Sequence[Any]) -> list[slice]:
    """Where equal values stand side by side."""
    changes = [at for at in range(1, len(values)) if values[at] != values[at - 1]]
    return [slice(start, stop) for start, stop in pairwise([0, *changes, len(values)])]
