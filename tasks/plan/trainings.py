"""What the three trained stages do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from configs import Recipe
from configs.compute import TrainCompute
from configs.diffusion import TrainDit
from configs.sampling import Sample
from configs.tokenizers import VavaeObjective
from configs.training import Training
from tasks.data.portions import SHARD_ROWS_PER_GROUP
from tasks.plan import networks, sizes
from tasks.plan.data import Images
from tasks.plan.memory import memory_of
from tasks.plan.networks import Cost
from tasks.plan.passes import examining, making_latents
from tasks.plan.solvers import solver_evaluations
from tasks.plan.work import MANIFEST_AND_RUN, NETWORKS, REQUESTS, REREAD, SIZES, Figure, Work

SCORED = {"train_vavae": 10_000, "train_semvae": 2_000}
"""Test images on which a trained network is scored, at most."""


def tokenizer(recipe: Recipe, images: Images) -> Work:
    section, side = recipe.train_vavae, recipe.image.size
    encoder, decoder = networks.autoencoder(section.model, side)
    network, projection, adversary, source = encoder + decoder, Cost(), Cost(), NETWORKS
    if section.aligned and recipe.foundation is not None:
        projection = _projection(recipe)
        source += f"; {networks.foundation_flops(recipe.foundation)[1]}"
    if section.adversarial:
        adversary = sum(networks.discriminator(section.objective.discriminator, side), Cost())
    flops = tokenizer_flops(recipe) if section.images else 0.0
    own = projection, adversary
    return _on_images("train_vavae", recipe, section, images, network, flops, network.flops, source, own)


def tokenizer_flops(recipe: Recipe) -> float:
    """Of the whole training: every stage's terms for its images, the discriminator's from where it begins."""
    section, total = recipe.train_vavae, 0.0
    begins = [begin for begin, _ in section.objectives]
    for (begin, objective), end in zip(section.objectives, [*begins[1:], section.images], strict=True):
        length, late = end - begin, 0
        if objective.gan_weight > 0:
            late = max(0, length - section.batch * -(-objective.gan_start // section.batch))
        total += (length - late) * tokenizer_step_flops(recipe, objective, False)
        total += late * tokenizer_step_flops(recipe, objective, True) if late else 0.0
    return total


def tokenizer_step_flops(recipe: Recipe, objective: VavaeObjective, adversarial: bool) -> float:
    """Of one image's step under these weights, forward and backward, frozen networks included (papers.md 1.2).

    What is computed for the adaptive weights alone: for the adversarial one, how the loss and the discriminator's
    answer move the image; for the alignment's, beside a discriminator, how the loss moves the latent.
    """
    side, adaptive = recipe.image.size, objective.adaptive
    encoder, decoder = networks.autoencoder(recipe.train_vavae.model, side)
    total = 3.0 * (encoder.flops + decoder.flops)
    aligned = objective.align_weight > 0 and recipe.foundation is not None
    again = adaptive and aligned and (adversarial or recipe.compute.train.zero_stage == 3)
    if aligned:
        assert recipe.foundation is not None
        cells, width = recipe.latent_size**2, recipe.foundation.feature_dim
        projection, pairs = _projection(recipe).flops, 2 * cells**2 * width
        total += networks.foundation_flops(recipe.foundation)[0]
        total += 3 * projection + 4 * pairs + adaptive * (projection + 2 * pairs)
        total += again * decoder.flops
    if objective.perceptual_weight > 0:
        looking, weighing = _perceptual_flops(recipe)
        backward = 1 + (adaptive and adversarial) + again
        total += 2 * looking + weighing + backward * (looking + weighing)
    if adversarial:
        first, rest = networks.discriminator(objective.discriminator, side)
        total += (2 + adaptive) * (first.flops + rest.flops)
        total += 4 * first.flops + 6 * rest.flops  # its own step, on images and reconstructions
    return total


def _perceptual_flops(recipe: Recipe) -> tuple[int, int]:
    """Of looking at one image, and of weighing what was seen of two."""
    layers, foundation = recipe.train_vavae.objective.perceptual_layers, recipe.foundation
    if not layers:
        return networks.lpips_flops(recipe.image.size)
    assert foundation is not None  # the recipe's rules
    return networks.foundation_flops(foundation.model_copy(update={"layer": max(layers)}))[0], 0


def _projection(recipe: Recipe) -> Cost:
    """Of latents up to the features' width, without an offset."""
    assert recipe.foundation is not None
    weights = recipe.train_vavae.model.z_channels * recipe.foundation.feature_dim
    return Cost(weights, 1, 2 * recipe.latent_size**2 * weights)


def semantics(recipe: Recipe, images: Images) -> Work:
    section, foundation = recipe.train_semvae, recipe.foundation
    assert section is not None and foundation is not None  # the recipe's rules
    encoder, decoder = networks.semantic_vae(section.model, foundation.feature_dim, recipe.latent_size**2)
    network = encoder + decoder
    given, how = networks.foundation_flops(foundation)
    source = f"{NETWORKS}; {how}"
    flops = section.images * (3 * network.flops + given)
    return _on_images("train_semvae", recipe, section, images, network, flops, network.flops + given, source)


def diffusion(recipe: Recipe, images: Images) -> Work:
    section, compute = recipe.train_dit, recipe.compute.train
    backbone, head = networks.diffusion(recipe, section.model)
    aligned = section.objective.align_weight > 0
    trained, again = 0.0, 0.0
    routed = 1.0 - section.routing.dense_share if section.routing else 0.0
    for side, share in zip(recipe.sides, (1.0,) if section.cascade is None else section.cascade.shares, strict=True):
        own, own_head = networks.diffusion(recipe, section.model, side)
        saved = routed * networks.routed_flops(recipe, section.model, side)
        blocks = networks.blocks_flops(recipe, section.model, side) - saved
        trained += share * (own.flops - saved + (own_head.flops if aligned else 0))
        again += share * (blocks if compute.recompute else 0)
    columns = sizes.latent_columns(recipe)
    stored = aligned and not section.online
    row: float = sum(size for name, size in columns.items() if name != "f" or stored) * sizes.views(recipe)
    frozen, source = _frozen(recipe)
    split = sizes.latent_bytes(images, recipe)
    looked = _looked_at(recipe)
    decodes = section.images * looked
    if decodes:
        row, split = row + images.mean_bytes, split + sizes.shard_bytes(images, recipe)
    share = images.train / max(1, images.all)
    return _trained(
        "train_dit",
        recipe,
        section,
        _Training(
            network=backbone + head,
            flops=section.images * (3 * trained + again + frozen),
            source=source,
            row_bytes=row,
            groups_per_image=sizes.parts(images.train, recipe.encode.rows_per_group) / max(1, images.train),
            split_bytes=split * share,
            split_parts=_train_parts(images, recipe),
            decodes=decodes,
            decoded_share=looked,
            image_bytes=images.mean_bytes if decodes else 0.0,
        ),
    )


def _looked_at(recipe: Recipe) -> float:
    """The share of a diffusion training's images that are decoded beside its steps."""
    if recipe.online_latents:
        return 1.0
    return _aligned_share(recipe.train_dit) if recipe.train_dit.online else 0.0


def _aligned_share(section: TrainDit) -> float:
    """Of the images, for which alignment counts."""
    until = section.objective.align_until
    return 1.0 if until is None or not section.images else min(1.0, until / section.images)


def _frozen(recipe: Recipe) -> tuple[float, str]:
    """FLOPs of the networks that look at an image beside a step of `train_dit`, and where they come from."""
    section = recipe.train_dit
    flops, source = 0.0, NETWORKS
    if section.online and recipe.foundation is not None:
        flops, how = networks.foundation_flops(recipe.foundation)
        flops *= _aligned_share(section)  # then it rests
        source = f"{NETWORKS}; {how}"
    if recipe.online_latents:
        making = making_latents(recipe)
        flops, source = flops + making.flops, making.source if making.source != NETWORKS else source
    return flops, source


def fewstep(recipe: Recipe, images: Images) -> Work:
    section = recipe.tune_fewstep
    assert section is not None  # the recipe's rules
    network = networks.flow_map(recipe)
    # A teacher's way is asked for as a sample of so many steps would be.
    way = Sample(images=1, guidance=section.guidance, solver=section.solver, steps=section.steps)
    asked, guided, how = solver_evaluations(recipe, way, 0)
    frozen = (asked + guided) * networks.diffusion(recipe, recipe.train_dit.model)[0].flops
    again = networks.blocks_flops(recipe, recipe.train_dit.model) if recipe.compute.train.recompute else 0
    trained = len(section.evaluations) * (3 * network.flops + again)
    return _trained(
        "tune_fewstep",
        recipe,
        section,
        _Training(
            network=network,
            flops=section.images * (trained + frozen),
            source=f"{NETWORKS}; the teacher's {how}",
            row_bytes=0.0,
            groups_per_image=0.0,
            split_bytes=0.0,
            split_parts=0,
        ),
    )


@dataclass(frozen=True)
class _Training:
    """In what the trained stages differ."""

    network: Cost
    flops: float
    """Of all steps."""
    source: str
    row_bytes: float
    groups_per_image: float
    """Row groups of the train split over its images."""
    split_bytes: float
    split_parts: int
    """Of the train split, which a local cache may hold."""
    decodes: float = 0.0
    decoded_share: float = 1.0
    image_bytes: float = 0.0
    scored: int = 0
    """Test images that the finished network is scored on, by one process; and FLOPs of one."""
    score_flops: int = 0
    projection: Cost = field(default_factory=Cost)
    """What the objective trains beside the network, in the same module and as its adversary."""
    adversary: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class _Files:
    """What a training writes."""

    stored: int
    """Files of the artifact."""
    bytes: float
    saves: int
    """Checkpoints, and files of each."""
    per_save: int
    beside: float
    """Bytes of those that are kept at once."""


def _on_images(
    stage: str,
    recipe: Recipe,
    section: Training,
    images: Images,
    network: Cost,
    flops: float,
    score_flops: int,
    source: str,
    own: tuple[Cost, Cost] = (Cost(), Cost()),
) -> Work:
    """A training on decoded images. own: projection and adversary of its objective."""
    return _trained(
        stage,
        recipe,
        section,
        _Training(
            network=network,
            flops=flops,
            source=source,
            row_bytes=images.mean_bytes,
            groups_per_image=1 / SHARD_ROWS_PER_GROUP,
            split_bytes=sizes.shard_bytes(images, recipe) * images.train / max(1, images.all),
            split_parts=_train_parts(images, recipe),
            decodes=section.images,
            image_bytes=images.mean_bytes,
            scored=min(SCORED[stage], images.test) if recipe.needs_images else 0,
            score_flops=score_flops,
            projection=own[0],
            adversary=own[1],
        ),
    )


def _trained(stage: str, recipe: Recipe, section: Training, what: _Training) -> Work:
    compute, trains = recipe.compute.train, section.images > 0
    files, scoring = _files(section, compute, what), what.scored * what.score_flops
    reads, read = REREAD * section.images * what.groups_per_image, REREAD * section.images * what.row_bytes
    how = REQUESTS
    if what.split_bytes <= compute.cache_gib * 2**30:  # one copy a node, of which there are at most as many as workers
        reads, read = min(reads, compute.workers * what.split_parts), min(read, compute.workers * what.split_bytes)
        how += "; compute.train.cache_gib holds all"
    # Given weights are scored by an actor with an accelerator, or else in the flow's own process.
    actor = recipe.compute.actors if not trains and scoring and recipe.compute.actors.gpus_per_actor else None
    notes: tuple[str, ...] = ()
    if not trains and scoring and actor is None:
        notes = (f"{stage} takes given weights, and scores them in the flow's own process: on the head, without a GPU",)
    given: Literal["head", "infer"] = "head" if actor is None else "infer"
    return Work(
        stage=stage,
        pool="train" if trains else given,
        rows=Figure(section.images, f"recipe: {stage}.images"),
        written=Figure(files.bytes, SIZES),
        reads=Figure(reads + what.scored / SHARD_ROWS_PER_GROUP, how),
        writes=Figure(
            files.stored + 1 + MANIFEST_AND_RUN + files.saves * files.per_save, "formula: files of a checkpoint"
        ),
        flops=Figure(what.flops + scoring, what.source),
        read=read + what.scored * what.row_bytes,
        beside=files.beside,
        decodes=what.decodes,
        decoded_share=what.decoded_share,
        image_bytes=what.image_bytes,
        precision="bf16" if section.precision == "fp16" else section.precision,  # which has the same peak
        workers=compute.workers if trains else 1,
        gpus=compute.gpus_per_worker if trains else actor.gpus_per_actor if actor else 0,
        cpus=actor.cpus_per_actor if actor else compute.cpus_per_worker,
        alone=scoring,
        alone_decodes=what.scored,
        memory=memory_of(recipe, stage) or (examining(recipe) if actor else None),
        notes=notes,
    )


def _files(section: Training, compute: TrainCompute, what: _Training) -> _Files:
    """Networks, averages and checkpoints; a training of no images writes the network that it was given."""
    weights = sizes.weights_bytes(what.network)
    if not section.images:
        return _Files(stored=1, bytes=weights, saves=0, per_save=0, beside=0.0)
    averages = (section.ema_decay is not None) + len(section.ema_decays) + len(section.ema_sigmas)
    snapshots = len(section.keep_averages_at)
    if section.snapshot_every:
        snapshots += len(section.ema_sigmas) * (section.images // section.snapshot_every)
    objective = sizes.weights_bytes(what.projection + what.adversary)
    networks_stored = 1 + averages + snapshots
    saves = (section.images - 1) // compute.checkpoint_every
    kept = min(saves, compute.keep_checkpoints + 1)  # one more while it is written
    if compute.keep_every:
        kept = min(saves, kept + section.images // compute.keep_every)
    copies, of_adversary = 3 + averages, 3 if what.adversary.values else 0  # weights and two moments with them
    checkpoint = copies * sizes.weights_bytes(what.network + what.projection)
    checkpoint += of_adversary * sizes.weights_bytes(what.adversary)
    return _Files(
        stored=networks_stored + (objective > 0),
        bytes=networks_stored * weights + objective,
        saves=saves,
        per_save=copies + of_adversary + 2,
        beside=kept * checkpoint,
    )


def _train_parts(images: Images, recipe: Recipe) -> int:
    return sizes.parts(images.train, recipe.shard.rows_per_shard)
