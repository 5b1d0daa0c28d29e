"""Stage `evaluate_tokenizer`: what both tokenizers keep of images, and what their latents are like.

Reconstructions are of the test split (papers.md 1.7). A Fréchet distance is named after its network, as everywhere.
What each score means is in docs/tokenizers.md.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from configs import Recipe, UserError
from configs.published import published_metrics, scores_of_tokenizer
from infra.weights import identities
from tasks.data.crops import Crop
from tasks.data.images import pick_images
from tasks.data.pixels import Pixels
from tasks.data.portions import RECONSTRUCTION_ROWS, RECONSTRUCTIONS_SHOWN
from tasks.drawing import pictures
from tasks.drawing.reconstruct import reconstructed
from tasks.scoring import inception
from tasks.scoring.distances import FrechetFrom
from tasks.scoring.features import WITHOUT_LPIPS, FeatureNetworks, ImageFeatures, ImageSet, extract_features
from tasks.scoring.interpolation import interpolation_features
from tasks.scoring.latents import Subjects, extract_latent_features
from tasks.scoring.lpips import check_weights
from tasks.scoring.real_images import has_both, score_names
from tasks.stage import Context, Outcome, Stage

PICTURE = "reconstructions.png"
"""Images in it, and rows of them."""


def run(context: Context) -> Outcome:
    """Score reconstructions and latents, and show some.

    Raises:
        UserError: too few images, or weights that cannot be had.
    """
    recipe, section = context.recipe, context.recipe.evaluate_tokenizer
    shards, tokenizer = context.input("shard"), context.input("train_vavae")
    published = None if recipe.evaluate.inception is None else recipe.evaluate.inception.weights
    networks = FeatureNetworks(
        Crop(recipe.image.size, "bilinear" if section.crop == "torchvision" else "adm"),
        recipe.evaluate.features,
        tokenizer=tokenizer,
        inception=published,
        precision=recipe.evaluate.precision,
        lpips=section.lpips_weights,
        compiled=recipe.compute.actors.compile,
    )
    sets = {
        "real": ImageSet(shards, "test/", section.images),
        "again": ImageSet(
            shards,
            "test/",
            section.images,
            reconstruct=True,
            sampled=section.seed if section.posterior == "sample" else None,
        ),
    }
    found = extract_features("tokenizer", sets, networks, recipe.compute.actors)
    fitted = section.probe_images > 0
    semantic = context.input("train_semvae") if fitted and recipe.train_semvae is not None else None
    foundation = recipe.foundation if fitted else None
    try:
        scores = _reconstruction(context, found)
        latent, facts = extract_latent_features(
            shards,
            Subjects(recipe.image.size, tokenizer, foundation, semantic, recipe.evaluate.precision),
            recipe.compute.actors,
            train=section.probe_images,
            test=section.images,
            points=section.density_points,
            seed=section.seed,
        )
        if section.interpolation_images:
            scores |= _interpolation(context, networks)
    except ValueError as error:
        raise UserError(f"the tokenizer cannot be scored: {error}; see evaluate_tokenizer.images") from None
    picture = pictures.png(_side_by_side(context))
    context.tracker.file(PICTURE, picture)
    context.tracker.metrics(published_metrics(scores_of_tokenizer(recipe)))
    files = [context.out.write_bytes(PICTURE, picture)]
    return Outcome(files=files, rows=found["again"].images, facts=facts, scores=scores | latent)


def _side_by_side(context: Context) -> Pixels:
    """The first test images, every row above its reconstructions."""
    shards = context.input("shard")
    entries = shards.files("test/")
    columns = max(1, min(RECONSTRUCTIONS_SHOWN, sum(entry.rows or 0 for entry in entries)) // RECONSTRUCTION_ROWS)
    shown = pick_images(shards.storage, entries, range(columns * RECONSTRUCTION_ROWS), context.recipe.image.size)
    rows = zip(*(np.split(each, RECONSTRUCTION_ROWS) for each in (shown, reconstructed(context, shown))), strict=True)
    return pictures.grid(np.concatenate([each for pair in rows for each in pair]), columns)


def _interpolation(context: Context, networks: FeatureNetworks) -> dict[str, float]:
    """The Fréchet distance of decoded midpoints from training images, by each network that scores reconstructions."""
    recipe, section = context.recipe, context.recipe.evaluate_tokenizer
    looked = replace(networks, crop=recipe.image.size, lpips=None)
    real, halves = interpolation_features(
        context.input("shard"), looked, recipe.image.size, section.interpolation_images, recipe.compute.actors
    )
    return {
        f"interpolation_{name('frechet')}": FrechetFrom(real.gaussians[vectors]).of_rows(getattr(halves, vectors))
        for vectors, name in score_names(recipe.evaluate).items()
        if has_both(vectors, real)
    }


def _reconstruction(context: Context, found: dict[str, ImageFeatures]) -> dict[str, float]:
    real, again = found["real"], found["again"]
    per_image = {
        "psnr": again.findings.psnr,
        "ssim": again.findings.ssim,
        "lpips": again.findings.lpips,
    }
    scores = {f"reconstruction_{name}": float(each.mean()) for name, each in per_image.items() if each is not None}
    for vectors, name in score_names(context.recipe.evaluate).items():
        if not has_both(vectors, real, again):  # this stage trains no judge
            continue
        distance = FrechetFrom(real.gaussians[vectors]).of_rows(getattr(again.findings, vectors))
        scores[f"reconstruction_{name('frechet')}"] = distance
    return scores


def external(recipe: Recipe) -> dict[str, str] | None:
    """Which files of weights, where some are, as in `train_vavae`."""
    section = recipe.evaluate_tokenizer
    found = identities(
        foundation=recipe.foundation.weights if recipe.foundation and section.probe_images else None,
        features=recipe.evaluate.features.weights,
        lpips=section.lpips_weights,
    )
    if recipe.evaluate.inception is not None:
        found["inception"] = inception.Identity.at(recipe.evaluate.inception.weights).sha256
    return found or None


def check(recipe: Recipe) -> None:
    """Raises UserError where scores cannot be had in the end: before tokenizers are trained for days."""
    section = recipe.evaluate_tokenizer
    if section.probe_images and recipe.shard.test_share == 1.0:
        raise UserError(
            f"evaluate_tokenizer.probe_images is {section.probe_images} but shard.test_share is 1, so there are no "
            "training images to fit probes to: set probe_images to 0"
        )
    if section.lpips_weights is not None:
        check_weights(section.lpips_weights, WITHOUT_LPIPS)


STAGE = Stage(
    name="evaluate_tokenizer",
    version=3,
    sections=("image", "foundation", "evaluate", "evaluate_tokenizer"),
    inputs=("shard", "train_vavae", "train_semvae"),
    run=run,
    external=external,
    check=check,
)
