"""From a recipe's foundation section to the frozen network, what it must fit, and a look at it before training."""

from __future__ import annotations

import torch
from torch import Tensor

from configs.data import Foundation
from configs.errors import UserError
from configs.fits import check_feature_grid, feature_readers
from configs.foundations import known_features
from configs.recipe import Recipe
from infra.transformers_files import folder_of, of_transformers
from models.foundation import FoundationModel

LEAST_VARIATION = 1e-4
"""Of features, over their size, below which they are the same."""


def load_foundation(section: Foundation) -> FoundationModel:
    """The frozen foundation model a recipe names, its width checked against `feature_dim`.

    Raises:
        UserError: weights that cannot be had, or features of another width than the recipe says.
    """
    from infra.weights import foundation_weights

    if of_transformers(section):
        model = build_foundation(section, weights=section.weights != "random")
    else:
        model = FoundationModel(
            section.name,
            weights=foundation_weights(section.name, section.weights),
            pretrained=section.weights == "hub",
            input_size=section.input_size,
            layer=section.layer,
            imagenet_norm=section.imagenet_norm,
            interpolation=section.interpolation,
        )
    _check_width(section, model)
    if section.vector == "token" and not model.has_token:
        raise UserError(
            f"vector is token but {section.name} (layer {section.layer}) has no class token at its end: use mean"
        )
    return model


def vectors(section: Foundation, network: FoundationModel, images_B3HW: Tensor) -> Tensor:
    """What stands for each image as a whole where sets are scored, (B, D): what `vector` of the section says."""
    return network.pooled(images_B3HW) if section.vector == "token" else network(images_B3HW).mean(dim=(2, 3))


def build_foundation(section: Foundation, weights: bool = False) -> FoundationModel:
    """The foundation model of a section with random weights, or one of transformers with its own.

    Raises:
        UserError: there is no such network, or its files cannot be had or read.
    """
    try:
        if not of_transformers(section):
            return FoundationModel(section.name, input_size=section.input_size, layer=section.layer)
        from models.transformers_foundation import TransformersFoundation  # its library takes seconds to import

        return TransformersFoundation(
            section.name,
            folder_of(section, weights),
            pretrained=weights,
            input_size=section.input_size,
            layer=section.layer,
            imagenet_norm=section.imagenet_norm,
            interpolation=section.interpolation,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"foundation.name {section.name}: {' '.join(str(error).split())[:200]}") from None


def look(section: Foundation, size: int) -> str:
    """Grid, width and variation of features of images of size × size pixels, in a line, before anything is trained.

    Raises:
        UserError: it cannot be had, or its features are the same for every image, or for every cell.
    """
    from models.tokenizer_kit import features_vary

    model = load_foundation(section)
    images, cells = features_vary(model, size)
    if min(images, cells) < LEAST_VARIATION:
        same = "images" if images < LEAST_VARIATION else "cells"
        raise UserError(
            f"foundation {section.name}: its features are the same over {same} (they vary by {images:.1e} over images "
            f"and {cells:.1e} over cells), so there is nothing to learn from them: check weights, layer and input_size"
        )
    return (
        f"foundation {section.name}: {model.feature_dim} channels on {model.grid(size)} × {model.grid(size)} cells, "
        f"varying by {images:.2f} over images and {cells:.2f} over cells of drawn pictures"
    )


def check_foundation(recipe: Recipe) -> None:
    """Refuse a foundation model that does not fit; one that is not listed is built on the meta device and asked.

    Raises:
        UserError: there is no such network, or its features are of another width or grid than the recipe needs.
    """
    section = recipe.foundation
    if section is None or known_features(section) is not None or not feature_readers(recipe):
        return
    with torch.device("meta"):
        network = build_foundation(section)
    _check_width(section, network)
    check_grid(network, recipe)


def _check_width(section: Foundation, network: FoundationModel) -> None:
    if network.feature_dim != section.feature_dim:
        raise UserError(
            f"foundation.feature_dim is {section.feature_dim} but {section.name} (layer {section.layer}) gives "
            f"{network.feature_dim}: set feature_dim: {network.feature_dim}"
        )


def check_grid(foundation: FoundationModel, recipe: Recipe) -> None:
    """Raises UserError where features of a recipe's images do not lie on the grid of their latents."""
    try:
        check_feature_grid(recipe, foundation.grid(recipe.image.size))
    except ValueError as error:
        raise UserError(str(error)) from None
