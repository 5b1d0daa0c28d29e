"""What the stages do that look at images: scores of samples, of tokenizers, and the page about them."""

from __future__ import annotations

from configs import Recipe
from tasks.data.portions import RECONSTRUCTIONS_SHOWN, SCORED_AT_ONCE, SCORING_BATCH
from tasks.plan import networks, sizes
from tasks.plan.data import Images
from tasks.plan.work import MANIFEST_AND_RUN, NETWORKS, REQUESTS, REREAD, SIZES, Figure, Work

INCEPTION = (2048, 2023, 1008)
"""Numbers that Inception finds in an image: pooled, spatial, logits (tasks/scoring/inception.py)."""
INCEPTION_FLOPS = 11_426_464_960
"""Of one image through it, whatever the image's size."""
_FILLED = SCORING_BATCH * -(-SCORED_AT_ONCE // SCORING_BATCH) / SCORED_AT_ONCE
"""Images that networks see for each that is examined: batches are static, the last of a part is filled up."""


def evaluate(recipe: Recipe, images: Images) -> Work:
    section, compute = recipe.evaluate, recipe.compute.actors
    sets = [min(section.images, count) for count in (recipe.sample.images, images.test, images.train, images.test)]
    if not recipe.needs_images:  # samples, and at most as many images of a file
        sets = [sets[0], section.images, 0, 0]
    again, looked = sets[3], sum(sets)
    tokenizer = networks.autoencoder(recipe.train_vavae.model, recipe.image.size)
    features, how = networks.foundation_flops(section.features)
    flops = _FILLED * (looked * features + again * (tokenizer[0].flops + tokenizer[1].flops))
    read = (sets[1] + sets[2] + again) * images.mean_bytes + sizes.pixels_bytes(sets[0], recipe.image.size)
    written, decodes = 0.0, sets[1] + sets[2] + again
    alone = alone_decodes = 0.0
    if section.classifier is not None:
        network = networks.judge(section.classifier, recipe.image.size, recipe.data.classes)
        seen = section.classifier.epochs * images.train
        alone = (3 * seen + images.test) * network.flops
        alone_decodes = seen + images.test
        flops += _FILLED * looked * network.flops
        written += sizes.weights_bytes(network)
        read += alone_decodes * images.mean_bytes * REREAD
    published = section.inception is not None
    flops += _FILLED * looked * published * INCEPTION_FLOPS
    dims = [section.features.feature_dim, *(INCEPTION[:2] if published else ())]
    kept = sets[1] + sets[2] + again
    written += kept * (4 * (dims[0] + (sum(INCEPTION) if published else 0)) + 8)  # vectors and labels
    written += 8 * (sets[2] * (section.classifier is not None) + again)  # the judge's labels of the floor, PSNRs
    spreads = [8 * (dim + dim**2) for dim in dims]  # means and covariances, the published ones in two layouts
    written += 3 * (spreads[0] + 2 * sum(spreads[1:]))
    return Work(
        stage="evaluate",
        pool="infer",
        precision=recipe.evaluate.precision,
        rows=Figure(sets[0], "recipe: evaluate.images, sample.images"),
        written=Figure(written, f"{SIZES}; side artifacts judge, reference, floor, reconstruction"),
        reads=Figure(3 * sizes.parts(looked, SCORED_AT_ONCE), REQUESTS),
        writes=Figure(4 * MANIFEST_AND_RUN, REQUESTS),
        flops=Figure(flops + alone, f"{NETWORKS}; {how}"),
        read=read,
        decodes=decodes,
        image_bytes=images.mean_bytes,
        workers=min(compute.actors, sizes.parts(looked, SCORED_AT_ONCE)),
        gpus=compute.gpus_per_actor,
        cpus=compute.cpus_per_actor,
        alone=alone,
        alone_decodes=alone_decodes,
    )


def evaluate_tokenizer(recipe: Recipe, images: Images) -> Work:
    """Statistics of latents, which no GPU computes, are not in the FLOPs."""
    section, compute = recipe.evaluate_tokenizer, recipe.compute.actors
    shown, fitted = min(section.images, images.test), min(section.probe_images, images.train)
    encoder, decoder = networks.autoencoder(recipe.train_vavae.model, recipe.image.size)
    features, how = networks.foundation_flops(recipe.evaluate.features)
    weights, source = encoder + decoder, f"{NETWORKS}; {how}"
    flops = _FILLED * shown * (encoder.flops + decoder.flops + 2 * features)
    if section.lpips_weights is not None:
        looking, weighing = networks.lpips_flops(recipe.image.size)
        flops += shown * (2 * looking + weighing)
    if recipe.evaluate.inception is not None:
        flops += _FILLED * 2 * shown * INCEPTION_FLOPS
    flops += (shown + fitted) * encoder.flops
    if recipe.foundation is not None:
        cells, width = recipe.latent_size**2, recipe.foundation.feature_dim
        own, how = networks.foundation_flops(recipe.foundation)
        flops, source = flops + (shown + fitted) * own, f"{source}; {how}"
        if recipe.train_semvae is not None:
            semantic = networks.semantic_vae(recipe.train_semvae.model, width, cells)
            weights += semantic[0] + semantic[1]
            flops += (shown + fitted) * semantic[0].flops + shown * semantic[1].flops
    looked = 3 * shown + fitted
    count = sizes.parts(shown, SCORED_AT_ONCE) * 3 + sizes.parts(fitted, SCORED_AT_ONCE)
    actors = min(compute.actors, sizes.parts(max(2 * shown, fitted), SCORED_AT_ONCE))
    return Work(
        stage="evaluate_tokenizer",
        pool="infer",
        precision=recipe.evaluate.precision,
        rows=Figure(shown, "recipe: evaluate_tokenizer.images"),
        written=Figure(
            2 * RECONSTRUCTIONS_SHOWN * 3 * max(64, recipe.image.size) ** 2, "at most the pixels of one picture"
        ),
        reads=Figure(count, REQUESTS),
        writes=Figure(1 + MANIFEST_AND_RUN, REQUESTS),
        flops=Figure(flops, source),
        read=looked * images.mean_bytes + 2 * actors * sizes.weights_bytes(weights),
        decodes=looked,
        image_bytes=images.mean_bytes,
        workers=actors,
        gpus=compute.gpus_per_actor,
        cpus=compute.cpus_per_actor,
    )


def report(recipe: Recipe, images: Images) -> Work:
    sheets = 3 * recipe.report.rows * recipe.report.columns * 3 * recipe.image.size**2
    return Work(
        stage="report",
        pool="head",
        rows=Figure(1, "one page"),
        written=Figure(7 / 3 * sheets, "at most the pictures' pixels, as files and inside the page; fonts not counted"),
        reads=Figure(recipe.report.rows * recipe.report.columns, REQUESTS),
        writes=Figure(5 + MANIFEST_AND_RUN, REQUESTS),
        flops=Figure(0, "a few pictures"),
    )
