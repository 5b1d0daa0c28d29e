"""Every network of every recipe that is accepted can be built and fed: on the meta device, where that costs nothing."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from configs import Recipe, UserError, load_recipe, recipe_names
from configs.autoencoders import AutoencoderModel
from configs.data import Foundation
from configs.diffusion import UnetModel
from configs.fits import feature_readers
from configs.foundations import known_features
from configs.rules import models_of
from models.discriminator import PatchDiscriminator
from models.foundation import FoundationModel
from tasks.networks import (
    build_autoencoder,
    build_network,
    build_objective,
    build_semantic_vae,
    check_foundation,
)
from tasks.sampling.integrator import Integrator
from tests.helpers.recipe_choices import CHOICES, drawn_recipes

TRIES = 40
"""Random recipes from each base, always the same, so that a failure can be looked at."""


@lru_cache
def _foundation(section: Foundation) -> FoundationModel:
    with torch.device("meta"):
        return FoundationModel(section.name, pretrained=False, input_size=section.input_size, layer=section.layer)


def _fed(recipe: Recipe) -> None:
    """Build and run what the stages of a recipe build, without a number in it."""
    size, latent, channels = recipe.image.size, recipe.latent_size, recipe.latent_channels
    with torch.device("meta"):
        images = torch.empty(2, 3, size, size)
        texture = build_autoencoder(recipe.train_vavae.model).encode(images).mean
        assert texture.shape == (2, recipe.channel_groups["texture"], latent, latent)
        if recipe.train_vavae.images and recipe.train_vavae.adversarial:
            critic = recipe.train_vavae.objective.discriminator
            PatchDiscriminator(width=critic.width, layers=critic.layers, norm=critic.norm)(images)
        target = None
        if recipe.foundation is not None and feature_readers(recipe):
            network = _foundation(recipe.foundation)
            side, width = network.grid(size), network.feature_dim
            assert (width, side) == (recipe.foundation.feature_dim, latent)
            target = torch.empty(2, width, side, side)
            if recipe.train_semvae is not None:
                build_semantic_vae(recipe.train_semvae.model, width).encode(target)
        if recipe.lacks("train_dit"):
            return
        for _, section in models_of(recipe):
            network = build_network(recipe, section)
            for side in recipe.sides:
                x = torch.empty(2, 3 if isinstance(section, UnetModel) else channels, side, side)
                clocks = 1 if isinstance(section, UnetModel) else len(recipe.channel_groups)
                network(x, torch.empty(2, clocks), torch.zeros(2, dtype=torch.int64))
        if recipe.train_dit.images and not isinstance(recipe.train_dit.model, UnetModel):
            whole = recipe.compute.train.micro_batch or recipe.train_dit.batch // recipe.compute.train.workers
            batch = min(whole, 2 + whole % 2)  # losses that compare neighbours take even ones only
            x = torch.empty(batch, channels, latent, latent)
            labels = torch.zeros(batch, dtype=torch.int64)
            target = None if target is None else target[:1].expand(batch, -1, -1, -1)
            build_objective(recipe).loss(
                build_network(recipe, recipe.train_dit.model), x, labels, x, torch.empty(batch),
                align_target_BChw=target,
            )  # fmt: skip


def _sampled(recipe: Recipe) -> None:
    """Sample two images of the recipe's network, untrained and no larger than a twin's, by its solver and guidance."""
    model = recipe.train_dit.model
    if recipe.lacks("sample") or recipe.sides[-1] > 16 or (isinstance(model, UnetModel) and model.channels > 40):
        return
    network = build_network(recipe, model).eval().requires_grad_(False)
    recipe = recipe.model_copy(
        update={"sample": recipe.sample.model_copy(update={"steps": min(3, recipe.sample.steps)})}
    )
    with torch.no_grad():
        made = Integrator(recipe, network)(torch.zeros(2, dtype=torch.int64), lambda shape, _: torch.zeros(2, *shape))
    channels = 3 if isinstance(model, UnetModel) else recipe.latent_channels
    assert made.shape == (2, channels, recipe.sides[-1], recipe.sides[-1])


@pytest.mark.parametrize("base", CHOICES)
def test_no_network_refuses_what_the_recipe_accepted(base: str) -> None:
    tried = 0
    for overrides, recipe in drawn_recipes(base, TRIES):
        try:
            check_foundation(recipe)  # of a network that only itself can tell, before a run
        except UserError:
            continue
        tried += 1
        try:
            _fed(recipe)
            _sampled(recipe)
        except Exception as error:
            raise AssertionError(f"{base} {overrides} is accepted and ends in {error!r}") from error
    assert tried >= TRIES // 8, "the grid is refused before anything is tried"


@pytest.mark.parametrize("name", [name for name in recipe_names() if "xl" not in name and "xxl" not in name])
def test_networks_of_shipped_recipes_fit(name: str) -> None:
    _fed(load_recipe(name))


@pytest.mark.parametrize("name", [name for name in recipe_names() if "xl" in name])
def test_networks_of_large_recipes_are_built(name: str) -> None:
    """Tokenizer, Semantic VAE, the diffusion network and its guides; to feed them takes longer."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        if isinstance(recipe.train_vavae.model, AutoencoderModel):  # others' are described by files on a hub
            build_autoencoder(recipe.train_vavae.model)
        if recipe.train_semvae is not None and recipe.foundation is not None:
            build_semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim)
        sizes = [sum(p.numel() for p in build_network(recipe, model).parameters()) for _, model in models_of(recipe)]
    assert sizes[0] > 600_000_000


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch14_reg4_dinov2.lvd142m",
        "vit_base_patch14_dinov2",
        "vit_large_patch16_224",
    ],
)
def test_widths_and_grids_of_vision_transformers(name: str) -> None:
    section = Foundation(name=name, weights="random", feature_dim=1, input_size=112)
    network = _foundation(section)
    found = known_features(section)
    assert found is not None and (found.width, found.side) == (network.feature_dim, network.grid(256))


@pytest.mark.parametrize("layer", [None, *range(-5, 5)])
@pytest.mark.parametrize("size", [63, 64])
def test_widths_and_grids_of_every_level_of_efficientnet(layer: int | None, size: int) -> None:
    section = Foundation(name="efficientnet_lite0", weights="random", feature_dim=1, input_size=size, layer=layer)
    network, found = _foundation(section), known_features(section)
    assert found is not None and (found.width, found.side) == (network.feature_dim, network.grid(256))


def test_networks_that_are_not_listed_are_not_guessed() -> None:
    for name in ("resnet18", "vit_giant_patch14_dinov2", "convnext_tiny"):
        assert known_features(Foundation(name=name, weights="random", feature_dim=1, input_size=64)) is None
