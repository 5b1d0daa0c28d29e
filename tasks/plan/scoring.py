"""What the stages do that look at images: scores of samples, of tokenizers, and the page about them."""

from __future__ import annotations

from dataclasses import dataclass, field

from configs import Recipe
from tasks.data.portions import RECONSTRUCTIONS_SHOWN, SCORED_AT_ONCE, SCORING_BATCH
from tasks.plan import networks, passes, sizes
from tasks.plan.data import Images
from tasks.plan.networks import Cost
from tasks.plan.work import MANIFEST_AND_RUN, NETWORKS, REQUESTS, REREAD, SIZES, Figure, Work

INCEPTION = (2048, 2023, 1008)
"""Numbers that Inception finds in an image: pooled, spatial, logits (tasks/scoring/inception.py)."""
INCEPTION_FLOPS = 11_426_464_960
"""Of one image through it, whatever the image's size."""
_FILLED = SCORING_BATCH * -(-SCORED_AT_ONCE // SCORING_BATCH) / SCORED_AT_ONCE
"""Images that networks see for each that is examined: batches are static, the last of a part is filled up."""


def evaluate(recipe: Recipe, images: Images) -> Work:
    section, compute, looked = recipe.evaluate, recipe.compute.actors, _Looked.of(recipe, images)
    judge = _Judge.of(recipe, images)
    encoder, decoder = networks.autoencoder(recipe.train_vavae.model, recipe.image.size)
    features, how = networks.foundation_flops(section.features)
    published = INCEPTION_FLOPS if section.inception is not None else 0
    flops = looked.all * (features + published + judge.network.flops)
    flops += looked.reconstructed * (encoder.flops + decoder.flops)
    read = looked.real * images.mean_bytes + sizes.pixels_bytes(looked.made, recipe.image.size)
    return Work(
        stage="evaluate",
        pool="infer",
        precision=recipe.evaluate.precision,
        rows=Figure(looked.made, "recipe: evaluate.images, sample.images"),
        written=Figure(
            _side_artifacts(recipe, looked, judge), f"{SIZES}; side artifacts judge, reference, floor, reconstruction"
        ),
        reads=Figure(3 * sizes.parts(looked.all, SCORED_AT_ONCE), REQUESTS),
        writes=Figure(4 * MANIFEST_AND_RUN, REQUESTS),
        flops=Figure(_FILLED * flops + judge.flops, f"{NETWORKS}; {how}"),
        read=read + judge.decodes * images.mean_bytes * REREAD,
        decodes=looked.real,
        image_bytes=images.mean_bytes,
        workers=min(compute.actors, sizes.parts(looked.all, SCORED_AT_ONCE)),
        gpus=compute.gpus_per_actor,
        cpus=compute.cpus_per_actor,
        memory=passes.examining(recipe),
        alone=judge.flops,
        alone_decodes=judge.decodes,
    )


@dataclass(frozen=True)
class _Looked:
    """Images that the networks of `evaluate` look at."""

    made: int
    reference: int
    floor: int
    reconstructed: int

    @classmethod
    def of(cls, recipe: Recipe, images: Images) -> _Looked:
        most = recipe.evaluate.images
        made = min(most, recipe.sample.images)
        if not recipe.needs_images:  # samples, and at most as many images of a file
            return cls(made, most, 0, 0)
        return cls(made, min(most, images.test), min(most, images.train), min(most, images.test))

    @property
    def real(self) -> int:
        return self.reference + self.floor + self.reconstructed

    @property
    def all(self) -> int:
        return self.made + self.real


@dataclass(frozen=True)
class _Judge:
    """The classifier of class consistency, which one process trains; nothing where a recipe has none."""

    network: Cost = field(default_factory=Cost)
    flops: int = 0
    decodes: int = 0

    @classmethod
    def of(cls, recipe: Recipe, images: Images) -> _Judge:
        section = recipe.evaluate.classifier
        if section is None:
            return cls()
        network = networks.judge(section, recipe.image.size, recipe.data.classes)
        seen = section.epochs * images.train
        return cls(network, (3 * seen + images.test) * network.flops, seen + images.test)


def _side_artifacts(recipe: Recipe, looked: _Looked, judge: _Judge) -> float:
    """Bytes of what is found out about real images, and of the judge."""
    published = recipe.evaluate.inception is not None
    dims = [recipe.evaluate.features.feature_dim, *(INCEPTION[:2] if published else ())]
    vectors = 4 * (dims[0] + (sum(INCEPTION) if published else 0)) + 8  # and a label
    opinions = 8 * (looked.floor * (recipe.evaluate.classifier is not None) + looked.reconstructed)  # and PSNRs
    spreads = [8 * (dim + dim**2) for dim in dims]  # means and covariances, the published ones in two layouts
    gaussians = 3 * (spreads[0] + 2 * sum(spreads[1:]))
    weights = sizes.weights_bytes(judge.network) if judge.network.values else 0.0
    return weights + looked.real * vectors + opinions + gaussians


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
    if recipe.foundation is not None and section.probe_images:
        cells, width = recipe.latent_size**2, recipe.foundation.feature_dim
        own, how = networks.foundation_flops(recipe.foundation)
        flops, source = flops + (shown + fitted) * own, f"{source}; {how}"
        if recipe.train_semvae is not None:
            semantic = networks.semantic_vae(recipe.train_semvae.model, width, cells)
            weights += semantic[0] + semantic[1]
            flops += (shown + fitted) * semantic[0].flops + shown * semantic[1].flops
    halves = min(section.interpolation_images, images.train)
    flops += halves * (encoder.flops + decoder.flops + 2 * features)
    if recipe.evaluate.inception is not None:
        flops += 2 * halves * INCEPTION_FLOPS
    looked = 3 * shown + fitted + 2 * halves
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
        memory=passes.examining(recipe),
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
