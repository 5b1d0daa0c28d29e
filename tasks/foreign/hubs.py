"""What the stages of a recipe take from model hubs, looked for before any of them starts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from configs import Recipe, UserError
from configs.fits import feature_readers
from infra import hubs

_HUB = "hub"
_VGG16 = "https://download.pytorch.org/models/vgg16-397923af.pth"
_BY_READER = {
    "train_vavae.objective.align_weight": ("train_vavae",),
    "train_semvae": ("train_semvae", "encode"),
    "encode.align_features": ("encode",),
    "train_dit.objective.align": ("train_dit",),
}
"""Stages that build the foundation model, by the field that has them do it."""


def check_hubs(recipe: Recipe, stages: Collection[str]) -> None:
    """Refuse what these stages would ask a hub for in vain.

    Raises:
        UserError: naming every field, why its hub cannot be reached, and the way out.
    """
    needed = list(_needed(recipe, stages))
    if not needed:
        return
    with ThreadPoolExecutor(len(needed)) as pool:  # each may wait for a proxy or a name server that says nothing
        faults = [fault for fault in pool.map(_fault, needed) if fault is not None]
    if faults:
        raise UserError("; ".join(dict.fromkeys(faults)))


def _fault(check: Callable[[], None]) -> str | None:
    try:
        check()
    except UserError as fault:
        return str(fault)
    return None


def _needed(recipe: Recipe, stages: Collection[str]) -> Iterator[Callable[[], None]]:
    foundation, tokenizer = recipe.foundation, recipe.train_vavae
    readers = {stage for field in feature_readers(recipe) for stage in _BY_READER[field]}
    if recipe.online_latents and recipe.train_semvae is not None:
        readers.add("train_dit")
    if recipe.evaluate_tokenizer.probe_images:
        readers.add("evaluate_tokenizer")
    layers = tokenizer.objective.perceptual_layers
    perceptual = tokenizer.images > 0 and tokenizer.perceptual
    if perceptual and layers:
        readers.add("train_vavae")
    if foundation is not None and foundation.weights == _HUB and readers & set(stages):
        yield partial(hubs.check_timm, "foundation.weights", foundation.name)
    features = None if recipe.lacks("evaluate") else recipe.evaluate.features
    if features is not None and features.weights == _HUB and {"evaluate", "evaluate_tokenizer"} & set(stages):
        yield partial(hubs.check_timm, "evaluate.features.weights", features.name)
    by_lpips = "train_vavae" in stages and perceptual and not layers
    if by_lpips and tokenizer.objective.lpips_weights == _HUB:
        yield partial(hubs.check_torch, "train_vavae.objective.lpips_weights", _VGG16)
    if "evaluate_tokenizer" in stages and recipe.evaluate_tokenizer.lpips_weights == _HUB:
        yield partial(hubs.check_torch, "evaluate_tokenizer.lpips_weights", _VGG16)
