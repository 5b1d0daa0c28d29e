"""Small real artifacts for tests of the later stages: random networks, a few Fashion-MNIST-like pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image as Picture
from safetensors.torch import save
from torch import nn

from configs import Recipe, load_recipe
from infra.artifacts import MANIFEST, Artifact, Manifest, library_versions, timestamp
from infra.storage import FileEntry
from tasks.data.statistics import statistics_hash
from tasks.networks import EMA_WEIGHTS, WEIGHTS, build_autoencoder, build_network
from tasks.stage import Context, Stage

CLASSES = ("hoop", "cross", "stripes", "dots", "bar", "corner", "frame", "check", "wedge", "disc")
SMALL = (
    "train_dit.model.depth=2",
    "train_dit.model.align_depth=null",
    "train_dit.objective.align_weight=0.0",
    "evaluate.classifier.epochs=1",
)


def small_recipe(*overrides: str) -> Recipe:
    return load_recipe("demo_tiny", [*SMALL, *overrides])


def put(
    root: str,
    recipe: Recipe,
    stage: str,
    files: list[FileEntry],
    name: str = "",
    inputs: dict[str, str] | None = None,
    **found: Any,
) -> Artifact:
    """Complete an artifact, named after its stage where nothing else is said, from files that are in place."""
    artifact = Artifact(root, stage, name or stage)
    manifest = Manifest(
        stage=stage,
        stage_version=1,
        fingerprint=artifact.fingerprint,
        recipe=recipe.model_dump(mode="json"),
        sections={},
        inputs=inputs or {},
        files=tuple(files),
        rows=sum(entry.rows or 0 for entry in files),
        created=timestamp(),
        seconds=1.5,
        libraries=library_versions(),
        **found,
    )
    artifact.storage.delete(MANIFEST)  # of what a test puts in its place
    artifact.complete(manifest)
    return artifact


def put_networks(root: str, recipe: Recipe) -> None:
    """Random `train_vavae`, `encode` (statistics only) and `train_dit` artifacts."""
    torch.manual_seed(0)
    statistics = {
        name: {"mean": [0.1] * count, "std": [0.9] * count, "count": 1}
        for name, count in zip(("z", "s"), recipe.channel_groups.values(), strict=False)
    }
    name = statistics_hash(statistics)
    facts = {"statistics": statistics, "statistics_hash": name}
    dit = build_network(recipe, recipe.train_dit.model)
    for parameter in dit.parameters():  # zero-initialised layers would ignore labels and give no velocity
        nn.init.normal_(parameter, std=0.05)
    put_weights(root, recipe, "train_vavae", {WEIGHTS: build_autoencoder(recipe.train_vavae.model)})
    put(root, recipe, "encode", [], facts=facts)
    put_weights(root, recipe, "train_dit", {WEIGHTS: dit, EMA_WEIGHTS: dit}, facts=facts)


def put_weights(root: str, recipe: Recipe, stage: str, networks: dict[str, nn.Module], **found: Any) -> Artifact:
    storage = Artifact(root, stage, stage).storage
    files = [storage.write_bytes(name, save(network.state_dict())) for name, network in networks.items()]
    return put(root, recipe, stage, files, **found)


def put_shard(root: str, recipe: Recipe, train: int = 200, test: int = 120) -> Artifact:
    """Shards of drawn 28 × 28 PNGs whose class a small network can tell."""
    storage = Artifact(root, "shard", "shard").storage
    files = []
    for split, count, seed in (("train", train, 0), ("test", test, 1)):
        random = np.random.default_rng(seed)
        labels = random.integers(len(CLASSES), size=count)
        if not count:
            continue
        for part, rows in enumerate(np.array_split(np.arange(count), 2)):
            table = pa.table(
                {
                    "key": [f"{split}/{row}" for row in rows],
                    "label": pa.array(labels[rows], pa.int32()),
                    "image": [_png(drawing(int(labels[row]), random)) for row in rows],
                }
            )
            files.append(storage.write_table(f"{split}/part-{part:05d}.parquet", table, rows_per_group=32))
    facts = {
        "classes": list(CLASSES),
        "splits": {"train": train, "test": test},
        "quarantine": {},
        "rows_per_group": 32,
    }
    return put(root, recipe, "shard", files, facts=facts)


def drawing(label: int, random: np.random.Generator, side: int = 28) -> np.ndarray:
    """uint8 (side, side, 3): one of ten shapes with some noise."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j] + random.normal(scale=0.08, size=2)[:, None, None]
    radius = np.hypot(x, y)
    shapes = (
        np.abs(radius - 0.6) < 0.15,
        (np.abs(x) < 0.15) | (np.abs(y) < 0.15),
        np.sin(12 * x) > 0,
        (np.sin(12 * x) > 0.4) & (np.sin(12 * y) > 0.4),
        np.abs(y) < 0.3,
        (x < 0) & (y < 0),
        np.maximum(np.abs(x), np.abs(y)) > 0.7,
        (x < 0) ^ (y < 0),
        x + y > 0.2,
        radius < 0.5,
    )
    grey = shapes[label] * 200.0 + random.uniform(0, 50, size=(side, side))
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def context(root: str, recipe: Recipe, stage: Stage, *inputs: str, **named: str) -> Context:
    """A context for `stage` on artifacts named after their stages, or as `named` says."""
    prints = {name: name for name in inputs} | named
    return Context(stage.job(recipe, root, prints))


def at(folder: Path) -> str:
    return f"file://{folder}"


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Picture.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def put_sample(
    root: str, recipe: Recipe, images_BHW3: np.ndarray, labels: np.ndarray, name: str = "sample"
) -> Artifact:
    """A `sample` artifact of given pictures, in two parts."""
    from tasks.data.images import image_table

    storage = Artifact(root, "sample", name).storage
    files = []
    for part, rows in enumerate(np.array_split(np.arange(len(labels)), 2)):
        table = image_table(rows, labels[rows], images_BHW3[rows])
        files.append(storage.write_table(f"part-{part:05d}.parquet", table, rows_per_group=20))
    return put(root, recipe, "sample", files, name=name)
