"""Batches for training, from image shards or latents, in an order that no number of workers changes.

Image number p of a run (counted from 0 over all epochs) is the same image for the same seed, whatever the batch
size, the number of workers and where the run was interrupted: the cursor is the number of images seen.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
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
    ) -> None:
        self.columns, self.batch, self.flips, self.size = tuple(columns), batch, flips, size
        self.ahead, self.pin = ahead, pin
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
        self.reader = GroupReader(artifact, split, ["label", *(["key"] * keys), *stored], self.shapes)
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

    # ------------------------------------------------------------------------------------------------ parts

    def _batches(self, cursor: int, rank: int, world: int) -> Iterator[Batch]:
        share = self.batch // world
        window = _Windows(self.reader, self.order, world)
        while True:
            yield self._assemble(
                window, np.arange(cursor + rank * share, cursor + (rank + 1) * share), cursor + self.batch
            )
            cursor += self.batch

    def _assemble(self, windows: _Windows, positions: np.ndarray, images_seen: int) -> Batch:
        count = len(positions)
        arrays = {name: self._empty(count, name) for name in self.columns}
        labels, keys = np.empty(count, np.int64), [""] * (count if self._keys else 0)
        pixels: list[Any] = []
        for epoch, place, filled, length in _by_epoch(positions, self.rows):
            mirrored = (
                self.order.flips(epoch, np.arange(place, place + length)) if self.flips else np.zeros(length, bool)
            )
            at = 0
            for group, source, target in windows.gather(epoch, place, place + length):
                where = filled + target
                labels[where] = group.labels[source]
                if self._keys:
                    for row, slot in zip(source.tolist(), where.tolist(), strict=True):
                        keys[slot] = group.keys[row]
                flip = mirrored[target]
                for name in self.columns:
                    if name == IMAGE:
                        pixels.append((arrays[name], where, group, source, flip))
                    else:
                        _take(arrays[name], where, group, name, source, flip)
                at += len(source)
        self._decode(pixels)
        return Batch(images_seen, positions, keys, labels, arrays)

    def _decode(self, wanted: list[Any]) -> None:
        work = [
            (pixels, slot, group, row, flip)
            for pixels, where, group, source, mirrored in wanted
            for slot, row, flip in zip(where.tolist(), source.tolist(), mirrored.tolist(), strict=True)
        ]
        for _ in (self._pool.map if self._pool else map)(self._decode_one, work):
            pass

    def _decode_one(self, item: Any) -> None:
        pixels, slot, group, row, flip = item
        try:
            image = load(group.columns[IMAGE][row].as_py(), self.size or 0)
        except Undecodable as error:
            key = group.keys[row] if self._keys else f"row {row}"
            raise UserError(
                f"{self.reader.artifact.uri}: image {key!r} does not decode ({error}); run shard again"
            ) from None
        pixels[slot] = image[:, ::-1] if flip else image

    def _empty(self, count: int, name: str) -> np.ndarray:
        shape = (self.size, self.size, 3) if name == IMAGE else self.shapes[name]
        dtype = np.uint8 if name == IMAGE else np.float16
        if not self.pin:
            return np.empty((count, *shape), dtype)
        import torch

        kind = torch.uint8 if name == IMAGE else torch.float16
        return torch.empty((count, *shape), dtype=kind, pin_memory=True).numpy()


class _Windows:
    """The windows that a stream is in, one per lane, and the row groups that they lie in."""

    def __init__(self, reader: GroupReader, order: Order, world: int) -> None:
        self.reader, self.order = reader, order
        self._windows: dict[int, tuple[tuple[int, int], np.ndarray]] = {}
        self._groups: OrderedDict[int, Group] = OrderedDict()
        # A window lies in as many groups as fit in it and one more at each end; the last batch may still need two.
        largest = max(order.group_rows)
        self._kept = (-(-order.lanes // world) + 1) * (order.window // max(1, min(order.group_rows)) + 2)
        self._kept = max(4, min(self._kept, len(order.group_rows), 2 * order.lanes * (order.window // largest + 2)))

    def gather(self, epoch: int, start: int, stop: int) -> Iterator[tuple[Group, np.ndarray, np.ndarray]]:
        """For positions [start, stop) of an epoch: (group, rows in it, places in the slice), together all places."""
        groups, begins = self.order.tape(epoch)
        done = 0
        for span in self.order.spans(start, stop):
            tape_rows = self._rows(epoch, span.lane, span.window)[span.start : span.stop]
            owners = np.searchsorted(begins, tape_rows, side="right") - 1
            places = np.arange(done, done + len(tape_rows))
            done += len(tape_rows)
            for owner in np.unique(owners).tolist():
                mine = owners == owner
                yield self._group(int(groups[owner])), tape_rows[mine] - begins[owner], places[mine]

    def _rows(self, epoch: int, lane: int, window: int) -> np.ndarray:
        held = self._windows.get(lane)
        if held is None or held[0] != (epoch, window):
            held = ((epoch, window), self.order.window_rows(epoch, lane, window))
            self._windows[lane] = held
        return held[1]

    def _group(self, number: int) -> Group:
        group = self._groups.get(number)
        if group is None:
            group = self._groups[number] = self.reader.read(number)
            if len(self._groups) > self._kept:
                self._groups.popitem(last=False)
        else:
            self._groups.move_to_end(number)
        return group


def _take(out: np.ndarray, where: np.ndarray, group: Group, name: str, source: np.ndarray, flip: np.ndarray) -> None:
    """Copy rows of a latent column, mirrored ones from its twin."""
    for suffix, chosen in (("", ~flip), (FLIP, flip)):
        if chosen.any():
            out[where[chosen]] = group.tensors[name + suffix][source[chosen]]


def _by_epoch(positions: np.ndarray, rows: int) -> Iterator[tuple[int, int, int, int]]:
    """(epoch, first position in it, places already filled, length) of a run of consecutive image numbers."""
    filled = 0
    while filled < len(positions):
        epoch, place = divmod(int(positions[filled]), rows)
        length = min(rows - place, len(positions) - filled)
        yield epoch, place, filled, length
        filled += length


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
