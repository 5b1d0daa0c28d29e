"""Memory of one GPU where frozen networks look at images: what they weigh, and what a pass of one image takes.

Of a pass only what is needed next stays, so its height counts: the widest place of a network. That was counted by
torch's own allocations, of small networks on a CPU (tests/tasks/plan/test_passes.py), and not measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.autoencoders import DiffusersModel, Tokenizer
from configs.data import Foundation
from configs.diffusion import DiffusionModel, UnetModel
from configs.recipe import Recipe
from configs.sampling import AutoGuidance
from tasks.data.portions import DECODED_AT_ONCE, SCORING_BATCH, at_once
from tasks.plan import networks
from tasks.plan.memory import FLOAT32, Memory
from tasks.plan.parts import Cost
from tasks.plan.tokenizers import autoencoder, convolutional
from tasks.plan.work import NETWORKS

PASS = {True: 47.0, False: 64.0}
"""Bytes at most that a pass of a transformer takes for each number of its tokens (tokens × width), by half precision.
Those of a foundation model or the Semantic VAE take less."""
PASS_CONVOLVED = {True: 10.1, False: 20.1}
"""The same of an autoencoder, for each number that enters or leaves the residual blocks of its widest level."""
INCEPTION_PASS = 299**2 * 4 * 40
"""Bytes an image that Inception takes, at most: its first layers are 32 and 64 channels wide at half the side."""
INCEPTION_VALUES = 23_900_000
SOURCE = "counted by torch, not measured: tasks/plan/passes.py"


@dataclass(frozen=True)
class Making:
    """Frozen networks that make latents of images, as stage `encode` does, or a training beside its steps."""

    weights: Cost
    """Of those that stages made."""
    values: int
    """Of all, the foundation model too."""
    flops: float
    """Of one view of an image."""
    image: float
    """Bytes at most that an image takes, on its way and as latents."""
    source: str


def making_latents(recipe: Recipe) -> Making:
    half = recipe.encode.precision in ("bf16", "fp16")
    encoder, decoder = autoencoder(recipe.train_vavae.model, recipe.image.size)
    weights, features, flops, source = encoder + decoder, 0, float(encoder.flops), NETWORKS
    passes = [_encoded(recipe.train_vavae.model, recipe.image.size, half)]
    stored, semantic = float(recipe.latent_channels), recipe.train_semvae is not None
    if recipe.foundation is not None and (semantic or recipe.encode.align_features):
        given, how = networks.foundation_flops(recipe.foundation)
        flops, source, features = flops + given, f"{NETWORKS}; {how}", networks.foundation_values(recipe.foundation)
        passes.append(looking(recipe.foundation, half))
        stored += recipe.foundation.feature_dim
    if recipe.train_semvae is not None and recipe.foundation is not None:
        model, cells = recipe.train_semvae.model, recipe.latent_size**2
        parts = networks.semantic_vae(model, recipe.foundation.feature_dim, cells)
        weights, flops = weights + parts[0] + parts[1], flops + parts[0].flops
        passes.append(PASS[half] * cells * model.width)
    views = 1 + (recipe.image.flips and not recipe.online_latents)
    pixels = 3 * recipe.image.size**2 * FLOAT32 * views
    image = pixels + max(passes) + stored * recipe.latent_size**2 * FLOAT32
    return Making(weights, weights.values + features, flops, image, source)


def encoding(recipe: Recipe) -> Memory | None:
    """Of an actor of `encode`; None where latents are given."""
    if recipe.ready_latents:
        return None
    making = making_latents(recipe)
    return _memory(making.values, making.image, recipe.compute.actors.batch, "compute.actors.batch")


def sampling(recipe: Recipe) -> Memory:
    """Of an actor of `sample`: one batch is decoded beside the next one's passes."""
    section, half = recipe.sample, recipe.sample.precision in ("bf16", "fp16")
    backbone, head = networks.sampled(recipe)
    encoder, decoder = autoencoder(recipe.train_vavae.model, recipe.image.size)
    values = backbone.values + head.values + encoder.values + decoder.values
    passes = [_denoised(recipe, recipe.train_dit.model, half)]
    for stage in recipe.sampled_resolutions:
        guidance = section.at(stage).guidance
        if isinstance(guidance, AutoGuidance):
            values += sum(part.values for part in networks.diffusion(recipe, guidance.model))
            passes.append(_denoised(recipe, guidance.model, half))
    decoded = convolved(recipe.train_vavae.model, recipe.image.size, False)  # in float32 or TF32, whatever the passes
    latents = 8 * recipe.latent_channels * recipe.latent_size**2 * FLOAT32  # the solver's, its guide's and noise
    pixels = 3 * recipe.image.size**2
    beside = min(section.batch, at_once(DECODED_AT_ONCE, recipe.image.size)) * decoded
    found = _memory(values, max(passes) + latents + pixels, section.batch, "sample.batch")
    return replace(found, fixed=found.fixed + beside)


def examining(recipe: Recipe) -> Memory:
    """Of an actor of `evaluate` or `evaluate_tokenizer`: networks of scores, and the tokenizer that reconstructs."""
    section, size = recipe.evaluate, recipe.image.size
    half = section.precision in ("bf16", "fp16")
    encoder, decoder = autoencoder(recipe.train_vavae.model, size)
    values = encoder.values + decoder.values + networks.foundation_values(section.features)
    passes = [
        looking(section.features, half),
        convolved(recipe.train_vavae.model, size, False) * at_once(SCORING_BATCH, size) / SCORING_BATCH,
    ]
    if section.inception is not None:
        values += INCEPTION_VALUES
        passes.append(float(INCEPTION_PASS))
    pixels = 2 * 3 * size**2 * FLOAT32
    return _memory(values, pixels + max(passes), SCORING_BATCH, "")


def convolved(model: Tokenizer, size: int, half: bool) -> float:
    """Bytes that a pass of a convolutional autoencoder's encoder or decoder takes for one image of size × size pixels;
    0 of another, whose levels are not known."""
    found = None if model.identity else convolutional(model)
    if found is None:
        return 0.0
    levels = zip(found.decoder_widths, (*found.decoder_widths[1:], found.decoder_widths[-1]), strict=True)
    # In a decoder a level begins with the channels of the one below.
    widest = max((3 * own + 2 * below) / 5 * (size >> level) ** 2 for level, (own, below) in enumerate(levels))
    return PASS_CONVOLVED[half] * widest


def _encoded(model: Tokenizer, size: int, half: bool) -> float:
    """Bytes that a pass of a tokenizer's encoder takes; a representation's is a vision transformer."""
    if isinstance(model, DiffusersModel) and model.class_name == "AutoencoderRAE":
        return PASS[half] * (size // model.downscale) ** 2 * model.channels
    return convolved(model, size, half)


def looking(section: Foundation, half: bool) -> float:
    """Bytes that a pass of a plain vision transformer takes; of any other network that of one as small as they are."""
    tokens, width = networks.vit_tokens(section) or (section.input_size**2 // 256, 384)
    return PASS[half] * tokens * width


def _denoised(recipe: Recipe, model: DiffusionModel, half: bool) -> float:
    """Bytes of a pass of a diffusion network at its finest resolution."""
    if isinstance(model, UnetModel):
        cells = (max(recipe.sides) * model.channels * max(model.multipliers)) * max(recipe.sides)
        return PASS_CONVOLVED[half] * cells
    width, _, _ = networks.dimensions(model)
    return PASS[half] * (max(recipe.sides) // model.patch_size) ** 2 * width


def _memory(values: float, image: float, batch: int, field: str) -> Memory:
    """Weights lie there in float32, in a half precision too where they are only copied for products."""
    return Memory(values * FLOAT32, image, batch, batch, False, SOURCE, field)
