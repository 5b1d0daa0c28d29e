"""Parameters and FLOPs of every network a recipe names, from its dimensions alone: no torch, nothing is built.

A plan must print at once, so these are the formulas of `models/flops.py` written over recipe sections; the tests hold
both equal, and hold parameters and tensors equal to those of built networks. FLOPs are of one image's forward pass,
two per multiply-add of matrix products and convolutions (papers.md 1.4).
"""

from __future__ import annotations

import re
from functools import cache

from configs.data import Foundation
from configs.diffusion import DiffusionModel, DitModel, UnetModel, WideHead
from configs.recipe import Recipe
from configs.scores import Classifier
from configs.tokenizers import Discriminator, SemvaeModel
from infra.transformers_files import of_transformers
from models.sizes import AUGMENTATION_LABELS, SIZES, kept_count
from tasks.data.portions import CLASSIFIER_GRID
from tasks.plan.parts import (
    Cost,
    attention,
    batch_norm,
    convolution,
    layer_norm,
    linear,
    self_attention,
    table,
    told_residual,
    total,
)
from tasks.plan.tokenizers import autoencoder as autoencoder

_VITS = {"small": (384, 12), "base": (768, 12), "large": (1024, 24)}
"""Width and depth of timm's vision transformers with a plain feed-forward of four times the width."""
_VIT = re.compile(r"(?:timm/)?vit_(small|base|large)_patch(\d+)(_reg4)?_")
_TIME_FREQUENCIES = 256
_VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Width and number of the convolutions between VGG16's poolings."""


def diffusion(recipe: Recipe, section: DiffusionModel, side: int | None = None) -> tuple[Cost, Cost]:
    """The diffusion network of a recipe, or a weak guide, and its alignment head. Arguments as :func:`dit`'s."""
    return unet(recipe, section, side) if isinstance(section, UnetModel) else dit(recipe, section, side)


def unet(recipe: Recipe, section: UnetModel, side: int | None = None) -> tuple[Cost, Cost]:
    """The UNet of a cascade in pixels (`models/cascade_unet.py`); it has no alignment head. `side` as for :func:`dit`.

    A lower side enters and leaves at the level of its own size: levels outside it hold weights and do nothing.
    """
    widths = [section.channels * multiplier for multiplier in section.multipliers]
    finest, told, last = recipe.sides[-1], 4 * widths[0], len(widths) - 1
    outermost = 0 if side is None else list(reversed(recipe.sides)).index(side)
    sides = [finest >> level for level in range(len(widths))]
    parts: list[tuple[Cost, bool]] = []  # and whether an image of this side passes through

    def level(inward: list[int], number: int) -> None:
        """Residual blocks with so many channels in, all with the level's own out."""
        width, cells = widths[number], sides[number] ** 2
        attends = sides[number] in section.attention
        for channels in inward:
            block = told_residual(channels, width, told, cells)
            block += self_attention(width, cells) if attends else Cost()
            parts.append((block, number >= outermost))

    skips = [widths[0]]
    for number, width in enumerate(widths):
        level([skips[-1]] + [width] * (section.blocks - 1), number)
        skips += [width] * section.blocks
        if number != last:
            parts.append((convolution(width, width, 3, sides[number + 1] ** 2), number >= outermost))
            skips.append(width)
    cells = sides[last] ** 2
    middle = told_residual(widths[last], widths[last], told, cells).times(2)
    parts.append((middle + self_attention(widths[last], cells), True))
    before = widths[last]
    for number in reversed(range(len(widths))):
        width = widths[number]
        entering = [before] + [width] * section.blocks
        level([channels + skips.pop() for channels in entering], number)
        if number:
            parts.append((convolution(width, width, 3, sides[number - 1] ** 2), number > outermost))
        before = width
    for number in range(len(recipe.sides)):
        inward = widths[max(0, number - 1)]  # what the level's first block expects; pixels and condition come in
        door_in = convolution(2 * 3, inward, 3, sides[number] ** 2)
        door_out = layer_norm(widths[number]) + convolution(widths[number], 3, 3, sides[number] ** 2)
        parts.append((door_in + door_out, number == outermost))
    embedding = linear(widths[0], told) + linear(told, told) + linear(1, told)
    tables = table((recipe.data.classes + 1) * told) + table(len(recipe.sides) * told)
    tables += table(AUGMENTATION_LABELS * told) if section.augment else Cost()  # a layer that sampling leaves out
    parts.append((embedding + tables, True))
    whole = total(part for part, _ in parts)
    return Cost(whole.values, whole.tensors, sum(part.flops for part, passed in parts if passed)), Cost()


def dit(recipe: Recipe, section: DitModel, side: int | None = None) -> tuple[Cost, Cost]:
    """LightningDiT on the recipe's latents, and its alignment head (nothing where it has none); papers.md 1.4, 2.4.

    side: of a cascade's lower resolution, whose FLOPs are meant; values and tensors are the same at all.
    """
    width, depth, heads = dimensions(section)
    finest, head_width = (recipe.latent_size // section.patch_size) ** 2, width // heads
    norm = table(width) if section.rmsnorm else Cost()
    tokens = finest if side is None else (side // section.patch_size) ** 2
    groups, channels = len(recipe.channel_groups), recipe.latent_channels
    clock = linear(_TIME_FREQUENCIES, width // groups) + linear(width // groups, width // groups)
    out = section.patch_size**2 * channels * (2 if section.learn_sigma else 1)
    if section.head is not None:
        return _wide_head(section, section.head, finest, channels, recipe.data.classes), Cost()
    network = total(
        [
            convolution(channels, width, section.patch_size, tokens),
            clock.times(groups),
            table((recipe.data.classes + 1) * width),
            table(finest * width),
            table(finest * head_width).times(2 if section.rope else 0),
            _block(section, tokens).times(depth),
            norm + linear(width, out, tokens) + linear(width, 2 * width),
        ]
    )
    if recipe.train_dit.cascade is not None:
        network += total(
            [
                table(len(recipe.sides) * width),
                convolution(channels, width, section.patch_size, tokens, bias=False),
                linear(_TIME_FREQUENCIES, width) + linear(width, width),
            ]
        )
    if section.align_depth is None or recipe.foundation is None:
        return network, Cost()
    wide = section.align_hidden
    return network, total(
        [
            linear(width, wide, tokens),
            linear(wide, wide, tokens),
            linear(wide, recipe.foundation.feature_dim, tokens),
        ]
    )


def flow_map(recipe: Recipe) -> Cost:
    """The diffusion transformer with what tells it how far to go (`models/flow_map.py`)."""
    assert isinstance(recipe.train_dit.model, DitModel)  # the recipe's rules
    width = dimensions(recipe.train_dit.model)[0]
    told = linear(_TIME_FREQUENCIES, width) + linear(width, width)
    return dit(recipe, recipe.train_dit.model)[0] + told.times(len(recipe.channel_groups))


def sampled(recipe: Recipe, side: int | None = None) -> tuple[Cost, Cost]:
    """The network that `sample` asks, and its alignment head. `side` as for :func:`dit`."""
    return (
        diffusion(recipe, recipe.train_dit.model, side) if recipe.tune_fewstep is None else (flow_map(recipe), Cost())
    )


def blocks_flops(recipe: Recipe, section: DiffusionModel, side: int | None = None) -> int:
    """Of all blocks, which a training with `recompute` runs once more. `side` as for :func:`dit`."""
    if isinstance(section, UnetModel):
        return 0
    tokens = ((side or recipe.latent_size) // section.patch_size) ** 2
    head = 0 if section.head is None else _head_blocks(section, section.head, tokens).flops
    return dimensions(section)[1] * _block(section, tokens).flops + head


def routed_flops(recipe: Recipe, section: DiffusionModel, side: int | None = None) -> int:
    """What token routing saves of the blocks for one image that is routed. `side` as for :func:`dit`."""
    routing = recipe.train_dit.routing
    if routing is None or isinstance(section, UnetModel):
        return 0
    tokens = ((side or recipe.latent_size) // section.patch_size) ** 2
    kept = kept_count(tokens, routing.drop)
    saved = _block(section, tokens).flops - _block(section, kept).flops
    return (routing.last - routing.first + 1) * saved


def _wide_head(section: DitModel, head: WideHead, tokens: int, channels: int, classes: int) -> Cost:
    """The network of `models/wide_head_dit.py`."""
    (width, depth, heads), wide, patch = dimensions(section), head.hidden_size, section.patch_size
    norm = table(wide) if section.rmsnorm else Cost()
    rotary = 2 if section.rope else 0
    return total(
        [
            convolution(channels, width, patch, tokens),
            convolution(channels, wide, patch, tokens),
            table(_TIME_FREQUENCIES) + linear(2 * _TIME_FREQUENCIES, width) + linear(width, width),
            table((classes + 1) * width),
            table(tokens * width),
            table(tokens * (width // heads)).times(rotary) + table(tokens * (wide // head.heads)).times(rotary),
            linear(width, wide, tokens) if wide != width else Cost(),
            _block(section, tokens).times(depth),
            _head_blocks(section, head, tokens),
            norm + linear(wide, patch**2 * channels, tokens) + linear(wide, 2 * wide, tokens),
        ]
    )


def _head_blocks(section: DitModel, head: WideHead, tokens: int) -> Cost:
    """Like the trunk's, but that every token has a modulation of its own."""
    own = {"size": None, "hidden_size": head.hidden_size, "depth": head.depth, "heads": head.heads, "head": None}
    block = _block(section.model_copy(update=own), tokens)
    modulation = 2 * (tokens - 1) * head.hidden_size * (6 if section.shift else 4) * head.hidden_size
    return (block + Cost(flops=modulation)).times(head.depth)


def _block(section: DitModel, tokens: int) -> Cost:
    """One transformer block on so many tokens (papers.md 1.4)."""
    width, _, heads = dimensions(section)
    norm = table(width) if section.rmsnorm else Cost()
    head_norm = table(width // heads) if section.rmsnorm else layer_norm(width // heads)
    hidden = int(2 / 3 * 4 * width)
    mlp = (
        [linear(width, 2 * hidden, tokens), linear(hidden, width, tokens)]
        if section.swiglu
        else [linear(width, 4 * width, tokens), linear(4 * width, width, tokens)]
    )
    return total(
        [
            norm.times(2),
            linear(width, 3 * width, tokens),
            head_norm.times(2 if section.qk_norm else 0),
            attention(tokens, width),
            linear(width, width, tokens),
            *mlp,
            linear(width, (6 if section.shift else 4) * width),
        ]
    )


def semantic_vae(section: SemvaeModel, feature_dim: int, tokens: int) -> tuple[Cost, Cost]:
    """Encoder and decoder for a grid of `tokens` features (papers.md 2.2)."""
    width = section.width

    def stack(inward: int, outward: int) -> Cost:
        attends = [linear(width, 3 * width, tokens), attention(tokens, width), linear(width, width, tokens)]
        mlp = [linear(width, 4 * width, tokens), linear(4 * width, width, tokens)]
        block = total([layer_norm(width).times(2), *attends, *mlp])
        ends = [linear(inward, width, tokens), layer_norm(width), linear(width, outward, tokens)]
        return total([*ends, block.times(section.depth)])

    return stack(feature_dim, 2 * section.channels), stack(section.channels, feature_dim)


def discriminator(section: Discriminator, side: int) -> tuple[Cost, Cost]:
    """Its first convolution, whose input never needs a gradient in the discriminator's own step, and all others."""
    widths = [section.width * min(2**level, 8) for level in range(section.layers + 1)]
    side //= 2
    first, rest = convolution(3, widths[0], 4, side**2), list[Cost]()
    for level in range(1, section.layers + 1):
        side = side // 2 if level < section.layers else side - 1
        rest += [convolution(widths[level - 1], widths[level], 4, side**2, bias=False), layer_norm(widths[level])]
    return first, total([*rest, convolution(widths[-1], 1, 4, (side - 1) ** 2)])


def lpips_flops(side: int) -> tuple[int, int]:
    """Of VGG16 looking at one image of side × side pixels, and of weighing two images' activations (papers.md 1.2)."""
    looking, weighing, inward = 0, 0, 3
    for width, convolutions in _VGG16:
        for _ in range(convolutions):
            looking, inward = looking + convolution(inward, width, 3, side**2).flops, width
        weighing += convolution(width, 1, 1, side**2).flops
        side //= 2
    return looking, weighing


VGG_VALUES = 14_714_688
"""Numbers of VGG16's convolutions, which LPIPS looks with."""


def vgg_activations(side: int) -> int:
    """Numbers that leave VGG16's convolutions for one image of side × side pixels."""
    values = 0
    for width, convolutions in _VGG16:
        values, side = values + convolutions * width * side**2, side // 2
    return values


def judge(section: Classifier, size: int, classes: int) -> Cost:
    """The classifier that `evaluate` trains on images of size × size pixels."""
    channels, side = 2 * section.width, size // 4
    parts = [convolution(3, channels, 6, (size // 2) ** 2, bias=False), batch_norm(channels)]
    while side > CLASSIFIER_GRID:
        wider = min(2 * channels, 8 * section.width)
        parts += [convolution(channels, wider, 3, side**2, bias=False), batch_norm(wider)]
        side, channels = side // 2, wider
    return total([*parts, linear(channels * CLASSIFIER_GRID**2, classes)])


def foundation_flops(section: Foundation) -> tuple[int, str]:
    """Of a frozen timm network, and where the figure comes from: a formula for plain vision transformers, else torch's
    own count on the meta device (which has to import torch).
    """
    found = _VIT.match(section.name)
    if found is None or section.layer is not None:
        return _counted(section), f"counted by torch: {section.name}"
    (width, depth), patch = _VITS[found[1]], int(found[2])
    cells = (section.input_size // patch) ** 2
    tokens = cells + 1 + (4 if found[3] else 0)
    block = total(
        [
            linear(width, 3 * width, tokens),
            attention(tokens, width),
            linear(width, width, tokens),
            linear(width, 4 * width, tokens),
            linear(4 * width, width, tokens),
        ]
    )
    return convolution(3, width, patch, cells).flops + depth * block.flops, f"formula: {section.name}"


def vit_tokens(section: Foundation) -> tuple[int, int] | None:
    """Tokens and width of a plain vision transformer; None of any other network."""
    found = _VIT.match(section.name)
    if found is None:
        return None
    return (section.input_size // int(found[2])) ** 2 + 1 + (4 if found[3] else 0), _VITS[found[1]][0]


def foundation_values(section: Foundation) -> int:
    """Weights of a frozen plain vision transformer, or of one of transformers, which torch counts; of any other 0, as
    those that recipes name are small."""
    found = _VIT.match(section.name)
    if found is None:
        return _counted_values(section) if of_transformers(section) else 0
    (width, depth), patch = _VITS[found[1]], int(found[2])
    return depth * (12 * width**2 + 13 * width) + 3 * patch**2 * width


def _counted_values(section: Foundation) -> int:
    import torch

    from tasks.foreign.foundations import build_foundation

    with torch.device("meta"):
        return sum(value.numel() for value in build_foundation(section).parameters())


@cache
def _counted(section: Foundation) -> int:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from tasks.foreign.foundations import build_foundation

    with torch.device("meta"):
        network = build_foundation(section)
        pixels = torch.empty(1, 3, section.input_size, section.input_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(pixels)
    return int(counter.get_total_flops())


def dimensions(section: DitModel) -> tuple[int, int, int]:
    """Width, depth and heads."""
    named = SIZES[section.size] if section.size else section.dimensions
    return named["hidden_size"], named["depth"], named["num_heads"]
