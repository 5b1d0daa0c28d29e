"""The images of the experiment, as `shard` artifacts made without Ray."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from configs import load_recipe
from infra.artifacts import Artifact, Manifest, library_versions, timestamp
from tasks.data.decode import center_crop
from tasks.sources.fashion_mnist import FashionMnistSource

SIDE = 32
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
)  # fmt: skip
TRAIN, TEST = 4_000, 1_000


def fashion(split: str, count: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    source = FashionMnistSource()
    listing = source.listing().images.to_pylist()
    rows = [row for row in listing if row["split"] == split]
    for number in np.random.default_rng(0).permutation(len(rows))[:count]:
        row = rows[int(number)]
        image = Image.open(io.BytesIO(source.read(row["file"], row["start"], row["length"]))).convert("RGB")
        yield row["label"], center_crop(image, SIDE)


def photograph(name: str) -> NDArray[np.uint8]:
    """uint8 (H, W, 3): one that scikit-image brings."""
    import skimage.data

    return np.asarray(Image.open(Path(skimage.data.__file__).parent / name).convert("RGB"))


def photographs(split: str, count: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Patches at random places: for training of the left four fifths of each photograph, for tests of the rest."""
    random = np.random.default_rng({"train": 1, "test": 2}[split])
    for label, name in enumerate(PHOTOGRAPHS):
        whole = photograph(name)
        border = whole.shape[1] * 4 // 5
        part = whole[:, :border] if split == "train" else whole[:, border:]
        for _ in range(count // len(PHOTOGRAPHS)):
            top, left = (int(random.integers(side - SIDE + 1)) for side in part.shape[:2])
            yield label, part[top : top + SIDE, left : left + SIDE]


def put_shards(root: str, name: str, source: Callable[[str, int], Iterator[tuple[int, NDArray[np.uint8]]]]) -> Artifact:
    """A `shard` artifact of these images, unless it is there."""
    artifact = Artifact(root, "shard", name)
    if artifact.is_complete():
        return artifact
    files = []
    for split, count in (("train", TRAIN), ("test", TEST)):
        rows = list(source(split, count))
        table = pa.table(
            {
                "key": [f"{split}/{number:05d}" for number in range(len(rows))],
                "label": pa.array([label for label, _ in rows], pa.int32()),
                "image": [_png(pixels) for _, pixels in rows],
            }
        )
        files.append(artifact.storage.write_table(f"{split}/part-00000.parquet", table, rows_per_group=250))
    classes = [str(label) for label in range(10)]
    manifest = Manifest(
        stage="shard",
        stage_version=1,
        fingerprint=name,
        recipe=load_recipe("demo").model_dump(mode="json"),
        sections={},
        inputs={},
        files=tuple(files),
        rows=TRAIN + TEST,
        facts={"classes": classes, "splits": {"train": TRAIN, "test": TEST}, "quarantine": {}, "rows_per_group": 250},
        created=timestamp(),
        libraries=library_versions(),
    )
    artifact.complete(manifest)
    return artifact


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


SOURCES = {"fashion": fashion, "photographs": photographs}
