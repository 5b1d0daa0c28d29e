"""The shuffle buffer: whole windows of an order come in, batch after batch goes out.

A row is a tuple with one value per column. It waits under the number of the image, counted over the
whole run, as which it is to be served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.data.tensors import FLIP
from tasks.loading.beside import ReaderWithImages
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


@dataclass(frozen=True)
class _Piece:
    """Rows of one row group that belong to one window and are served by this worker."""

    lane: int
    group: int
    rows: np.ndarray
    """int (n,), ascending, of the group."""
    images: np.ndarray
    """int (n,): as which images of the run they are served; and bool (n,), whether mirrored."""
    mirrored: np.ndarray


class ShuffleBuffer:
    """Gives one worker's batches, which are to be taken one after the other.

    It holds at most the rows of `order.shuffled_rows` that this worker serves, each once (mirrored
    or not), and for every lane of theirs one row group as it was read (two while windows come in).
    Where one batch spans several windows of a lane, it holds these windows.

    columns: to be served, without `_flip`; the reader reads these.
    flips: take a row's tensors from the `_flip` column where the order says so.
    pool: threads that read row groups side by side.
    """

    def __init__(
        self,
        reader: RowGroupReader | ReaderWithImages,
        order: Order,
        share: Share,
        columns: Sequence[str],
        flips: bool = False,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        self._reader, self._order, self._share = reader, order, share
        self._columns, self._flips = tuple(columns), flips
        self._map: Callable[..., Iterable[Any]] = pool.map if pool else map
        self._rows: dict[int, tuple[Any, ...]] = {}
        self._last: dict[int, tuple[int, Columns]] = {}
        """By lane: the group that was read last. Its next window begins where this one ended."""

    def take(self, number: int) -> dict[str, tuple[Any, ...]]:
        """Values of batch `number` by column, the batch after the last that was taken.

        They are ints, `str`, `bytes` and arrays as the reader gives them; `mirrored` is among them.
        Raises UserError as the reader does.
        """
        images = self._share.images(number).tolist()
        # What is here goes first: so a lane's old window makes room before its next one comes.
        rows = [self._rows.pop(image, None) for image in images]
        if missing := [image for image, row in zip(images, rows, strict=True) if row is None]:
            self._enter(np.array(missing))
            rows = [row or self._rows.pop(i) for i, row in zip(images, rows, strict=True)]
        return dict(zip((MIRRORED, *self._columns), zip(*rows, strict=True), strict=True))

    def _enter(self, images: np.ndarray) -> None:
        """Bring in all rows of the windows that serve these images."""
        epochs, positions = np.divmod(images, self._order.rows)
        lanes, windows, _ = self._order.windows(positions)
        keys = dict.fromkeys(zip(epochs.tolist(), lanes.tolist(), windows.tolist(), strict=True))
        pieces = [piece for key in keys for piece in self._pieces(*key)]
        last = dict(self._last)
        for piece, (rows, group) in zip(pieces, self._map(self._read, pieces), strict=True):
            self._rows.update(zip(piece.images.tolist(), rows, strict=True))
            last[piece.lane] = (piece.group, group)
        self._last = last

    def _pieces(self, epoch: int, lane: int, window: int) -> Iterator[_Piece]:
        order = self._order
        tape_rows = order.window_rows(epoch, lane, window)
        positions = order.window_positions(lane, window, len(tape_rows))
        mirrored = order.flips(epoch, positions) if self._flips else np.zeros(len(positions), bool)
        images = epoch * order.rows + positions
        turns = np.argsort(tape_rows)  # as the rows lie in their groups
        turns = turns[self._share.serves(images[turns])]
        groups, rows = order.locate(epoch, tape_rows[turns])
        for group in dict.fromkeys(groups.tolist()):
            here = groups == group
            served = turns[here]
            yield _Piece(lane, group, rows[here], images[served], mirrored[served])

    def _read(self, piece: _Piece) -> tuple[list[tuple[Any, ...]], Columns]:
        """The rows of a piece, and the group that they are from."""
        number, group = self._last.get(piece.lane, (-1, {}))
        if number != piece.group:
            group = self._reader.read(piece.group)
        values = [_pick(group, name, piece.rows, piece.mirrored) for name in self._columns]
        return list(zip(piece.mirrored.tolist(), *values, strict=True)), group


def _pick(group: Columns, name: str, rows: np.ndarray, mirrored: np.ndarray) -> list[Any]:
    """One column of these rows: of a whole group as it is, else a copy that leaves the rest."""
    values, flipped = group[name], group.get(name + FLIP)
    if isinstance(values, list):
        return [values[row] for row in rows.tolist()]
    if isinstance(flipped, np.ndarray):
        picked = values[rows]
        picked[mirrored] = flipped[rows[mirrored]]
        return list(picked)
    return list(values if len(rows) == len(values) else values[rows])
