"""What each stage of a flow does, in order, and the stages that neither train nor score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from configs import Recipe
from configs.data import ParquetFiles
from configs.published import departures, scores_of
from configs.sampling import AutoGuidance, RoutedGuidance
from tasks.dag import FLOWS, PIPELINE, in_pipeline
from tasks.data.portions import SAMPLE_GRID_ROWS, SAMPLE_ROWS_PER_PART
from tasks.plan import networks, passes, scoring, sizes, trainings
from tasks.plan.data import Images
from tasks.plan.networks import Cost
from tasks.plan.solvers import effective_evaluations, solver_evaluations
from tasks.plan.work import MANIFEST_AND_RUN, NETWORKS, REQUESTS, SIZES, Figure, Work

STAGES = frozenset(stage for stages in FLOWS.values() for stage in stages)
"""All that the plan knows."""
_READ_BESIDE = {"evaluate_tokenizer": ("evaluate",)}
_HELD_BY_DRIVER = 300
"""Bytes an image in the driver of `shard`: names, places and order (docs/scale.md)."""


def works(recipe: Recipe, images: Images, evaluations: int, flow: str = "sfd-full") -> list[Work]:
    """Every stage of a flow that the recipe has, in order. Arguments as :func:`work_of`'s."""
    there = [stage for stage in FLOWS[flow] if _present(stage, recipe, flow)]
    for stage in there:
        recipe.require((stage, *_READ_BESIDE.get(stage, ())), f"stage {stage}")
    return [_with_published(work_of(stage, recipe, images, evaluations), recipe) for stage in there]


def _present(stage: str, recipe: Recipe, flow: str) -> bool:
    if FLOWS[flow] is PIPELINE:
        return in_pipeline(stage, recipe)
    return stage != "train_semvae" or recipe.train_semvae is not None


def work_of(stage: str, recipe: Recipe, images: Images, evaluations: int) -> Work:
    """One stage by its name. evaluations: velocities that the adaptive solver asks for."""
    return sample(recipe, images, evaluations) if stage == "sample" else _WORKS[stage](recipe, images)


def shard(recipe: Recipe, images: Images) -> Work:
    count, scanned = sizes.shard_parts(images, recipe), isinstance(recipe.data.source, ParquetFiles)
    bytes_in = images.all * images.mean_bytes
    return Work(
        stage="shard",
        pool="decode",
        rows=Figure(images.all, images.source),
        written=Figure(sizes.shard_bytes(images, recipe), f"{SIZES}; bytes of an image: {images.bytes_source}"),
        reads=Figure((2 * count if scanned else images.all) + count, REQUESTS),
        writes=Figure(2 * count + 3 + MANIFEST_AND_RUN + (2 * count if scanned else 0), REQUESTS),
        flops=Figure(0, "no network"),
        read=bytes_in,
        beside=bytes_in if scanned else 0.0,
        held=_HELD_BY_DRIVER * images.all,
        decodes=images.all,
        image_bytes=images.mean_bytes,
    )


def _converted(recipe: Recipe, images: Images) -> Work:
    """What `encode` does where latents are given: by one process, beside no network."""
    written, count = sizes.latent_bytes(images, recipe), sizes.shard_parts(images, recipe)
    return Work(
        stage="encode",
        pool="head",
        rows=Figure(images.all, images.source),
        written=Figure(written, SIZES),
        reads=Figure(2 * count, REQUESTS),
        writes=Figure(2 * count + MANIFEST_AND_RUN, REQUESTS),
        flops=Figure(0, "no network"),
        read=2 * written,  # published in float32
    )


def encode(recipe: Recipe, images: Images) -> Work:
    if recipe.ready_latents:
        return _converted(recipe, images)
    compute, count = recipe.compute.actors, sizes.shard_parts(images, recipe)
    making = passes.making_latents(recipe)
    actors = min(compute.actors, count)
    return Work(
        stage="encode",
        pool="infer",
        precision=recipe.encode.precision,
        rows=Figure(images.all, images.source),
        written=Figure(sizes.latent_bytes(images, recipe), SIZES),
        reads=Figure(count + 4 * actors, REQUESTS),
        writes=Figure(2 * count + MANIFEST_AND_RUN, REQUESTS),
        flops=Figure(images.all * (1 if recipe.online_latents else sizes.views(recipe)) * making.flops, making.source),
        read=sizes.shard_bytes(images, recipe) + actors * sizes.weights_bytes(making.weights),
        decodes=images.all,
        image_bytes=images.mean_bytes,
        workers=actors,
        gpus=compute.gpus_per_actor,
        cpus=compute.cpus_per_actor,
        memory=passes.encoding(recipe),
    )


def sample(recipe: Recipe, images: Images, evaluations: int) -> Work:
    section, compute = recipe.sample, recipe.compute.actors
    length = section.batch * -(-SAMPLE_ROWS_PER_PART // section.batch)
    count = sizes.parts(section.images, length)
    groups, shown = (
        sizes.parts(section.images, section.batch),
        min(section.images, SAMPLE_GRID_ROWS * recipe.data.classes),
    )
    full, rest = divmod(section.images, length)
    made = full * length + section.batch * -(-rest // section.batch)  # batches are static: the last is filled up
    backbone, head = networks.sampled(recipe)
    encoder, decoder = networks.autoencoder(recipe.train_vavae.model, recipe.image.size)
    flops, hows, guides = float(decoder.flops), list[str](), dict[str, Cost]()
    for stage in recipe.sampled_resolutions:
        own = section.at(stage)
        main = guide = networks.sampled(recipe, stage.side)[0].flops
        if isinstance(own.guidance, RoutedGuidance):
            guide = main - networks.routed_flops(recipe, recipe.train_dit.model, stage.side)
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
        precision=recipe.sample.precision,
        rows=Figure(section.images, "recipe: sample.images"),
        written=Figure(
            sizes.sample_bytes(section.images, recipe.image.size, count, groups, shown),
            f"{SIZES}; an upper bound, as pixels are compressed",
        ),
        reads=Figure(6 * actors + count, REQUESTS),
        writes=Figure(2 * count + 1 + MANIFEST_AND_RUN, REQUESTS),
        flops=Figure(made * flops, f"{NETWORKS}; {', '.join(hows)}"),
        read=actors * sizes.weights_bytes(sum(guides.values(), backbone + head + encoder + decoder)),
        workers=actors,
        gpus=compute.gpus_per_actor,
        cpus=compute.cpus_per_actor,
        memory=passes.sampling(recipe),
        notes=_against_baseline(recipe, evaluations),
    )


def _with_published(work: Work, recipe: Recipe) -> Work:
    """A scoring stage with what the paper reports for it, and where the settings are not the paper's."""
    found = scores_of(work.stage, recipe)
    if found is None or recipe.published is None:
        return work
    values = ", ".join(f"{name} {value:g}" for name, value in found.named.items())
    notes = [f"{work.stage}: published {values} ({recipe.published.source})"]
    notes += [f"{work.stage}: {found.note}"] if found.note else []
    notes += [f"not as published: {each}" for each in departures(recipe)]
    return replace(work, notes=(*work.notes, *notes))


def _against_baseline(recipe: Recipe, evaluations: int) -> tuple[str, ...]:
    """What a cascade saves over what its paper compares with, in a line."""
    baseline = None if recipe.published is None else recipe.published.baseline
    if baseline is None:
        return ()
    own = effective_evaluations(recipe, evaluations)
    claimed = "" if baseline.speedup is None else f", claimed is {baseline.speedup:g} at least"
    return (
        f"sample: {own:.1f} effective evaluations an image against {baseline.evaluations} ({baseline.of}): "
        f"{baseline.evaluations / own:.2f} times as fast{claimed}",
    )


_WORKS: dict[str, Callable[[Recipe, Images], Work]] = {
    "shard": shard,
    "train_vavae": trainings.tokenizer,
    "train_semvae": trainings.semantics,
    "encode": encode,
    "train_dit": trainings.diffusion,
    "tune_fewstep": trainings.fewstep,
    "evaluate": scoring.evaluate,
    "evaluate_tokenizer": scoring.evaluate_tokenizer,
    "report": scoring.report,
}
