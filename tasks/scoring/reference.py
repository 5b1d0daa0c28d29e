"""What generated images are compared with: a split, a file of ADM's evaluator, or an earlier artifact."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from configs import Recipe, UserError
from configs.scores import SPLITS
from infra.artifacts import Artifact
from infra.storage import FileEntry
from infra.weights import fetch, file_hash, identities
from tasks.data.images import image_table
from tasks.scoring import inception
from tasks.scoring.adm_file import ReferenceStatistics, image_pieces, read_statistics
from tasks.scoring.inception import POOL, SPATIAL
from tasks.stage import Context, Outcome

_ROWS = 500
"""Images per part of an unpacked file."""


@dataclass(frozen=True)
class Reference:
    """What `evaluate.reference` names, checked. One of `split`, `file` with images, and `artifact` gives the images."""

    identity: str
    """Changes with the content."""
    split: str | None = None
    file: Path | None = None
    statistics: ReferenceStatistics | None = None
    """Of Inception features, where a file brings them; they go before those of the images."""
    artifact: Artifact | None = None

    @property
    def floor_split(self) -> str:
        """Real images that are not the reference: their scores are what a perfect model would reach."""
        return "train" if self.split == "test" else "test"


def resolve(recipe: Recipe) -> Reference:
    """Raises UserError where there is no such thing, it is damaged, or it does not fit the recipe."""
    section = recipe.evaluate
    if section.reference in SPLITS:
        return Reference(section.reference, split=section.reference)
    if section.reference.endswith(".npz"):
        return _of_file(recipe, section.reference)
    return _of_artifact(recipe, section.reference)


def external(recipe: Recipe) -> dict[str, str]:
    """Identities of the files from outside that an evaluation rests on; refuses what does not fit before it runs."""
    found = {"reference": resolve(recipe).identity}
    if recipe.evaluate.inception is not None:
        found["inception"] = inception.Identity.at(recipe.evaluate.inception.weights).sha256
    return found | identities(features=recipe.evaluate.features.weights)


def looked_at(recipe: Recipe) -> dict[str, Any]:
    """What determines what is found out about given images."""
    section = recipe.section("evaluate")
    published = recipe.evaluate.inception
    return {
        "image": recipe.section("image"),
        "features": section["features"],
        **identities(features_file=recipe.evaluate.features.weights),
        "inception": None if published is None else inception.Identity.at(published.weights).sha256,
        **{name: section[name] for name in ("precision",) if name in section},
    }


def unpack(context: Context) -> Outcome:
    """The images of a reference file as Parquet parts, which actors can share out."""
    file = resolve(context.recipe).file
    assert file is not None, "only files are unpacked"
    files: list[FileEntry] = []
    first = 0
    for images, labels in image_pieces(file, _ROWS):
        table = image_table(np.arange(first, first + len(labels)), labels, images)
        files.append(context.out.write_table(f"part-{len(files):05d}.parquet", table, rows_per_group=100))
        first += len(labels)
    return Outcome(files=files, rows=first)


def _of_file(recipe: Recipe, location: str) -> Reference:
    path = fetch(location)
    digest = file_hash(path)
    statistics = _checked(path, digest)
    published = recipe.evaluate.inception
    if statistics.gaussians and published is None and statistics.images is None:
        raise UserError(
            f"evaluate.reference {location}: holds statistics of Inception features and no images, but "
            "evaluate.inception is not set: set it, or take a file with images (arr_0)"
        )
    if statistics.gaussians and published is not None and statistics.network is not None:
        ours = inception.Identity.at(published.weights).sha256
        if statistics.network != ours:
            raise UserError(
                f"evaluate.reference {location}: its statistics are of the network {statistics.network[:16]}, but "
                f"evaluate.inception.weights are {ours[:16]}: take those weights, or make the statistics again"
            )
    if statistics.images is None and not recipe.needs_images:
        raise UserError(
            f"evaluate.reference {location}: holds statistics and no images (arr_0), and this recipe reads no images "
            f"that scores on {recipe.evaluate.features.name} could compare with: take a file with images"
        )
    if statistics.images is None:  # whatever is not Inception's is compared with the test split
        return Reference(digest, split="test", statistics=statistics)
    count, side = statistics.images
    if side != recipe.image.size:
        raise UserError(
            f"evaluate.reference {location}: its {count:,} images are {side} × {side} pixels, but image.size is "
            f"{recipe.image.size}: take a reference of that size"
        )
    return Reference(digest, file=path, statistics=statistics)


@lru_cache(maxsize=4)
def _checked(path: Path, _digest: str) -> ReferenceStatistics:
    return read_statistics(path, {"pool": POOL, "spatial": SPATIAL})


def _of_artifact(recipe: Recipe, location: str) -> Reference:
    parts = location.rstrip("/").rsplit("/", 2)
    if len(parts) < 3 or parts[1] != "reference":
        raise UserError(
            f"evaluate.reference {location}: expected test, train, a file that ends in .npz, or the folder of an "
            "earlier artifact, …/reference/<fingerprint>"
        )
    artifact = Artifact(parts[0], parts[1], parts[2])
    sections = artifact.manifest.sections
    for name, ours in looked_at(recipe).items():
        theirs = sections.get(name)
        if name == "image":
            ours, theirs = ours["size"], (theirs or {}).get("size")
        if theirs != ours:
            raise UserError(
                f"evaluate.reference {location}: its images were looked at with {name} {theirs}, but this recipe has "
                f"{ours}: make them equal, or take another reference"
            )
    return Reference(artifact.fingerprint, artifact=artifact)
