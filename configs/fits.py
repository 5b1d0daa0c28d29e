"""More rules between sections: what a network, a loader or a score would refuse later, refused by the recipe.

As in `configs/rules.py`, each raises ValueError with the fields, what was found and what would be right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from configs.autoencoders import TRAINABLE, DiffusersModel, PythonModel
from configs.data import Foundation
from configs.diffusion import DitModel, UnetModel
from configs.foundations import known_features, unfit
from configs.rules import models_of
from models.sizes import SIZES

if TYPE_CHECKING:
    from configs.recipe import Recipe

TRAINED = ("train_vavae", "train_semvae", "train_dit")
"""Sections of what is trained on images of the recipe's source."""
_LPIPS_SIDE = 16
"""VGG16 halves its input four times."""


def _heads(recipe: Recipe) -> None:
    for field, model in models_of(recipe):
        if not isinstance(model, DitModel) or model.align_depth is None:
            continue
        depth = SIZES[model.size]["depth"] if model.size else model.depth
        if depth is not None and model.align_depth > depth:
            raise ValueError(
                f"{field}.align_depth is {model.align_depth} but the network has {depth} blocks: use at most {depth}"
            )
        if recipe.foundation is None:
            raise ValueError(
                f"{field}.align_depth is set but foundation is not: name the network that it was aligned with, or "
                "leave it out"
            )


def _routes(recipe: Recipe) -> None:
    model, routing = recipe.train_dit.model, recipe.train_dit.routing
    if routing is None:
        return
    if not isinstance(model, DitModel):
        raise ValueError("train_dit.routing routes the tokens of a LightningDiT, and the model is a UNet: leave it out")
    depth = SIZES[model.size]["depth"] if model.size else model.depth
    if depth is not None and routing.last > depth:
        raise ValueError(f"train_dit.routing.last is {routing.last} but the network has {depth} blocks")
    if model.value_residual and routing.first == 1:
        raise ValueError(
            "train_dit.routing.first is 1, but train_dit.model.value_residual needs that block's values of all tokens: "
            "route from block 2 on"
        )
    if model.align_depth is not None and routing.first <= model.align_depth < routing.last:
        raise ValueError(
            f"train_dit.model.align_depth is {model.align_depth}, where tokens go around blocks {routing.first} to "
            f"{routing.last} and have no features: align before block {routing.first} or from {routing.last} on"
        )


def _pairs(recipe: Recipe) -> None:
    """Raises ValueError where a contrastive pair of images would be torn apart."""
    section, compute = recipe.train_dit, recipe.compute.train
    if not section.objective.contrastive_weight or not section.images or isinstance(section.model, UnetModel):
        return
    share = section.batch // compute.workers
    micro = min(compute.micro_batch or share, share)
    if share % 2 or micro % 2:
        raise ValueError(
            f"train_dit.objective.contrastive_weight pairs images, but a worker takes {share} of a batch of "
            f"{section.batch}, {micro} at a time: make both even"
        )


def _pixel_objective(recipe: Recipe) -> None:
    """Raises ValueError where a UNet's training would not do what the objective says."""
    section = recipe.train_dit
    if not section.images or not isinstance(section.model, UnetModel):
        return
    if unknown := sorted(section.objective.model_dump(exclude_defaults=True).keys() - {"label_dropout"}):
        fields = ", ".join(f"train_dit.objective.{name}" for name in unknown)
        raise ValueError(
            f"{fields}: of velocities and their times, and a UNet predicts images at noise levels of its own section "
            "(train_dit.model.sigma_mean, sigma_spread): leave out"
        )


def _optimizers(recipe: Recipe) -> None:
    for name in (*TRAINED, "tune_fewstep"):
        section = getattr(recipe, name)
        if section is None or section.optimizer != "muon" or not section.images:
            continue
        if name == "train_vavae" or (name == "train_dit" and isinstance(section.model, UnetModel)):
            raise ValueError(
                f"{name}.optimizer is muon, which steps a transformer's matrices: set adamw for convolutions"
            )
        if name == "train_semvae":
            raise ValueError(
                "train_semvae.optimizer is muon, which knows the matrices of a LightningDiT alone: set adamw"
            )
        if recipe.compute.train.zero_stage:
            raise ValueError(
                f"{name}.optimizer is muon and compute.train.zero_stage {recipe.compute.train.zero_stage}, which cuts "
                "matrices into pieces that Muon cannot step: set zero_stage to 0, or optimizer to adamw"
            )


def _decays(recipe: Recipe) -> None:
    """Raises ValueError where AdamW or an average of weights would be given a decay that it cannot have."""
    for name in (*TRAINED, "tune_fewstep"):
        section = getattr(recipe, name)
        if section is None or not section.images:
            continue
        if not all(0.0 <= beta < 1.0 for beta in section.betas):
            raise ValueError(f"{name}.betas are {list(section.betas)}: each must be 0 or more and below 1")
        if 1.0 in (section.ema_decay, *section.ema_decays):
            raise ValueError(
                f"{name}.ema_decay or ema_decays is 1, an average that stays at the first weights: use less, or null"
            )
        if len(set(section.ema_sigmas)) < len(section.ema_sigmas):
            raise ValueError(f"{name}.ema_sigmas {list(section.ema_sigmas)} name a width twice: name each once")


def _finite(recipe: Recipe) -> None:
    if odd := [f"{field} is {value}" for field, value in _numbers(recipe.model_dump()) if not math.isfinite(value)]:
        raise ValueError(f"{', '.join(odd)}: give a finite number")


def _numbers(value: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """All floats by their fields' names."""
    if isinstance(value, float):
        yield where, value
    elif isinstance(value, dict | tuple | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(each, f"{where}.{key}" if where else str(key))


def _engine(recipe: Recipe) -> None:
    compute = recipe.compute.train
    if compute.engine == "plain" and compute.zero_stage:
        raise ValueError(
            f"compute.train.engine is plain but zero_stage is {compute.zero_stage}, and only DeepSpeed shards: set "
            "zero_stage to 0, or engine to auto"
        )
    if owned := compute.owned:
        raise ValueError(
            f"compute.train.deepspeed sets {', '.join(owned)}, which follows from the recipe: set batch, precision and "
            "clip_norm in the stage's section, or micro_batch, zero_stage and communication in compute.train"
        )


def _whole_gpus(recipe: Recipe) -> None:
    gpus = recipe.compute.actors.gpus_per_actor
    if gpus > 1 and gpus % 1:
        raise ValueError(
            f"compute.actors.gpus_per_actor is {gpus:g}: Ray gives a part of one GPU, or whole ones; use "
            f"{math.ceil(gpus)}, or 1 and less"
        )


def _levels(recipe: Recipe) -> None:
    for field, model in models_of(recipe):
        if not isinstance(model, UnetModel):
            continue
        if model.sigma_min >= model.sigma_max:
            raise ValueError(
                f"{field}.sigma_min {model.sigma_min:g} is not below sigma_max {model.sigma_max:g}: sampling goes from "
                "the most noise to the least; the published values are 0.002 and 80"
            )
        finest, levels = recipe.sides[-1], len(model.multipliers)
        if [finest >> level for level in range(len(recipe.sides))] != list(reversed(recipe.sides)):
            raise ValueError(
                f"train_dit.cascade.sides {list(recipe.sides)} leave one out: a UNet's resolutions double from one to "
                "the next"
            )
        if len(recipe.sides) > levels:
            raise ValueError(
                f"{field}.multipliers has {levels} levels but train_dit.cascade.sides has {len(recipe.sides)}: give "
                "each side a level of its own"
            )
        if finest % 2 ** (levels - 1):
            raise ValueError(
                f"{field}.multipliers has {levels} levels, which halve the side {finest} {levels - 1} times: use fewer "
                f"levels, or a side that is a multiple of {2 ** (levels - 1)}"
            )


def feature_readers(recipe: Recipe) -> list[str]:
    """Fields that put features of the foundation model and latents on one grid."""
    if recipe.ready_latents:  # no image is looked at
        return []
    trained = None if recipe.lacks("train_dit") else recipe.train_dit
    readers = {
        "train_vavae.objective.align_weight": recipe.train_vavae.images > 0 and recipe.train_vavae.aligned,
        "train_semvae": recipe.train_semvae is not None,
        "encode.align_features": recipe.encode.align_features,
        "train_dit.objective.align": trained is not None and trained.images > 0 and trained.online,
    }
    return [name for name, reads in readers.items() if reads]


def check_feature_grid(recipe: Recipe, side: int) -> None:
    """Raises ValueError where features on a grid of this side do not lie on the latents."""
    section, readers = recipe.foundation, feature_readers(recipe)
    if section is None or not readers or side == recipe.latent_size:
        return
    cell = section.input_size // side if side else 0
    fitting = f" to {recipe.latent_size * cell}" if cell and cell * side == section.input_size else ""
    raise ValueError(
        f"foundation {section.name} gives features on a grid of {side} × {side} at input_size {section.input_size}, "
        f"but {readers[0]} wants them on the latents' {recipe.latent_size} × {recipe.latent_size} (image.size "
        f"{recipe.image.size} / {recipe.train_vavae.model.downscale}): set foundation.input_size{fitting}, or take "
        "another foundation.layer"
    )


def _grids(recipe: Recipe) -> None:
    found = known_features(recipe.foundation) if recipe.foundation is not None else None
    if found is not None:
        check_feature_grid(recipe, found.side)


def _foundations(recipe: Recipe) -> dict[str, Foundation]:
    """Sections of foundation models by their fields' names."""
    sections = {"foundation": recipe.foundation}
    if not recipe.lacks("evaluate"):
        sections["evaluate.features"] = recipe.evaluate.features
    return {field: section for field, section in sections.items() if section is not None}


def _unfit(recipe: Recipe) -> None:
    for field, section in _foundations(recipe).items():
        if (said := unfit(section)) is not None:
            raise ValueError(f"{field}.{said}")


def _widths(recipe: Recipe) -> None:
    for field, section in _foundations(recipe).items():
        found = known_features(section)
        if found is None or found.width == section.feature_dim:
            continue
        raise ValueError(
            f"{field}.feature_dim is {section.feature_dim} but {section.name} gives {found.width}: set "
            f"{field}.feature_dim to {found.width}"
        )


def _aligned_tokens(recipe: Recipe) -> None:
    section = recipe.train_dit
    if section.images and section.objective.align_weight > 0 and isinstance(section.model, DitModel):
        patch, side = section.model.patch_size, recipe.latent_size
        if patch > 1:
            raise ValueError(
                f"train_dit.objective.align_weight is above 0 but train_dit.model.patch_size is {patch}, so tokens lie "
                f"on {side // patch} × {side // patch} and features on {side} × {side}: use patch_size 1, or "
                "align_weight 0"
            )


def _limit(recipe: Recipe) -> None:
    limit, classes = recipe.shard.limit, recipe.data.classes
    if limit is None:
        return
    if limit < classes and not recipe.data.allow_empty_classes:
        raise ValueError(
            f"shard.limit {limit} is below data.classes {classes}, so training never sees some classes: raise it to "
            f"{classes} at least, or set data.allow_empty_classes to true"
        )
    check_batches(recipe, limit, f"shard.limit {limit}")


def check_batches(recipe: Recipe, images: int, what: str) -> None:
    """Raises ValueError where a batch is larger than the training split. what: where that number comes from."""
    for name in TRAINED:
        section = getattr(recipe, name)
        if section is not None and section.images and section.batch > images:
            raise ValueError(
                f"{name}.batch {section.batch} is more than all images to learn from ({what}): use at most {images}"
            )


def _critics(recipe: Recipe) -> None:
    section, side = recipe.train_vavae, recipe.image.size
    if not section.images:
        return
    if section.model.identity:
        raise ValueError(
            f"train_vavae.model.identity is true but train_vavae.images is {section.images}: there is nothing to "
            "train, use images: 0"
        )
    model = section.model
    if isinstance(model, PythonModel) or (isinstance(model, DiffusersModel) and model.class_name not in TRAINABLE):
        raise ValueError(
            f"train_vavae.images is {section.images} but our objective trains no {model.class_name}, only "
            f"{' and '.join(TRAINABLE)}: use images: 0, which takes it as it is"
        )
    layers = section.objective.discriminator.layers
    if section.adversarial and side >> layers < 3:
        raise ValueError(
            f"train_vavae.objective.discriminator.layers {layers} leaves nothing of images of {side} pixels: use fewer "
            f"layers, or image.size {3 << layers} and more"
        )
    if section.perceptual and section.objective.perceptual_layers:
        _feature_distance(recipe)
    elif section.perceptual and side < _LPIPS_SIDE:
        raise ValueError(
            f"train_vavae.objective.perceptual_weight is above 0 but image.size is {side}, too small for LPIPS: use "
            f"{_LPIPS_SIDE} pixels and more, or weight 0"
        )


def _feature_distance(recipe: Recipe) -> None:
    """Raises ValueError where the foundation model cannot give the perceptual term."""
    field, foundation = "train_vavae.objective.perceptual_layers", recipe.foundation
    layers = recipe.train_vavae.objective.perceptual_layers
    if foundation is None:
        raise ValueError(
            f"{field} names layers {list(layers)} but foundation is not set: name a network, or leave it out"
        )
    if foundation.name.startswith("transformers/"):
        raise ValueError(
            f"{field} reads layers of timm's networks only, found {foundation.name}: leave it out for LPIPS"
        )
    for layer in layers:
        if (wrong := unfit(foundation.model_copy(update={"layer": layer, "vector": "mean"}))) is not None:
            raise ValueError(f"{field}: {wrong}")


def _neighbours(recipe: Recipe) -> None:
    section = recipe.evaluate
    least = min(recipe.sample.images, section.images, recipe.shard.limit or section.images)
    if least <= section.neighbours:
        raise ValueError(
            f"evaluate.neighbours {section.neighbours} need more than so many images, but sample.images, "
            f"evaluate.images or shard.limit leave {least}: raise those or lower neighbours"
        )


RULES: dict[Callable[[Recipe], None], tuple[str, ...]] = {
    _heads: ("train_dit",),
    _levels: ("train_dit",),
    _routes: ("train_dit",),
    _pairs: ("train_dit",),
    _pixel_objective: ("train_dit",),
    _optimizers: (),
    _decays: (),
    _finite: (),
    _engine: (),
    _whole_gpus: (),
    _grids: (),
    _unfit: (),
    _widths: (),
    _aligned_tokens: ("train_dit",),
    _limit: (),
    _critics: (),
    _neighbours: ("sample", "evaluate"),
}
"""Each rule with the sections that it cannot do without."""
