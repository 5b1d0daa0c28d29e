"""Batches for training, from image shards or latents, in an order that no number of workers changes.

Image number p of a run (counted from 0 over all epochs) is the same image for the same seed, whatever the batch
size, the number of workers and where the run was interrupted: the cursor is the number of images seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.errors import UserError
from infra.artifacts import Artifact
from tasks.buffers import Buffers
from tasks.decode import Undecodable, load
from tasks.groups_reader import Group, GroupReader
from tasks.latents import FLIP
from tasks.order import Order
from tasks.stream import Stream

IMAGE = "image"
_SHUFFLED_LATENTS = 16_384
_SHUFFLED_IMAGES = 4_096


@dataclass(frozen=True)
class Batch:
    """One worker's slice of one global batch."""

    images_seen: int
    """Cursor after this batch, over all workers: restart from it to go on with the next."""
    positions: np.ndarray
    """int64 (b,): the number of each row among all images of the run; random numbers belong to it."""
    keys: list[str]
    labels: np.ndarray
    """int64 (b,)."""
    arrays: dict[str, np.ndarray]
    """(b, …) per column: latents float16 (b, C, h, w), images uint8 (b, size, size, 3). Their memory serves a later
    batch once nothing refers to it: arrays, slices and tensors over it stay as they are for as long as they live."""


class Loader:
    """Endless, restartable batches of one split of an artifact.

    artifact: of stage `shard` (column `image`, decoded and cropped to `size`) or `encode` (latent columns).
    columns: names without `_flip`.
    batch: global batch, over all workers.
    flips: serve each image mirrored in half of the epochs, as the seed says: latents from their `_flip` column.
    threads: image decoders of this process; latents, too, are put in place by so many.
    ahead: batches prepared before they are asked for; 0 prepares them in the caller's thread.
    cache_gib: keep remote parts on this machine's disk, up to this size; 0 reads them in place.
    pin: put batches into page-locked memory, from which copies to an accelerator overlap with compute; make tensors
        of them with `tasks.buffers.as_tensor`.

    Raises:
        UserError: columns or flips that the artifact does not have, an empty split, damaged files.
    """

    def __init__(
        self,
        artifact: Artifact,
        split: str,
        columns: Sequence[str],
        batch: int,
        seed: int,
        *,
        flips: bool = False,
        size: int | None = None,
        threads: int = 1,
        ahead: int = 4,
        keys: bool = True,
        pin: bool = False,
        cache_gib: float = 0.0,
    ) -> None:
        self.columns, self.batch, self.flips, self.size = tuple(columns), batch, flips, size
        self.ahead, self.pin, self.split, self.threads = ahead, pin, split, threads
        images = IMAGE in self.columns
        if images and size is None:
            raise ValueError("a loader of images needs `size`, the side in pixels they are cropped to")
        facts = artifact.manifest.facts
        self.shapes = {name: tuple(shape) for name, shape in facts.get("shapes", {}).items()}
        stored = [name + suffix for name in self.columns for suffix in ("", FLIP)[: 1 + (flips and name != IMAGE)]]
        missing = [name for name in stored if name not in self.shapes and name != IMAGE]
        if missing:
            raise UserError(
                f"{artifact.uri} has no columns {', '.join(missing)} (it has {', '.join(self.shapes) or 'images'}): "
                "check encode.align_features, image.flips and train_semvae in its recipe"
            )
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        stored = ["label", *(["key"] * keys), *stored]
        self.reader = GroupReader(artifact, split, stored, self.shapes, int(cache_gib * 2**30), self._pool)
        if not self.reader.index:
            raise UserError(f"{artifact.uri}: split {split!r} has no rows")
        self.order = Order(self.reader.group_rows, seed, _SHUFFLED_IMAGES if images else _SHUFFLED_LATENTS)
        self._keys = keys

    @property
    def rows(self) -> int:
        """Images of the split: the length of an epoch."""
        return self.order.rows

    def stream(self, cursor: int = 0, rank: int = 0, world: int = 1) -> Stream[Batch]:
        """Worker `rank`'s slices of the global batches from image number `cursor` on, without end; to be closed.

        Raises:
            ValueError: the batch does not divide over the workers.
        """
        if self.batch % world:
            raise ValueError(f"a global batch of {self.batch} does not divide over {world} workers")
        return Stream(self._batches(cursor, rank, world), self.ahead)

    def keys_at(self, cursor: int) -> list[str]:
        """Keys of the whole global batch that begins at image number `cursor`."""
        reader = GroupReader(self.reader.artifact, self.split, ["label", "key"], {})
        windows, keys = _Windows(reader, self.order, ("key",), False), list[str]()
        for epoch, place, length in _by_epoch(cursor, self.batch, self.rows):
            for span in self.order.spans(place, place + length):
                keys += windows.get(epoch, span.lane, span.window).items["key"][span.start : span.stop]
        return keys

    # ------------------------------------------------------------------------------------------------ parts

    def _batches(self, cursor: int, rank: int, world: int) -> Iterator[Batch]:
        share = self.batch // world
        buffers = Buffers(self.ahead + 3, self.pin)  # waiting ones, ours, the consumer's and the one it had before
        columns = (*self.columns, "key") if self._keys else self.columns
        windows = _Windows(self.reader, self.order, columns, self.flips)
        while True:
            positions = np.arange(cursor + rank * share, cursor + (rank + 1) * share)
            cursor += self.batch
            yield self._assemble(windows, buffers, positions, cursor)

    def _assemble(self, windows: _Windows, buffers: Buffers, positions: np.ndarray, images_seen: int) -> Batch:
        labels, flips = list[np.ndarray](), list[np.ndarray]()
        items: dict[str, list[Any]] = {name: [] for name in windows.columns}
        for epoch, place, length in _by_epoch(int(positions[0]), len(positions), self.rows):
            for span in self.order.spans(place, place + length):
                window, rows = windows.get(epoch, span.lane, span.window), slice(span.start, span.stop)
                labels.append(window.labels[rows])
                flips.append(window.flips[rows])
                for name in items:
                    items[name] += window.items[name][rows]
        keys = items.pop("key", [])
        arrays = {}
        for name, rows_of_it in items.items():
            if name == IMAGE:
                arrays[name] = buffers.take((len(positions), self.size or 0, self.size or 0, 3), np.uint8)
                mirrored = np.concatenate(flips).tolist()
                self._each(
                    self._decode, zip(arrays[name], rows_of_it, mirrored, keys or positions.tolist(), strict=True)
                )
            else:
                arrays[name] = buffers.take((len(positions), *self.shapes[name]), np.float16)
                self._each(_put, _pieces(arrays[name].reshape(len(positions), -1), rows_of_it, self.threads))
        return Batch(images_seen, positions, keys, np.concatenate(labels), arrays)

    def _each(self, do: Callable[[Any], None], work: Iterable[Any]) -> None:
        for _ in (self._pool.map if self._pool else map)(do, work):
            pass

    def _decode(self, item: tuple[np.ndarray, bytes, bool, Any]) -> None:
        slot, data, flip, name = item
        try:
            image = load(data, self.size or 0)
        except Undecodable as error:
            raise UserError(
                f"{self.reader.artifact.uri}: image {name!r} does not decode ({error}); run shard again"
            ) from None
        slot[...] = image[:, ::-1] if flip else image


def _pieces(target: np.ndarray, rows: list[np.ndarray], count: int) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    size = -(-len(rows) // count)
    return ((target[start : start + size], rows[start : start + size]) for start in range(0, len(rows), size))


def _put(piece: tuple[np.ndarray, list[np.ndarray]]) -> None:
    """Copy rows from wherever they lie to their places, in one pass and without the interpreter's lock."""
    target, rows = piece
    np.concatenate(rows, out=target.reshape(-1))


@dataclass(frozen=True)
class _Window:
    """Rows of one window in the order in which they are served; latents are views of the chosen flip's values."""

    labels: np.ndarray
    flips: np.ndarray
    items: dict[str, list[Any]]


class _Windows:
    """The windows that a stream is in, one per lane; they refer to the row groups that their rows come from."""

    def __init__(self, reader: GroupReader, order: Order, columns: Sequence[str], flips: bool) -> None:
        self.reader, self.order, self.columns, self.flips = reader, order, tuple(columns), flips
        self._held: dict[int, tuple[tuple[int, int], _Window]] = {}
        self._last: dict[int, tuple[int, Group]] = {}

    def get(self, epoch: int, lane: int, window: int) -> _Window:
        held = self._held.get(lane)
        if held is None or held[0] != (epoch, window):
            self._held.pop(lane, None)  # not both at once in memory
            held = self._held[lane] = ((epoch, window), self._entered(epoch, lane, window))
        return held[1]

    def _entered(self, epoch: int, lane: int, window: int) -> _Window:
        tape_rows = self.order.window_rows(epoch, lane, window)
        count, first = len(tape_rows), int(tape_rows.min())
        served = tape_rows - first
        pieces = list(self._stretch(epoch, lane, first, count))
        flips = np.zeros(count, bool)
        if self.flips:
            flips = self.order.flips(epoch, self.order.window_positions(lane, window, count))

        def items(name: str) -> list[Any]:
            return [item for group, rows in pieces for item in group.items(name, rows)]

        found, places = {}, served.tolist()
        for name in self.columns:
            plain = items(name)
            if name + FLIP in self.reader.columns:
                both = (plain, items(name + FLIP))
                found[name] = [both[flip][row] for flip, row in zip(flips.tolist(), places, strict=True)]
            else:
                found[name] = [plain[row] for row in places]
        labels = np.concatenate([group.labels[rows] for group, rows in pieces])[served].astype(np.int64)
        return _Window(labels, flips, found)

    def _stretch(self, epoch: int, lane: int, first: int, count: int) -> Iterator[tuple[Group, slice]]:
        """The groups, and rows of them, that make up consecutive rows of the tape."""
        groups, begins = self.order.tape(epoch)
        owner = int(np.searchsorted(begins, first, side="right")) - 1
        while owner < len(groups) and begins[owner] < first + count:
            begin = int(begins[owner])
            rows = slice(max(first, begin) - begin, min(first + count, int(begins[owner + 1])) - begin)
            yield self._group(lane, int(groups[owner])), rows
            owner += 1

    def _group(self, lane: int, number: int) -> Group:
        """A row group; the one at a window's end is the next one's first, so each lane keeps its last."""
        last = self._last.get(lane)
        if last is None or last[0] != number:
            self._last.pop(lane, None)
            last = self._last[lane] = (number, self.reader.read(number))
        return last[1]


def _by_epoch(first: int, count: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """(epoch, first position in it, length) of consecutive image numbers."""
    while count:
        epoch, place = divmod(first, rows)
        length = min(rows - place, count)
        yield epoch, place, length
        first, count = first + length, count - length
