"""What each stage of a recipe does, in numbers that no cluster changes: rows, bytes, requests, FLOPs, decoded images.

The formulas follow the stages' code; docs/scale.md explains those of requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from configs import Recipe
from configs.schema import AutoGuidance, ClassifierFree, ParquetFiles, Sample, SemanticFirstClock, Training, UnetModel
from tasks.plan import networks, sizes
from tasks.plan.data import Images
from tasks.plan.figures import Figure
from tasks.plan.networks import Cost

REREAD = 1.1
"""Row groups a loader reads for each one it serves, over all workers (docs/scale.md)."""
SCORED = {"train_vavae": 10_000, "train_semvae": 2_000}
"""Test images on which a trained network is scored, at most."""
SAMPLES_PER_PART, SHOWN_PER_CLASS, EXAMINED_AT_ONCE, EXAMINED_BATCH = 250, 8, 500, 64
INCEPTION = (2048, 2023, 1008)
"""Numbers that Inception finds in an image: pooled, spatial, logits (tasks/inception.py)."""
_MANIFEST_AND_RUN = 2
_HELD_BY_DRIVER = 300
"""Bytes an image in the driver of `shard`: names, places and order (docs/scale.md)."""
_NETWORKS = "formula: tasks/plan/networks.py"
_SIZES = "formula: tasks/plan/sizes.py"
_REQUESTS = "formula: docs/scale.md"


@dataclass(frozen=True)
class Work:
    """One stage. Figures that people see have sources; the others only lead to time."""

    stage: str
    pool: Literal["decode", "infer", "train", "head"]
    rows: Figure
    written: Figure
    """Bytes of the artifact (and of side artifacts)."""
    reads: Figure
    writes: Figure
    """Requests to storage."""
    flops: Figure
    read: float = 0.0
    """Bytes from storage."""
    beside: float = 0.0
    """Bytes that lie beside the artifact only while the stage runs, at most."""
    decodes: float = 0.0
    """Images decoded on CPUs: of the decode pool, or of training workers."""
    image_bytes: float = 0.0
    """Of one encoded image."""
    precision: Literal["bf16", "fp32"] = "fp32"
    workers: int = 1
    gpus: float = 0.0
    """Of each worker or actor."""
    cpus: float = 1.0
    """The same."""
    alone: float = 0.0
    """FLOPs that one worker does while the others wait; of a training without images the flow's own process."""
    alone_decodes: float = 0.0
    held: float = 0.0
    """Bytes in the memory of the flow's own process."""
    notes: tuple[str, ...] = field(default=())


def works(recipe: Recipe, images: Images, evaluations: int) -> list[Work]:
    """Every stage that the recipe has, in order.

    evaluations: velocities that the adaptive solver asks for.
    """
    found = [_shard(recipe, images), _tokenizer(recipe, images)]
    if recipe.train_semvae is not None:
        found.append(_semantics(recipe, images))
    found += [_encode(recipe, images), _diffusion(recipe, images), _sample(recipe, images, evaluations)]
    return [*found, _evaluate(recipe, images), _report(recipe)]


# -------------------------------------------------------------------------------------------------------- stages


def _shard(recipe: Recipe, images: Images) -> Work:
    count, scanned = sizes.shard_parts(images, recipe), isinstance(recipe.data.source, ParquetFiles)
    bytes_in = images.all * images.mean_bytes
    return Work(
        stage="shard",
        pool="decode",
        rows=Figure(images.all, images.source),
        written=Figure(sizes.shard_bytes(images, recipe), f"{_SIZES}; bytes of an image: {images.bytes_source}"),
        reads=Figure((2 * count if scanned else images.all) + count, _REQUESTS),
        writes=Figure(2 * count + 3 + _MANIFEST_AND_RUN + (2 * count if scanned else 0), _REQUESTS),
        flops=Figure(0, "no network"),
        read=bytes_in,
        beside=bytes_in if scanned else 0.0,
        held=_HELD_BY_DRIVER * images.all,
        decodes=images.all,
        image_bytes=images.mean_bytes,
    )


def _tokenizer(recipe: Recipe, images: Images) -> Work:
    section = recipe.train_vavae
    encoder, decoder = networks.autoencoder(section.model, recipe.image.size)
    network = encoder + decoder
    given, source = 0, _NETWORKS
    if section.aligned and recipe.foundation is not None:
        given, how = networks.foundation_flops(recipe.foundation)
        source += f"; {how}"
    return _training("train_vavae", recipe, section, images, network, given, network.flops, source)


def _semantics(recipe: Recipe, images: Images) -> Work:
    section, foundation = recipe.train_semvae, recipe.foundation
    assert section is not None and foundation is not None  # the recipe's rules
    encoder, decoder = networks.semantic_vae(section.model, foundation.feature_dim, recipe.latent_size**2)
    network = encoder + decoder
    given, how = networks.foundation_flops(foundation)
    source = f"{_NETWORKS}; {how}"
    return _training("train_semvae", recipe, section, images, network, given, network.flops + given, source)


def _diffusion(recipe: Recipe, images: Images) -> Work:
    section, compute = recipe.train_dit, recipe.compute.train
    backbone, head = networks.diffusion(recipe, section.model)
    aligned = section.objective.align_weight > 0
    trained, again = 0.0, 0.0
    for side, share in zip(recipe.sides, (1.0,) if section.cascade is None else section.cascade.shares, strict=True):
        own, own_head = networks.diffusion(recipe, section.model, side)
        trained += share * (own.flops + (own_head.flops if aligned else 0))
        again += share * (networks.blocks_flops(recipe, section.model, side) if compute.recompute else 0)
    columns = sizes.latent_columns(recipe)
    row = sum(size for name, size in columns.items() if name != "f" or aligned) * sizes.views(recipe)
    return _trained(
        "train_dit",
        recipe,
        section,
        network=backbone + head,
        flops=section.images * (3 * trained + again),
        source=_NETWORKS,
        row_bytes=row,
        groups=sizes.parts(images.train, recipe.encode.rows_per_group) / max(1, images.train),
        dataset=(sizes.latent_bytes(images, recipe) * images.train / images.all, _train_parts(images, recipe)),
    )


def _encode(recipe: Recipe, images: Images) -> Work:
    compute, count = recipe.compute.actors, sizes.shard_parts(images, recipe)
    tokenizer = networks.autoencoder(recipe.train_vavae.model, recipe.image.size)
    flops, weights, source = tokenizer[0].flops, tokenizer[0] + tokenizer[1], _NETWORKS
    if recipe.foundation is not None and (recipe.train_semvae is not None or recipe.encode.align_features):
        features, how = networks.foundation_flops(recipe.foundation)
        flops, source = flops + features, f"{_NETWORKS}; {how}"
    if recipe.train_semvae is not None and recipe.foundation is not None:
        both = networks.semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim, recipe.latent_size**2)
        flops, weights = flops + both[0].flops, weights + both[0] + both[1]
    actors = min(compute.actors, count)
    return Work(
        stage="encode",
        pool="infer",
        rows=Figure(images.all, images.source),
        written=Figure(sizes.latent_bytes(images, recipe), _SIZES),
        reads=Figure(count + 4 * actors, _REQUESTS),
        writes=Figure(2 * count + _MANIFEST_AND_RUN, _REQUESTS),
        flops=Figure(images.all * sizes.views(recipe) * flops, source),
        read=sizes.shard_bytes(images, recipe) + actors * sizes.weights_bytes(weights),
        decodes=images.all,
        image_bytes=images.mean_bytes,
        workers=actors,
        gpus=compute.gpus_per_actor,
        cpus=compute.cpus_per_actor,
    )


def _sample(recipe: Recipe, images: Images, evaluations: int) -> Work:
    section, compute = recipe.sample, recipe.compute.actors
    length = section.batch * -(-SAMPLES_PER_PART // section.batch)
    count = sizes.parts(section.images, length)
    groups, shown = (
        sizes.parts(section.images, section.batch),
        min(section.images, SHOWN_PER_CLASS * recipe.data.classes),
    )
    full, rest = divmod(section.images, length)
    made = full * length + section.batch * -(-rest // section.batch)  # batches are static: the last is filled up
    backbone, head = networks.diffusion(recipe, recipe.train_dit.model)
    encoder, decoder = networks.autoencoder(recipe.train_vavae.model, recipe.image.size)
    flops, hows, guides = float(decoder.flops), list[str](), dict[str, Cost]()
    for stage in recipe.sample_stages:
        own = section.at(stage)
        main = guide = networks.diffusion(recipe, recipe.train_dit.model, stage.side)[0].flops
        if isinstance(own.guidance, AutoGuidance):
            weak, weak_head = networks.diffusion(recipe, own.guidance.model, stage.side)
            guides[own.guidance.weights], guide = weak + weak_head, weak.flops
        steps, guided, how = solver_evaluations(recipe, own, evaluations)
        flops += steps * main + guided * guide
        hows.append(how if len(recipe.sides) == 1 else f"{how} at {stage.side} × {stage.side}")
    actors = min(compute.actors, count)
    return Work(
        stage="sample",
        pool="infer",
        rows=Figure(section.images, "recipe: sample.images"),
        written=Figure(
            sizes.sample_bytes(section.images, recipe.image.size, count, groups, shown),
            f"{_SIZES}; an upper bound, as pixels are compressed",
        ),
        reads=Figure(6 * actors + count, _REQUESTS),
        writes=Figure(2 * count + 1 + _MANIFEST_AND_RUN, _REQUESTS),
        flops=Figure(made * flops, f"{_NETWORKS}; {', '.join(hows)}"),
        read=actors * sizes.weights_bytes(sum(guides.values(), backbone + head + encoder + decoder)),
        workers=actors,
        gpus=compute.gpus_per_actor,
        cpus=compute.cpus_per_actor,
    )


def _evaluate(recipe: Recipe, images: Images) -> Work:
    section, compute = recipe.evaluate, recipe.compute.actors
    sets = [min(section.images, count) for count in (recipe.sample.images, images.test, images.train, images.test)]
    again, looked = sets[3], sum(sets)
    filled = EXAMINED_BATCH * -(-EXAMINED_AT_ONCE // EXAMINED_BATCH) / EXAMINED_AT_ONCE
    tokenizer = networks.autoencoder(recipe.train_vavae.model, recipe.image.size)
    features, how = networks.foundation_flops(section.features)
    flops = filled * (looked * features + again * (tokenizer[0].flops + tokenizer[1].flops))
    read = (sets[1] + sets[2] + again) * images.mean_bytes + sizes.pixels_bytes(sets[0], recipe.image.size)
    written, decodes = 0.0, sets[1] + sets[2] + again
    alone = alone_decodes = 0.0
    if section.classifier is not None:
        network = networks.judge(section.classifier, recipe.image.size, recipe.data.classes)
        seen = section.classifier.epochs * images.train
        alone = (3 * seen + images.test) * network.flops
        alone_decodes = seen + images.test
        flops += filled * looked * network.flops
        written += sizes.weights_bytes(network)
        read += alone_decodes * images.mean_bytes * REREAD
    published = section.inception is not None
    dims = [section.features.feature_dim, *(INCEPTION[:2] if published else ())]
    kept = sets[1] + sets[2] + again
    written += kept * (4 * (dims[0] + (sum(INCEPTION) if published else 0)) + 8)  # vectors and labels
    written += 8 * (sets[2] * (section.classifier is not None) + again)  # the judge's labels of the floor, PSNRs
    spreads = [8 * (dim + dim**2) for dim in dims]  # means and covariances, the published ones in two layouts
    written += 3 * (spreads[0] + 2 * sum(spreads[1:]))
    return Work(
        stage="evaluate",
        pool="infer",
        rows=Figure(sets[0], "recipe: evaluate.images, sample.images"),
        written=Figure(written, f"{_SIZES}; side artifacts judge, reference, floor, reconstruction"),
        reads=Figure(3 * sizes.parts(looked, EXAMINED_AT_ONCE), _REQUESTS),
        writes=Figure(4 * _MANIFEST_AND_RUN, _REQUESTS),
        flops=Figure(flops + alone, f"{_NETWORKS}; {how}"),
        read=read,
        decodes=decodes,
        image_bytes=images.mean_bytes,
        workers=min(compute.actors, sizes.parts(looked, EXAMINED_AT_ONCE)),
        gpus=compute.gpus_per_actor,
        cpus=compute.cpus_per_actor,
        alone=alone,
        alone_decodes=alone_decodes,
    )


def _report(recipe: Recipe) -> Work:
    sheets = 3 * recipe.report.rows * recipe.report.columns * 3 * recipe.image.size**2
    return Work(
        stage="report",
        pool="head",
        rows=Figure(1, "one page"),
        written=Figure(7 / 3 * sheets, "at most the pictures' pixels, as files and inside the page; fonts not counted"),
        reads=Figure(recipe.report.rows * recipe.report.columns, _REQUESTS),
        writes=Figure(5 + _MANIFEST_AND_RUN, _REQUESTS),
        flops=Figure(0, "a few pictures"),
    )


# ------------------------------------------------------------------------------------------------------ training


def _training(
    stage: str,
    recipe: Recipe,
    section: Training,
    images: Images,
    network: Cost,
    given: int,
    scoring: int,
    source: str,
) -> Work:
    """A training on decoded images; `given` are the frozen network's FLOPs an image, `scoring` those of a score."""
    scored = min(SCORED[stage], images.test)
    return _trained(
        stage,
        recipe,
        section,
        network=network,
        flops=section.images * (3 * network.flops + given),
        source=source,
        row_bytes=images.mean_bytes,
        groups=1 / sizes.SHARD_ROWS_PER_GROUP,
        dataset=(sizes.shard_bytes(images, recipe) * images.train / images.all, _train_parts(images, recipe)),
        decodes=section.images,
        image_bytes=images.mean_bytes,
        alone=scored * scoring,
        alone_decodes=scored,
    )


def _trained(
    stage: str,
    recipe: Recipe,
    section: Training,
    *,
    network: Cost,
    flops: float,
    source: str,
    row_bytes: float,
    groups: float,
    dataset: tuple[float, int],
    decodes: float = 0.0,
    image_bytes: float = 0.0,
    alone: float = 0.0,
    alone_decodes: float = 0.0,
) -> Work:
    """groups: row groups per image of the train split; dataset: its bytes and parts, which a local cache may hold."""
    compute, trains = recipe.compute.train, section.images > 0
    averages = (section.ema_decay is not None) + len(section.ema_decays) + len(section.ema_sigmas)
    snapshots = len(section.ema_sigmas) * (section.images // section.snapshot_every) if section.snapshot_every else 0
    weights = sizes.weights_bytes(network)
    saves = (section.images - 1) // compute.checkpoint_every if trains else 0
    kept = min(saves, compute.keep_checkpoints + 1)  # one more while it is written
    if compute.keep_every:
        kept = min(saves, kept + section.images // compute.keep_every)
    files = 3 + averages  # weights and two moments with them
    stored = 1 + (averages + snapshots if trains else 0)
    reads, read, how = REREAD * section.images * groups, REREAD * section.images * row_bytes, _REQUESTS
    if dataset[0] <= compute.cache_gib * 2**30:  # one copy a node, of which there are at most as many as workers
        reads, read = min(reads, compute.workers * dataset[1]), min(read, compute.workers * dataset[0])
        how += "; compute.train.cache_gib holds all"
    note: tuple[str, ...] = ()
    if not trains and alone:
        note = (f"{stage} takes given weights, and scores them in the flow's own process: on the head, without a GPU",)
    return Work(
        stage=stage,
        pool="train" if trains else "head",
        rows=Figure(section.images, f"recipe: {stage}.images"),
        written=Figure(stored * weights, _SIZES),
        reads=Figure(reads + alone_decodes / sizes.SHARD_ROWS_PER_GROUP, how),
        writes=Figure(stored + 1 + _MANIFEST_AND_RUN + saves * (files + 2), "formula: files of a checkpoint"),
        flops=Figure(flops + alone, source),
        read=read + alone_decodes * row_bytes,
        beside=kept * files * weights,
        decodes=decodes,
        image_bytes=image_bytes,
        precision="fp32" if section.precision == "fp32" else "bf16",  # fp16 has the same peak
        workers=compute.workers if trains else 1,
        gpus=compute.gpus_per_worker if trains else 0,
        cpus=compute.cpus_per_worker,
        alone=alone,
        alone_decodes=alone_decodes,
        notes=note,
    )


def _train_parts(images: Images, recipe: Recipe) -> int:
    return sizes.parts(images.train, recipe.shard.rows_per_shard)


# ------------------------------------------------------------------------------------------------------ sampling


def solver_evaluations(recipe: Recipe, section: Sample, adaptive: int) -> tuple[int, float, str]:
    """Velocities of the main network and of the guide for one image, and how that was found (papers.md 1.7, 2.6).

    The guide runs wherever some group's time lies in the guidance interval.
    """
    if isinstance(recipe.train_dit.model, UnetModel):
        return _denoisings(recipe.train_dit.model, section)
    steps = section.steps - 1 if section.off_by_one else section.steps
    span, offsets = 1.0, [0.0] * len(recipe.channel_groups)
    clock = recipe.train_dit.clock
    if isinstance(clock, SemanticFirstClock):
        span, offsets = 1.0 + clock.delta, [clock.delta, 0.0]
    if section.solver == "dopri5":
        times, count, how = [span * i / 100 for i in range(100)], adaptive, f"{adaptive} evaluations of dopri5 assumed"
    else:
        grid = [span * _shifted(i / steps, section.shift) for i in range(steps + 1)]
        times = grid[:-1] + (grid[1:] if section.solver == "heun" else [])
        count, how = len(times), f"{len(times)} evaluations of {section.solver}"
    guidance = section.guidance
    if isinstance(guidance, ClassifierFree) and guidance.scale != 1.0:
        start = guidance.interval_start
        active = sum(any(min(max(g - offset, 0.0), 1.0) >= start for offset in offsets) for g in times)
        return count, count * active / len(times), how
    if isinstance(guidance, AutoGuidance) and (guidance.scale != 1.0 or guidance.semantic_scale not in (None, 1.0)):
        return count, float(count), how
    return count, 0.0, how


def _denoisings(model: UnetModel, section: Sample) -> tuple[int, float, str]:
    """The same in pixel space: along the noise levels of `models/edm.py`, whose times are 1 / (1 + sigma)."""
    low, high = model.sigma_min ** (1 / model.rho), model.sigma_max ** (1 / model.rho)
    levels = [(high + i / (section.steps - 1) * (low - high)) ** model.rho for i in range(section.steps)]
    asked = levels + (levels[1:] if section.solver == "heun" else [])
    guidance, how = section.guidance, f"{len(asked)} evaluations of {section.solver}"
    if isinstance(guidance, ClassifierFree) and guidance.scale != 1.0:
        return len(asked), float(sum(1 / (1 + sigma) >= guidance.interval_start for sigma in asked)), how
    guided = isinstance(guidance, AutoGuidance) and guidance.scale != 1.0
    return len(asked), float(len(asked)) if guided else 0.0, how


def _shifted(t: float, shift: float) -> float:
    return t if shift in (0, 1) else shift * t / (1 + (shift - 1) * t)
