"""Latents with the image that each row was made of beside it, cropped and mirrored as `encode` did.

Parts of latents hold the rows of the shards' parts in their order, so the place of a row in one is
its place in the other: nothing is looked up by key, and the order law is the latents' own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from configs.errors import UserError
from infra.artifacts import Artifact
from tasks.data.decode import Undecodable, load
from tasks.loading.loader import IMAGE, Batch, Loader
from tasks.loading.order import LANES, RUN, Order
from tasks.loading.prefetch import Stream
from tasks.loading.row_groups import GroupReader

_SLACK = 1.25
"""Encoded images that are kept, over those of one shuffle: windows of different lanes end at different times."""


class LatentsWithImages(Loader):
    """A loader of latents whose batches also have the column `image`: uint8 (b, side, side, 3).

    Arguments as :class:`Loader`'s for the latents, and:

    shards: the artifact of stage `shard` that the latents were made of.
    side: in pixels, to which images are cropped.

    Memory beside the loader's own: the encoded images of one shuffle (16,384 over all workers).
    Raises UserError where the shards do not hold the latents' rows, and for a damaged image.
    """

    def __init__(
        self,
        latents: Artifact,
        shards: Artifact,
        side: int,
        split: str,
        columns: Sequence[str],
        batch: int,
        seed: int,
        *,
        threads: int = 1,
        cache_gib: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(latents, split, columns, batch, seed, threads=threads, cache_gib=cache_gib, **options)
        self.shards, self.side = shards, side
        self._decoders = ThreadPoolExecutor(threads, "decode")
        self._images = GroupReader(shards, split, ["label", IMAGE], {}, int(cache_gib * 2**30))
        stored = {entry.path: entry.rows for entry in self._images.parts}
        for entry in self.reader.parts:
            if stored.get(entry.path) != entry.rows:
                raise UserError(
                    f"{shards.uri}/{entry.path} has {stored.get(entry.path, 'no')} rows and the latents made of it in "
                    f"{latents.uri} have {entry.rows}: run encode again with these shards"
                )

    def stream(self, cursor: int = 0, rank: int = 0, world: int = 1) -> Stream[Batch]:
        """As a loader's, with images."""
        return Stream(self._with_images(super().stream(cursor, rank, world), world), self.ahead)

    def _with_images(self, batches: Stream[Batch], world: int) -> Iterator[Batch]:
        kept = _Groups(self._images, self.order.shuffled_rows / world, LANES / world)
        try:
            for batch in batches:
                yield replace(batch, arrays=batch.arrays | {IMAGE: self._pixels(batch.positions, kept)})
        finally:
            batches.close()

    def _pixels(self, positions: np.ndarray, kept: _Groups) -> np.ndarray:
        import torch

        shape = (len(positions), self.side, self.side, 3)
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin).numpy()
        part, row, mirrored = self._places(positions)
        encoded = kept.images(part, row)
        list(self._decoders.map(self._decoded, pixels, encoded, mirrored.tolist(), positions.tolist()))
        return pixels

    def _decoded(self, slot: np.ndarray, data: bytes, mirrored: bool, position: int) -> None:
        try:
            image = load(data, self.side)
        except Undecodable as error:
            raise UserError(
                f"{self.shards.uri}: image number {position} of the training does not decode ({error}); run shard again"
            ) from None
        slot[...] = image[:, ::-1] if mirrored else image

    def _places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(N,) each: the part of every image of the run, its row there, and whether it is served mirrored."""
        group, row, mirrored = places(self.order, positions)
        index = np.array(self.reader.index)[group]
        per_group = int(self.reader.artifact.manifest.facts["rows_per_group"])
        return index[:, 0], index[:, 1] * per_group + row, mirrored & self.flips


def places(order: Order, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N,) each: the row group that serves every image of the run, its row there, and whether it is mirrored."""
    group, row = np.empty((2, len(positions)), np.int64)
    mirrored = np.empty(len(positions), bool)
    epochs, within = np.divmod(positions, order.rows)
    dealt, turn = np.divmod(within, RUN)
    rounds, lanes = np.divmod(dealt, order.lanes)
    windows, turns = np.divmod(rounds * RUN + turn, order.window)
    for epoch in np.unique(epochs).tolist():
        groups, begins = order.tape(epoch)
        its = epochs == epoch
        mirrored[its] = order.flips(epoch, within[its])
        for lane, window in set(zip(lanes[its].tolist(), windows[its].tolist(), strict=True)):
            mine = its & (lanes == lane) & (windows == window)
            tape = order.window_rows(epoch, lane, window)[turns[mine]]
            place = np.searchsorted(begins, tape, side="right") - 1
            group[mine], row[mine] = groups[place], tape - begins[place]
    return group, row, mirrored


class _Groups:
    """Encoded images by part and row, read in whole row groups, of which the last used are kept.

    rows: images that one shuffle holds; lanes: stretches of files that are read side by side.
    """

    def __init__(self, reader: GroupReader, rows: float, lanes: float) -> None:
        self._reader = reader
        self._per_group = int(reader.artifact.manifest.facts["rows_per_group"])
        self._numbers = {(part, group): number for number, (part, group, _) in enumerate(reader.index)}
        self._most = int(_SLACK * rows / self._per_group) + 2 * (int(lanes) + 1)
        self._kept: OrderedDict[int, list[bytes]] = OrderedDict()

    def images(self, parts: np.ndarray, rows: np.ndarray) -> list[bytes]:
        """Encoded images at these rows of these parts."""
        found = []
        for part, row in zip(parts.tolist(), rows.tolist(), strict=True):
            group, within = divmod(row, self._per_group)
            found.append(self._group(self._numbers[part, group])[within])
        return found

    def _group(self, number: int) -> list[bytes]:
        if number not in self._kept:
            self._kept[number] = self._reader.read(number, {}).items(IMAGE, slice(None))
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]
