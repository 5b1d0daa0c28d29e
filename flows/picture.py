"""`python -m flows sample`: a few images of chosen classes from a trained recipe in one line, or its sample as files.

Nothing is trained and no artifact is made: the recipe's artifacts must be there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from configs import Recipe, UserError, load_recipe
from flows.stages import STAGES
from infra.artifacts import Artifact
from infra.home import default_root
from infra.storage import Storage
from tasks import export, pictures
from tasks.sample import Sampler
from tasks.stage import Context, Job


def draw(
    recipe: str,
    classes: Sequence[int],
    seed: int,
    output: Path,
    rows: int = 1,
    overrides: Sequence[str] = (),
    root: str | None = None,
) -> Path:
    """A picture of `rows` images of each class, one class per column, made in this process.

    An image depends on the recipe, the seed and its number alone; the recipe's guidance, solver and steps apply.

    Raises:
        UserError: the recipe is not trained here, or has no such class.
    """
    count = rows * len(classes)
    loaded = load_recipe(recipe, overrides)
    batch = min(count, loaded.sample.batch)
    ours = (
        f"sample.labels={list(classes)}",
        f"sample.images={count}",
        f"sample.seed={seed}",
        f"sample.batch={batch}",
        f"compute.actors.cpus_per_actor={os.cpu_count() or 1}",
    )
    job = _sample_job(load_recipe(recipe, [*overrides, *ours]), recipe, root)
    sampler = Sampler(asdict(job))
    made = [sampler.images(np.arange(start, start + batch))[1] for start in range(0, count, batch)]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(pictures.png(pictures.grid(np.concatenate(made)[:count], columns=len(classes))))
    return output


def write_out(
    recipe: str, npz: Path | None, png: Path | None, overrides: Sequence[str] = (), root: str | None = None
) -> int:
    """The images of the recipe's sample stage as ADM's `.npz` and as PNG files; returns their number.

    Raises:
        UserError: the stage is not complete.
    """
    loaded = load_recipe(recipe, overrides)
    artifact = Context(_sample_job(loaded, recipe, root)).artifact
    _needs(artifact, recipe)
    count = 0
    if npz is not None:
        count = export.write_npz(artifact, npz, loaded.sample.seed)
    if png is not None:
        count = export.write_pngs(artifact, png)
    return count


def parse_classes(text: str) -> list[int]:
    """`207,360` → [207, 360]. Raises UserError on anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--classes {text}: expected labels between commas, for example 207,360") from None


def _sample_job(recipe: Recipe, name: str, root: str | None) -> Job:
    """The job of the recipe's sample stage; its inputs are complete."""
    place, jobs = Storage.at(root or default_root()).url, dict[str, Job]()
    for stage in STAGES:
        if not stage.present(recipe):
            continue
        prints = {needed: jobs[needed].fingerprint for needed in stage.inputs if needed in jobs}
        found, sections = stage.fingerprint(recipe, prints)
        jobs[stage.name] = Job(stage.name, found, place, recipe.model_dump(mode="json"), prints, sections)
        if stage.name == "sample":
            break
    job = jobs["sample"]
    for needed in job.inputs:
        _needs(Context(job).input(needed), name)
    return job


def _needs(artifact: Artifact, recipe: str) -> None:
    if not artifact.is_complete():
        raise UserError(
            f"{artifact.uri} is not complete, so there is nothing to sample from: run the recipe first, for example "
            f"python -m flows run sfd-full --recipe {recipe}, with the same --set and --root"
        )
