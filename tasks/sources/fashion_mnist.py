"""Fashion-MNIST from its four gzipped idx files: 60,000 + 10,000 grey 28 × 28 images of ten kinds of clothes.

A gzip file ends with the CRC-32 and length of its content, so the four trailers (32 bytes) identify the images
whoever compressed them: the Debian package and the public download are the same data in different gzip files.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from configs.errors import UserError
from infra.home import home
from infra.storage import Storage
from tasks.sources.base import Listing, identity_of, listed_rows
from tasks.sources.fetch import fetch_fashion_mnist

ENVIRONMENT = "LATENTFORGE_FASHION_MNIST"
DEBIAN = "/usr/share/datasets/fashion-mnist"
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SPLITS = {"train": "train", "test": "t10k"}
TRAILERS = {
    "train-images-idx3-ubyte.gz": "289ff2b410c6cd02",
    "train-labels-idx1-ubyte.gz": "57461a7468ea0000",
    "t10k-images-idx3-ubyte.gz": "b1e08f6710a17700",
    "t10k-labels-idx1-ubyte.gz": "1f2c148018270000",
}
"""CRC-32 and length (little-endian, as gzip stores them) of the published files' content."""


@dataclass(frozen=True)
class FashionMnistSource:
    """The idx files in a folder or at a URL; None looks in the usual places and fetches at last."""

    path: str | None = None

    def check_there(self) -> None:
        if self.path is not None:
            _trailers(Storage.at(self.path))

    def identity(self) -> str:
        chosen = self.path or os.environ.get(ENVIRONMENT)
        return identity_of("fashion-mnist", TRAILERS if chosen is None else _trailers(Storage.at(chosen)))

    def listing(self) -> Listing:
        folder = resolve(self.path)
        rows = [
            (f"{split}/{number:05d}", label, split, split, number, 0)
            for split in SPLITS
            for number, label in enumerate(_labels(folder, split).tolist())
        ]
        return Listing(listed_rows(rows), CLASSES, identity=self.identity())

    def read(self, file: str, start: int, length: int) -> bytes:
        """Image number `start` of the split `file`, as PNG."""
        buffer = io.BytesIO()
        Image.fromarray(_images(_folder(self.path), file)[start]).save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()


def resolve(path: str | None) -> str:
    """The folder or URL with the four idx files.

    In this order: `path`, the environment's LATENTFORGE_FASHION_MNIST, the Debian package's folder, a copy in the
    home folder; else they are fetched into the home folder. A place that was named is never passed over.

    Raises:
        UserError: the named place lacks files, or nothing could be fetched.
    """
    named = path or os.environ.get(ENVIRONMENT)
    if named:
        _trailers(Storage.at(named))
        return named
    copy = home() / "datasets" / "fashion-mnist"
    for folder in (DEBIAN, str(copy)):
        if all((Path(folder) / name).is_file() for name in TRAILERS):
            return folder
    fetch_fashion_mnist(copy, TRAILERS)
    return str(copy)


def _trailers(storage: Storage) -> dict[str, str]:
    """The gzip trailer of each file, in hex: a name for the content that costs 32 bytes to read."""
    missing = [name for name in TRAILERS if not storage.exists(name)]
    if missing:
        raise UserError(
            f"data.source: {storage.url} lacks {', '.join(missing)}; name the folder with the four Fashion-MNIST "
            f".gz files (data.source.path or {ENVIRONMENT}), or leave both unset to have them fetched"
        )
    return {name: storage.read_bytes(name)[-8:].hex() for name in TRAILERS}


@lru_cache(maxsize=8)
def _folder(path: str | None) -> str:
    """Each process looks once; a node that has no copy fetches its own."""
    return resolve(path)


@lru_cache(maxsize=2)
def _images(folder: str, split: str) -> np.ndarray:
    """uint8 (N, 28, 28), read once per process."""
    return _idx(folder, f"{SPLITS[split]}-images-idx3-ubyte.gz", dimensions=3)


def _labels(folder: str, split: str) -> np.ndarray:
    """uint8 (N,), checked against the images' count and the ten classes."""
    name = f"{SPLITS[split]}-labels-idx1-ubyte.gz"
    labels = _idx(folder, name, dimensions=1)
    images = _images(folder, split)
    if len(labels) != len(images) or (len(labels) and labels.max() >= len(CLASSES)):
        raise UserError(
            f"{folder}/{name}: {len(labels)} labels up to {labels.max(initial=0)} do not fit {len(images)} images of "
            f"{len(CLASSES)} classes; fetch the files again"
        )
    return labels


def _idx(folder: str, name: str, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes: magic 0x0000080d, d big-endian sizes, data."""
    storage = Storage.at(folder)
    try:
        data = gzip.decompress(storage.read_bytes(name))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{storage.url}/{name} is damaged ({error}); delete it and fetch it again") from None
    header = list(_big_endian(data[: 4 * (1 + dimensions)]))
    shape = tuple(header[1:])
    body = data[4 * (1 + dimensions) :]
    if not header or header[0] != 0x0800 + dimensions or len(shape) != dimensions or len(body) != np.prod(shape):
        raise UserError(f"{storage.url}/{name} is not an idx file of {dimensions} dimensions; fetch it again")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _big_endian(data: bytes) -> Iterator[int]:
    return (int.from_bytes(data[i : i + 4], "big") for i in range(0, len(data) - 3, 4))
