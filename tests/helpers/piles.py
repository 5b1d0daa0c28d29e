"""Piles of images for tests of the data plane, and small artifacts made from them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from configs import Recipe, load_recipe
from infra.artifacts import Artifact
from infra.storage import Storage
from tasks.data.statistics import ChannelSums, statistics_hash
from tasks.data.tensors import WRITE_OPTIONS, latent_table
from tasks.stage import Stage, perform
from tests.helpers.builders import put


def picture(number: int = 0, width: int = 40, height: int = 32) -> Image.Image:
    """A smooth coloured picture, another one for every number."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin((x * (1 + number % 7) + y * k) / 9.0 + number) for k in (1, 2, 3)]
    return Image.fromarray(np.uint8(127.5 + 127.5 * np.stack(waves, axis=-1)))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def folder_of_classes(root: Path, classes: dict[str, int]) -> Path:
    """A tree of class folders with so many pictures each."""
    number = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for _ in range(count):
            (root / name / f"{number:04d}.png").write_bytes(encoded(picture(number)))
            number += 1
    return root


SMALL_BATCHES = [f"train_{name}.batch=2" for name in ("vavae", "semvae", "dit")]
"""For recipes on a handful of images: a batch that is larger than those is refused."""


def folder_recipe(path: Path | str, *overrides: str) -> Recipe:
    """`demo_tiny` on a folder, for as many classes as that has and a handful of images."""
    classes = sum(each.is_dir() for each in Path(path).iterdir()) if Path(path).is_dir() else 10
    own = [f"data.classes={max(1, classes)}", "sample.labels=random", *SMALL_BATCHES]
    return load_recipe("demo_tiny", [f"data.source={{kind: folder, path: '{path}'}}", *own, *overrides])


def run_stage(stage: Stage, recipe: Recipe, root: str, *inputs: Artifact) -> Artifact:
    """What the flow does with one stage."""
    prints = {artifact.stage: artifact.fingerprint for artifact in inputs}
    return perform(stage, stage.job(recipe, root, prints))


def put_latents(
    root: str,
    rows: Sequence[int],
    shapes: dict[str, tuple[int, ...]],
    rows_per_group: int = 16,
    seed: int = 0,
    **options: Any,
) -> tuple[Artifact, dict[str, np.ndarray]]:
    """An `encode` artifact with parts of so many rows and random latents; also its content, rows in files' order.

    Every latent's first value is its row number, so that a row can be recognised. `options` of the writer go over ours.
    """
    random = np.random.default_rng(seed)
    storage = Storage.at(root).child("encode", "encode")
    files, parts = [], []
    done = 0
    for number, count in enumerate(rows):
        tensors = {name: random.normal(size=(count, *shape)).astype(np.float16) for name, shape in shapes.items()}
        for values in tensors.values():
            values.reshape(count, -1)[:, 0] = np.arange(done, done + count) % 2048
        keys = [f"image-{row:05d}" for row in range(done, done + count)]
        labels = np.arange(done, done + count, dtype=np.int32) % 10
        table = latent_table(keys, labels, tensors)
        name, written = f"train/part-{number:05d}.parquet", WRITE_OPTIONS | options
        files.append(storage.write_table(name, table, rows_per_group, **written))
        parts.append({**tensors, "label": labels})
        done += count
    content = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    standard = [name for name in ("z", "s") if name in shapes]
    coarser = {name: ChannelSums.of_averages(content[name]) for name in standard}
    sides = {side: {name: coarser[name][side].mean_and_std() for name in standard} for side in coarser[standard[0]]}
    facts = {
        **_stated({name: ChannelSums.of(content[name]).mean_and_std() for name in standard}),
        "averages": {str(side): _stated(found) for side, found in sides.items()},
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "rows_per_group": rows_per_group,
        "splits": {"train": done},
    }
    return put(root, load_recipe("demo_tiny"), "encode", files, facts=facts), content


def _stated(statistics: dict[str, Any]) -> dict[str, Any]:
    return {"statistics": statistics, "statistics_hash": statistics_hash(statistics)}


def read_rows(artifact: Artifact, split: str) -> list[dict[str, Any]]:
    """All rows of a split, in order."""
    import pyarrow.parquet as pq

    parts = artifact.files(f"{split}/", ".parquet")
    return [row for part in parts for row in pq.read_table(pa.BufferReader(artifact.read(part.path))).to_pylist()]
