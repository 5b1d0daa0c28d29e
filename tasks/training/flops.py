"""What a trained stage's network costs for one image, exactly, from the recipe alone."""

from __future__ import annotations

import torch

from configs import Recipe
from models.flops import Routed, training_flops_per_image
from tasks.networks import build_autoencoder, build_flow_map, build_network, build_semantic_vae


def flops_per_image(recipe: Recipe, stage: str) -> float | None:
    """FLOPs of one image's forward and backward pass through the network that a stage trains, the mean over the
    resolutions of a cascade; None where the recipe has no such network.

    For the utilisation of the model (MFU): frozen networks, losses, the optimizer and what is computed twice to save
    memory are left out. The network is built without memory (meta device).
    """
    with torch.device("meta"):
        match stage:
            case "train_dit":
                network, cascade = build_network(recipe, recipe.train_dit.model), recipe.train_dit.cascade
                aligned = recipe.train_dit.objective.align_weight > 0
                shares = (1.0,) if cascade is None else cascade.shares
                return sum(
                    share
                    * routed_share
                    * training_flops_per_image(network, side=side, alignment=aligned, routed=routed)
                    for side, share in zip(recipe.sides, shares, strict=True)
                    for routed, routed_share in _routed(recipe)
                )
            case "tune_fewstep" if recipe.tune_fewstep is not None:
                steps = len(recipe.tune_fewstep.evaluations)
                return steps * training_flops_per_image(build_flow_map(recipe))
            case "train_vavae":
                return training_flops_per_image(build_autoencoder(recipe.train_vavae.model), side=recipe.image.size)
            case "train_semvae" if recipe.train_semvae is not None and recipe.foundation is not None:
                semantic = build_semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim)
                return training_flops_per_image(semantic, side=recipe.latent_size)
    return None


def _routed(recipe: Recipe) -> list[tuple[Routed | None, float]]:
    """How tokens go through the blocks, and the share of a training's images that go so."""
    routing = recipe.train_dit.routing
    if routing is None:
        return [(None, 1.0)]
    dense = routing.dense_share
    return [((routing.first, routing.last, routing.drop), 1.0 - dense), (None, dense)]
