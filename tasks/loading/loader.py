"""Batches for training, from image shards or latents, in an order of their own.

Image number p of a run (counted from 0 over all epochs) is the same image for the same seed,
whatever the batch size, the number of workers and where the run was interrupted: the cursor is the
number of images seen.

Four things with a file each: the order says which row of which row group image number p is, the
reader reads row groups, the shuffle buffer keeps their rows until it is their turn, the prefetcher
has batches made of them before they are asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from configs.errors import UserError
from infra.artifacts import Artifact
from tasks.data.crops import Crop
from tasks.data.decode import Undecodable, decode
from tasks.data.tensors import FLIP
from tasks.loading.beside import IMAGE, ReaderWithImages
from tasks.loading.order import Order
from tasks.loading.prefetch import Prefetcher
from tasks.loading.row_groups import Columns, RowGroupReader
from tasks.loading.shuffle import MIRRORED, Share, ShuffleBuffer

_SHUFFLED_LATENTS = 16_384
_SHUFFLED_IMAGES = 4_096


@dataclass(frozen=True)
class Batch:
    """One worker's slice of one global batch."""

    images_seen: int
    """Cursor after this batch, over all workers: restart from it to go on with the next."""
    positions: np.ndarray
    """int64 (b,): the numbers of its images in the run; random numbers belong to them."""
    keys: list[str]
    labels: np.ndarray
    """int64 (b,)."""
    arrays: dict[str, Any]
    """(b, …) per column: latents float16 (b, C, h, w), images uint8 (b, size, size, 3). Numpy
    arrays, or torch's tensors where they are in page-locked memory."""


class Loader:
    """Endless, restartable batches of one split of an artifact.

    Memory of a stream: its worker's share of one shuffle (16,384 rows of latents or 4,096 encoded
    images, over all workers); what has to be decoded of one row group (of latents on local disk
    the keys), for each of the 32 lanes that it serves and for each thread; `ahead` batches and one.

    artifact: of stage `shard` (column `image`) or `encode` (latent columns).
    columns: names without `_flip`.
    batch: global batch, over all workers.
    flips: serve each image mirrored in half of the epochs, latents from their `_flip` column.
    crop: the squares of images that are served.
    threads: of this process, which read row groups side by side and decode images.
    ahead: batches prepared before they are asked for; 0 prepares them in the caller's thread.
    pin: batches in page-locked memory, from which copies to an accelerator overlap with compute.
    cache_gib: keep remote parts on this machine's disk, up to this size; 0 reads them in place.
    shards: what the latents were made of, to serve its `image` beside them.
    images_until: batches that come to so many images are served without `image`, and none of it is decoded.

    Raises UserError on columns or flips that are not there, on an empty split and other shards.
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
        crop: Crop | None = None,
        threads: int = 1,
        ahead: int = 4,
        keys: bool = True,
        pin: bool = False,
        cache_gib: float = 0.0,
        shards: Artifact | None = None,
        images_until: int | None = None,
    ) -> None:
        self.images_until = images_until
        self.columns, self.batch, self.flips, self.crop = tuple(columns), batch, flips, crop
        self.ahead, self.pin, self.split = ahead, pin, split
        if IMAGE in self.columns and crop is None:
            raise ValueError("a loader of images needs `crop`, the squares that it serves")
        facts = artifact.manifest.facts.get("shapes", {})
        self.shapes = {name: tuple(shape) for name, shape in facts.items()}
        latents = [name for name in self.columns if name != IMAGE]
        flipped = [name + FLIP for name in latents if flips]
        if missing := [name for name in (*latents, *flipped) if name not in self.shapes]:
            stored = ", ".join(self.shapes) or "images"
            raise UserError(
                f"{artifact.uri} has no columns {', '.join(missing)} (it has {stored}): "
                "check encode.align_features, image.flips and train_semvae in its recipe"
            )
        named = ["key"] if keys or IMAGE in self.columns else []  # what does not decode is named
        self._served = ["label", *named, *self.columns]
        read = [name for name in self._served if name != IMAGE or shards is None] + flipped
        options = artifact, split, read, self.shapes, int(cache_gib * 2**30)
        self.reader = ReaderWithImages(shards, *options) if shards else RowGroupReader(*options)
        self._images_from = shards or artifact
        if not self.reader.index:
            raise UserError(f"{artifact.uri}: split {split!r} has no rows")
        shuffled = _SHUFFLED_LATENTS if latents or shards else _SHUFFLED_IMAGES
        self.order = Order(self.reader.group_rows, seed, shuffled)
        self.rows = self.order.rows
        """Images of the split: the length of an epoch."""
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def stream(self, cursor: int = 0, rank: int = 0, world: int = 1) -> Prefetcher[Batch]:
        """Worker `rank`'s slices of the global batches from image number `cursor` on.

        It has no end and is to be closed. Raises ValueError where the batch does not divide.
        """
        if self.batch % world:
            raise ValueError(f"a batch of {self.batch} does not divide over {world} workers")
        return Prefetcher(self._batches(Share(cursor, self.batch, rank, world)), self.ahead)

    def keys_at(self, cursor: int) -> list[str]:
        """Keys of the whole global batch that begins at image number `cursor`."""
        reader = RowGroupReader(self.reader.artifact, self.split, ["key"], {})
        share = Share(cursor, self.batch, rank=0, world=1)
        return list(ShuffleBuffer(reader, self.order, share, ["key"]).take(0, {})["key"])

    def _batches(self, share: Share) -> Iterator[Batch]:
        reader, order, flips = self.reader, self.order, self.flips
        buffer = ShuffleBuffer(reader, order, share, self._served, flips, self._pool)
        for number in itertools.count():
            seen = share.cursor + (number + 1) * share.batch
            over = self.images_until is not None and seen >= self.images_until
            arrays = {name: self._empty(name, share.size) for name in self.columns if not (over and name == IMAGE)}
            flat = {n: np.asarray(arrays[n]).reshape(share.size, -1) for n in arrays if n != IMAGE}
            images, rows = share.images(number), buffer.take(number, flat)
            if IMAGE in arrays:
                self._decode(images, rows, np.asarray(arrays[IMAGE]))
            yield Batch(seen, images, list(rows.get("key", ())), rows["label"].astype(np.int64), arrays)

    def _empty(self, name: str, images: int) -> Any:
        """Memory for a column of a batch."""
        shape, dtype = self.shapes.get(name, ()), "float16"
        if name == IMAGE and (crop := self.crop):
            shape, dtype = (crop.size, crop.size, 3), crop.dtype
        if not self.pin:
            return np.empty((images, *shape), dtype)
        import torch  # whose pool of such memory knows which copies are still under way

        return torch.empty((images, *shape), dtype=getattr(torch, dtype), pin_memory=True)

    def _decode(self, images: np.ndarray, rows: Columns, out: np.ndarray) -> None:
        """Put squares of encoded images into a batch."""
        crop = cast(Crop, self.crop)
        places = self.order.places(images).tolist() if crop.random else [None] * len(images)

        def cut(at: int) -> None:
            try:
                square = crop(decode(rows[IMAGE][at]), places[at])
            except Undecodable as error:
                told = f"image {rows['key'][at]!r} does not decode ({error}); run shard again"
                raise UserError(f"{self._images_from.uri}: {told}") from None
            out[at] = square[:, ::-1] if rows[MIRRORED][at] else square

        every: Callable[..., Iterable[None]] = self._pool.map if self._pool else map
        list(every(cut, range(len(images))))
