"""Changes of recipes for tests that draw some of them at random: what fits, what does not, and what is borderline."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy

from configs import Recipe, UserError
from configs.load import RECIPES, assign, resolve, validate

VAE, DIT, OBJECTIVE = "train_vavae.model", "train_dit.model", "train_dit.objective"


def _each(field: str, *values: object) -> list[str]:
    return [f"{field}={value}" for value in values]


_ANY = [
    _each("data.classes", 1, 2, 3, 1000),
    _each("sample.labels", "random", "unconditional", "[0]", "{0: 40}"),
    _each("sample.images", 1, 2, 7, 40),
    _each("sample.solver", "heun", "sde", "dpmpp_2m", "unipc"),
    _each("sample.steps", 1, 2, 3),
    _each("sample.times", "[0.0, 0.5, 1.0]", "[0.0, 1.0]"),
    _each("sample.shift", 0.3, 3.0),
    ["sample.off_by_one=true"],
    _each(
        "sample.guidance",
        "{method: none}",
        "{method: classifier_free, scale: 2.0, channels: 3}",
        "{method: classifier_free, scale: 2.0, channels: 1, interval_start: 0.2}",
        "{method: classifier_free, scale: 2.0, groups: semantic}",
    ),
    _each("compute.train.workers", 2, 3),
    _each("compute.train.micro_batch", 1, 3, 64),
    _each("train_dit.batch", 1, 6, 512),
    _each("shard.limit", 1, 40, 64),
    _each("shard.test_share", 0.0, 1.0),
    _each("evaluate.images", 1, 2, 5),
    _each("evaluate.neighbours", 1, 39),
    ["evaluate.classifier=null"],
    _each("train_dit.ema_decay", 0.0, 1.0, "null"),
]
_LATENTS = [
    _each("image.size", 1, 8, 16, 24, 28, 40, 48, 64, 96, 128),
    _each(f"{DIT}.patch_size", 2, 3, 4, 8),
    _each(f"{DIT}.align_depth", "null", 1, 3, 4, 9),
    _each(f"{DIT}.heads", 1, 2, 3, 5),
    _each(f"{DIT}.hidden_size", 24, 50, 60, 72),
    _each(f"{DIT}.depth", 1, 2, 5),
    _each(f"{DIT}.positions_of", 2, 4, 16),
    _each(DIT, "{kind: unet}", "{kind: unet, channels: 32, multipliers: [1, 2]}"),
    [f"{DIT}.{name}" for name in ("rope=false", "learn_sigma=true", "qk_norm=true", "swiglu=false", "shift=false")],
    _each(f"{OBJECTIVE}.align_weight", 0.0, 1.0),
    _each(f"{OBJECTIVE}.align", "online", "stored"),
    _each(f"{OBJECTIVE}.align_mode", "cos", "mse", "cos_mse"),
    _each(f"{OBJECTIVE}.label_dropout", 0.0, 1.0),
    _each(f"{OBJECTIVE}.semantic_weight", 0.0),
    _each(f"{OBJECTIVE}.contrastive_weight", 0.05),
    _each(f"{OBJECTIVE}.shift_base", 64, 4096),
    _each("train_dit.routing", "{first: 1, last: 2}", "{first: 2, last: 3}", "{first: 2, last: 9}"),
    _each("train_dit.clock", "{kind: synchronous}", *(f"{{kind: semantic_first, delta: {d}}}" for d in (0.0, 1.0))),
    _each(
        "train_dit.cascade",
        *(f"{{sides: {sides}}}" for sides in ([4], [2, 4], [1, 4], [1, 2, 4], [4, 8], [3, 4], [2, 4, 8], [6, 12])),
        "{sides: [2, 4], condition_dropout: 0.0}",
    ),
    _each("sample.stages", "[{side: 4}]", "[{side: 2}, {side: 4}]", "[{side: 2, steps: 1}, {side: 4, solver: heun}]"),
    _each("foundation.input_size", 1, 32, 63, 96, 128, 256),
    _each("foundation.layer", 0, 1, 2, 4, 5, -1, -5, -6, "null"),
    _each("foundation.feature_dim", 24, 40, 112, 320),
    _each("foundation.name", "vit_tiny_patch16_224", "resnet18"),
    ["foundation=null"],
    _each(f"{VAE}.channel_multipliers", [1], [1, 2], [1, 1, 1], [1, 2, 2, 2], [1, 1, 1, 1, 1, 1]),
    _each(f"{VAE}.norm_groups", 1, 3, 5),
    _each("train_vavae.objective.latent_noise", 0.0, 0.6),
    _each(f"{VAE}.attention_levels", [], [0], [2], [7], [-1]),
    _each(f"{VAE}.z_channels", 1, 3, 16),
    _each(f"{VAE}.base_channels", 4, 12),
    [f"{VAE}.identity=true"],
    ["train_semvae=null"],
    _each("train_semvae.model.heads", 1, 5),
    _each("train_semvae.model.channels", 1, 32),
    _each("train_vavae.objective.discriminator.layers", 1, 2, 4, 5),
    _each("train_vavae.objective.gan_weight", 0.5),
    _each("train_vavae.objective.align_weight", 0.0, 0.5),
    _each("encode.align_features", "false", "true"),
    _each("encode.posterior", "mean", "moments"),
    _each("shard.reencode", "{size: 8}", "{size: 64}"),
]
_PIXELS = [
    _each("image.size", 1, 2, 8, 12, 24, 32, 64),
    _each("train_dit.cascade.sides", [16], [8, 16], [4, 16], [4, 8, 16], [8, 16, 32], [12, 24], [1, 2, 4, 8, 16]),
    _each(f"{DIT}.multipliers", [1], [1, 2, 2], [1, 2, 2, 2], [1, 2, 2, 2, 2], [3, 1]),
    _each(f"{DIT}.channels", 1, 4, 5, 6, 12, 33),
    _each(f"{DIT}.attention", [], [16], [4], [3]),
    _each(f"{DIT}.augment", 0.1),
    _each(f"{DIT}.sigma_min", 80.0, 100.0),
    ["train_dit.cascade=null"],
    _each("sample.stages", "[{side: 16}]", "[{side: 16, steps: 1}]"),
    [f"{DIT}={{size: S}}"],
    [f"{VAE}.identity=false"],
    [f"{VAE}.z_channels=4"],
    ["train_dit.clock={kind: semantic_first, delta: 0.3}"],
]
CHOICES: dict[str, list[list[str]]] = {"demo_tiny": [*_ANY, *_LATENTS], "lowdiff_pixels_tiny": [*_ANY, *_PIXELS]}


def drawn_recipes(base: str, tries: int, seed: int = 0) -> Iterator[tuple[list[str], Recipe]]:
    """What a recipe becomes by a few changes at random, where it takes them; always the same for a seed.

    Most long lists of changes are refused for some reason or other, so that few at a time are drawn.
    """
    drawn, values = random.Random(seed), resolve("recipe", RECIPES, base)
    for _ in range(tries):
        few = drawn.sample(CHOICES[base], drawn.choice((1, 2, 2, 3)))
        overrides = ["sample.stages=[]", *(drawn.choice(options) for options in few)]
        changed = deepcopy(values)
        for override in overrides:
            assign(changed, override)
        try:
            yield overrides, validate(changed)
        except UserError as refusal:
            assert "\n" not in str(refusal), overrides
