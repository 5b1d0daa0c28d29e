"""Batches for training, from image shards or latents, in an order that no number of workers changes.

Image number p of a run (counted from 0 over all epochs) is the same image for the same seed, whatever the batch
size, the number of workers and where the run was interrupted: the cursor is the number of images seen.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.errors import UserError
from infra.artifacts import Artifact
from tasks.decode import Undecodable, load
from tasks.groups_reader import Group, GroupReader
from tasks.latents import FLIP
from tasks.order import Order

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
    """(b, …) per column: latents float16 (b, C, h, w), images uint8 (b, size, size, 3)."""


class Loader:
    """Endless, restartable batches of one split of an artifact.

    artifact: of stage `shard` (column `image`, decoded and cropped to `size`) or `encode` (latent columns).
    columns: names without `_flip`.
    batch: global batch, over all workers.
    flips: serve each image mirrored in half of the epochs, as the seed says: latents from their `_flip` column.
    threads: image decoders of this process.
    ahead: batches prepared before they are asked for; 0 prepares them in the caller's thread.
    cache_gib: keep remote parts on this machine's disk, up to this size; 0 reads them in place.
    pin: put batches into page-locked memory, from which copies to an accelerator overlap with compute.

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
        self.ahead, self.pin, self.split = ahead, pin, split
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
        self.reader = GroupReader(
            artifact, split, ["label", *(["key"] * keys), *stored], self.shapes, int(cache_gib * 2**30)
        )
        if not self.reader.index:
            raise UserError(f"{artifact.uri}: split {split!r} has no rows")
        self.order = Order(self.reader.group_rows, seed, _SHUFFLED_IMAGES if images else _SHUFFLED_LATENTS)
        self._pool = ThreadPoolExecutor(threads) if images and threads > 1 else None
        self._keys = keys

    @property
    def rows(self) -> int:
        """Images of the split: the length of an epoch."""
        return self.order.rows

    def stream(self, cursor: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Worker `rank`'s slices of the global batches from image number `cursor` on, without end.

        Raises:
            ValueError: the batch does not divide over the workers.
        """
        if self.batch % world:
            raise ValueError(f"a global batch of {self.batch} does not divide over {world} workers")
        return (
            ahead_of(self._batches(cursor, rank, world), self.ahead)
            if self.ahead
            else self._batches(cursor, rank, world)
        )

    def keys_at(self, cursor: int) -> list[str]:
        """Keys of the whole global batch that begins at image number `cursor`."""
        reader = GroupReader(self.reader.artifact, self.split, ["label", "key"], {})
        windows, keys = _Windows(reader, self.order, False), list[str]()
        for epoch, place, length in _by_epoch(cursor, self.batch, self.rows):
            for span in self.order.spans(place, place + length):
                keys += windows.get(epoch, span.lane, span.window).keys[span.start : span.stop].tolist()
        return keys

    # ------------------------------------------------------------------------------------------------ parts

    def _batches(self, cursor: int, rank: int, world: int) -> Iterator[Batch]:
        share = self.batch // world
        windows = _Windows(self.reader, self.order, self.flips)
        while True:
            yield self._assemble(
                windows, np.arange(cursor + rank * share, cursor + (rank + 1) * share), cursor + self.batch
            )
            cursor += self.batch

    def _assemble(self, windows: _Windows, positions: np.ndarray, images_seen: int) -> Batch:
        count = len(positions)
        arrays = {name: self._empty(count, name) for name in self.columns}
        labels, keys = np.empty(count, np.int64), list[str]()
        images: list[tuple[np.ndarray, bytes, bool, str]] = []
        filled = 0
        for epoch, place, length in _by_epoch(int(positions[0]), count, self.rows):
            for span in self.order.spans(place, place + length):
                window = windows.get(epoch, span.lane, span.window)
                rows, places = slice(span.start, span.stop), slice(filled, filled + span.stop - span.start)
                labels[places] = window.labels[rows]
                names = window.keys[rows].tolist() if self._keys else [""] * (span.stop - span.start)
                keys += names
                for name in self.columns:
                    if name == IMAGE:
                        slots = arrays[name][places]
                        images += zip(slots, window.images[rows], window.flips[rows], names, strict=True)
                    else:
                        arrays[name][places] = window.tensors[name][rows]
                filled = places.stop
        for _ in (self._pool.map if self._pool else map)(self._decode, images):
            pass
        return Batch(images_seen, positions, keys if self._keys else [], labels, arrays)

    def _decode(self, item: tuple[np.ndarray, bytes, bool, str]) -> None:
        slot, data, flip, key = item
        try:
            image = load(data, self.size or 0)
        except Undecodable as error:
            raise UserError(
                f"{self.reader.artifact.uri}: image {key!r} does not decode ({error}); run shard again"
            ) from None
        slot[...] = image[:, ::-1] if flip else image

    def _empty(self, count: int, name: str) -> np.ndarray:
        shape = (self.size, self.size, 3) if name == IMAGE else self.shapes[name]
        dtype = np.uint8 if name == IMAGE else np.float16
        if not self.pin:
            return np.empty((count, *shape), dtype)
        import torch

        kind = torch.uint8 if name == IMAGE else torch.float16
        return torch.empty((count, *shape), dtype=kind, pin_memory=True).numpy()


@dataclass(frozen=True)
class _Window:
    """Rows of one window in the order in which they are served; latents are already the chosen flip."""

    labels: np.ndarray
    keys: np.ndarray
    images: np.ndarray
    flips: np.ndarray
    tensors: dict[str, np.ndarray]


class _Windows:
    """The windows that a stream is in, one per lane, filled from row groups as it enters them."""

    def __init__(self, reader: GroupReader, order: Order, flips: bool) -> None:
        self.reader, self.order, self.flips = reader, order, flips
        self._held: dict[int, tuple[tuple[int, int], _Window]] = {}
        self._last: dict[int, tuple[int, Group]] = {}

    def get(self, epoch: int, lane: int, window: int) -> _Window:
        held = self._held.get(lane)
        if held is None or held[0] != (epoch, window):
            buffers = held[1].tensors if held is not None else {}
            held = self._held[lane] = ((epoch, window), self._filled(epoch, lane, window, buffers))
        return held[1]

    def _filled(self, epoch: int, lane: int, window: int, buffers: dict[str, np.ndarray]) -> _Window:
        """A window, in the memory of the one before it: fresh pages cost as much as what is written to them."""
        groups, begins = self.order.tape(epoch)
        tape_rows = self.order.window_rows(epoch, lane, window)
        count, first = len(tape_rows), int(tape_rows.min())
        places = np.empty(count, np.int64)
        places[tape_rows - first] = np.arange(count)  # where each row of the tape goes
        flips = np.zeros(count, bool)
        if self.flips:
            flips = self.order.flips(epoch, self.order.window_positions(lane, window, count))
        whole = buffers if all(len(buffer) == count for buffer in buffers.values()) else {}
        made = _Window(np.empty(count, np.int64), np.empty(count, object), np.empty(count, object), flips, whole)
        owner = int(np.searchsorted(begins, first, side="right")) - 1
        while owner < len(groups) and begins[owner] < first + count:
            start, stop = max(first, int(begins[owner])), min(first + count, int(begins[owner + 1]))
            rows = slice(start - int(begins[owner]), stop - int(begins[owner]))
            self._pour(self._group(lane, int(groups[owner])), rows, made, places[start - first : stop - first])
            owner += 1
        return made

    def _pour(self, group: Group, rows: slice, window: _Window, places: np.ndarray) -> None:
        """Put consecutive rows of a group at their places in a window."""
        window.labels[places] = group.labels[rows]
        if "key" in group.columns:
            window.keys[places] = group.keys[rows]
        if IMAGE in group.columns:
            window.images[places] = group.images[rows]
        flips = window.flips[places]
        for name, values in group.tensors.items():
            if name.endswith(FLIP):
                continue
            target = window.tensors.get(name)
            if target is None:
                target = window.tensors[name] = np.empty((len(window.labels), *values.shape[1:]), values.dtype)
            if not flips.any():
                target[places] = values[rows]
                continue
            target[places[~flips]] = values[rows][~flips]
            target[places[flips]] = group.tensors[name + FLIP][rows][flips]

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


def ahead_of(items: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """The same items, prepared by a thread up to `depth` ahead; its errors appear here, and it ends with us."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()

    def hand_over(item: Any) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def prepare() -> None:
        try:
            for item in items:
                hand_over((item, None))
                if stop.is_set():
                    return
        except BaseException as error:
            hand_over((None, error))

    threading.Thread(target=prepare, name="loader", daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
