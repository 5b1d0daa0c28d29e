"""Batches for training, from image shards or latents, in an order that no number of workers changes.

Image number p of a run (counted from 0 over all epochs) is the same image for the same seed, whatever the batch
size, the number of workers and where the run was interrupted: the cursor is the number of images seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.errors import UserError
from infra.artifacts import Artifact
from tasks.data.decode import Undecodable, load
from tasks.data.tensors import FLIP
from tasks.loading.memory import Buffers
from tasks.loading.order import Order
from tasks.loading.prefetch import Stream, each
from tasks.loading.row_groups import GroupReader
from tasks.loading.shuffle import Rows, Share, Windows

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
    threads: of this process, which read row groups side by side and decode images.
    ahead: batches prepared before they are asked for; 0 prepares them in the caller's thread.
    cache_gib: keep remote parts on this machine's disk, up to this size; 0 reads them in place.
    pin: put batches into page-locked memory, from which copies to an accelerator overlap with compute; make tensors
        of them with `tasks.loading.memory.as_tensor`.

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
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        stored = ["label", *(["key"] * keys), *stored]
        self.reader = GroupReader(artifact, split, stored, self.shapes, int(cache_gib * 2**30))
        if not self.reader.index:
            raise UserError(f"{artifact.uri}: split {split!r} has no rows")
        self.order = Order(self.reader.group_rows, seed, _SHUFFLED_IMAGES if images else _SHUFFLED_LATENTS)
        self._latents = {name: self.shapes[name] for name in self.columns if name != IMAGE}

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
        return Stream(self._batches(Share(cursor, self.batch, rank, world)), self.ahead)

    def keys_at(self, cursor: int) -> list[str]:
        """Keys of the whole global batch that begins at image number `cursor`."""
        reader = GroupReader(self.reader.artifact, self.split, ["label", "key"], {})
        share = Share(cursor, self.batch, 0, 1)
        return Windows(reader, self.order, share, Buffers(0), ["key"]).take(0).items["key"]

    # ------------------------------------------------------------------------------------------------ parts

    def _batches(self, share: Share) -> Iterator[Batch]:
        # Those that a shuffle fills, those that wait, ours, the consumer's and the one it had before.
        shuffled = -(-min(self.order.shuffled_rows, self.rows) // self.batch) + 1 if self._latents else 0
        buffers = Buffers((shuffled + self.ahead + 3) * max(1, len(self._latents)), self.pin)
        items = [name for name in self.reader.columns if name in ("key", IMAGE)]
        windows = Windows(self.reader, self.order, share, buffers, items, self._latents, self.flips, self._pool)
        for number in itertools.count():
            yield self._assemble(windows.take(number), buffers, share, number)

    def _assemble(self, rows: Rows, buffers: Buffers, share: Share, number: int) -> Batch:
        positions, keys, arrays = share.positions(number), rows.items.get("key", []), rows.latents
        if IMAGE in self.columns:
            arrays[IMAGE] = buffers.take((share.size, self.size or 0, self.size or 0, 3), np.uint8)
            mirrored, names = rows.flips.tolist(), keys or positions.tolist()
            each(self._pool, self._decode, zip(arrays[IMAGE], rows.items[IMAGE], mirrored, names, strict=True))
        images_seen = share.cursor + (number + 1) * share.batch
        return Batch(images_seen, positions, keys, rows.labels, arrays)

    def _decode(self, item: tuple[np.ndarray, bytes, bool, Any]) -> None:
        slot, data, flip, name = item
        try:
            image = load(data, self.size or 0)
        except Undecodable as error:
            raise UserError(
                f"{self.reader.artifact.uri}: image {name!r} does not decode ({error}); run shard again"
            ) from None
        slot[...] = image[:, ::-1] if flip else image
