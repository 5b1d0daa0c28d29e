"""`latentforge sample`: a few images of chosen classes from a trained recipe in one line, or its sample as files.

Nothing is trained and no artifact is made: the recipe's artifacts must be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs import load_recipe
from flows.inputs import needs, sample_job, shards_of
from flows.options import writing
from tasks.drawing import pictures
from tasks.sampling import export
from tasks.sampling.playing import drawn, for_picture
from tasks.sampling.sampler import Sampler
from tasks.stage import Context


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
    ours = for_picture(load_recipe(recipe, overrides).sample, classes, seed, rows)
    job = sample_job(load_recipe(recipe, [*overrides, *ours]), recipe, root)
    sheet = drawn(Sampler.of(Context(job)), rows * len(classes), len(classes))
    with writing(output):
        output.write_bytes(pictures.png(sheet))
    return output


def class_names(recipe: str, overrides: Sequence[str] = (), root: str | None = None) -> list[str]:
    """Of a trained recipe's classes, by label; none where its latents came without images.

    Raises:
        UserError: the recipe is not trained here.
    """
    loaded = load_recipe(recipe, overrides)
    shards = shards_of(loaded, sample_job(loaded, recipe, root))
    return (
        [] if shards is None or not shards.is_complete() else [str(each) for each in shards.manifest.facts["classes"]]
    )


def write_out(
    recipe: str, npz: Path | None, png: Path | None, overrides: Sequence[str] = (), root: str | None = None
) -> int:
    """The images of the recipe's sample stage as ADM's `.npz` and as PNG files; returns their number.

    Raises:
        UserError: the stage is not complete.
    """
    loaded = load_recipe(recipe, overrides)
    artifact = Context(sample_job(loaded, recipe, root)).artifact
    needs(artifact, recipe)
    count = 0
    if npz is not None:
        with writing(npz):
            count = export.write_npz(artifact, npz, loaded.sample.seed)
    if png is not None:
        with writing(png):
            count = export.write_pngs(artifact, png)
    return count
