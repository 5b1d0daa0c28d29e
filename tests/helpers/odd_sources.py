"""Sources in the forms people have them, in small: a few coloured squares, and whatever lies around them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from configs import Recipe, load_recipe
from tasks.sources import Account, Listing, open_source


@lru_cache
def jpeg(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, 80, 120)).save(buffer, "JPEG")
    return buffer.getvalue()


@lru_cache
def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), number % 256).save(buffer, "PNG")
    return buffer.getvalue()


def tree(root: Path, classes: Mapping[str, int]) -> Path:
    """One folder per class with so many pictures each."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / name / f"{number:03d}.jpg").write_bytes(jpeg(number))
    return root


def tar(path: Path | None, members: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def webdataset(path: Path, samples: Iterable[Mapping[str, bytes]], start: int = 0) -> None:
    """A tar of samples, each given by its members' extensions."""
    members = [
        (f"{number:06d}.{extension}", data)
        for number, sample in enumerate(samples, start)
        for extension, data in sample.items()
    ]
    tar(path, members)


def hub(path: Path, labels: Sequence[Any], names: Sequence[str] | None = ("cat", "dog", "eel"), **columns: Any) -> None:
    """A Parquet file as the hub serves images; `columns` replace or add to `image` and `label`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = [{"bytes": jpeg(number), "path": f"{number}.jpg"} for number in range(len(labels))]
    table = pa.table({name: each for name, each in {"image": structs, "label": labels, **columns}.items() if each})
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    info = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    pq.write_table(table.replace_schema_metadata(info), path)


def recipe_of(kind: str, path: Path | str, classes: int, *overrides: str, **fields: Any) -> Recipe:
    source = json.dumps({"kind": kind, "path": str(path), **fields})
    own = [f"data.source={source}", f"data.classes={classes}", "sample.labels=random", "shard.limit=null"]
    own += ["compute.train.workers=1", *(f"train_{name}.batch=1" for name in ("vavae", "semvae", "dit"))]
    return load_recipe("demo_tiny", [*own, *overrides])


def listed(recipe: Recipe) -> Listing:
    """The listing of a recipe's source. Raises UserError where it contradicts the recipe."""
    listing = open_source(recipe.data).listing()
    Account.of(recipe.data, listing).check(recipe)
    return listing


def labels_of(listing: Listing) -> dict[str, list[int]]:
    """Labels by split, in the order of keys."""
    found: dict[str, list[int]] = {}
    for row in sorted(listing.images.to_pylist(), key=lambda row: row["key"]):
        found.setdefault(row["split"] or "all", []).append(row["label"])
    return found
