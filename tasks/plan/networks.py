"""Parameters and FLOPs of every network a recipe names, from its dimensions alone: no torch, nothing is built.

A plan must print at once, so these are the formulas of `models/flops.py` written over recipe sections; the tests hold
both equal, and hold parameters and tensors equal to those of built networks. FLOPs are of one image's forward pass,
two per multiply-add of matrix products and convolutions (papers.md 1.4).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from configs.data import Foundation
from configs.diffusion import DiffusionModel, DitModel, UnetModel
from configs.recipe import Recipe
from configs.scores import Classifier
from configs.tokenizers import AutoencoderModel, Discriminator, SemvaeModel
from models.sizes import AUGMENTATION_LABELS, SIZES
from tasks.data.portions import CLASSIFIER_GRID

_VITS = {"small": (384, 12), "base": (768, 12), "large": (1024, 24)}
"""Width and depth of timm's vision transformers with a plain feed-forward of four times the width."""
_VIT = re.compile(r"(?:timm/)?vit_(small|base|large)_patch(\d+)(_reg4)?_")
_TIME_FREQUENCIES = 256
_VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Width and number of the convolutions between VGG16's poolings."""


@dataclass(frozen=True)
class Cost:
    """What one part of a network costs."""

    values: int = 0
    """Numbers in its state dict: parameters and buffers."""
    tensors: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.values + other.values, self.tensors + other.tensors, self.flops + other.flops)

    def times(self, count: int) -> Cost:
        return Cost(count * self.values, count * self.tensors, count * self.flops)


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
            block = _told_residual(channels, width, told, cells)
            block += _self_attention(width, cells) if attends else Cost()
            parts.append((block, number >= outermost))

    skips = [widths[0]]
    for number, width in enumerate(widths):
        level([skips[-1]] + [width] * (section.blocks - 1), number)
        skips += [width] * section.blocks
        if number != last:
            parts.append((_convolution(width, width, 3, sides[number + 1] ** 2), number >= outermost))
            skips.append(width)
    cells = sides[last] ** 2
    middle = _told_residual(widths[last], widths[last], told, cells).times(2)
    parts.append((middle + _self_attention(widths[last], cells), True))
    before = widths[last]
    for number in reversed(range(len(widths))):
        width = widths[number]
        entering = [before] + [width] * section.blocks
        level([channels + skips.pop() for channels in entering], number)
        if number:
            parts.append((_convolution(width, width, 3, sides[number - 1] ** 2), number > outermost))
        before = width
    for number in range(len(recipe.sides)):
        inward = widths[max(0, number - 1)]  # what the level's first block expects; pixels and condition come in
        door_in = _convolution(2 * 3, inward, 3, sides[number] ** 2)
        door_out = _norm(widths[number]) + _convolution(widths[number], 3, 3, sides[number] ** 2)
        parts.append((door_in + door_out, number == outermost))
    embedding = _linear(widths[0], told) + _linear(told, told) + _linear(1, told)
    tables = _table((recipe.data.classes + 1) * told) + _table(len(recipe.sides) * told)
    tables += _table(AUGMENTATION_LABELS * told) if section.augment else Cost()  # a layer that sampling leaves out
    parts.append((embedding + tables, True))
    whole = _sum(part for part, _ in parts)
    return Cost(whole.values, whole.tensors, sum(part.flops for part, passed in parts if passed)), Cost()


def dit(recipe: Recipe, section: DitModel, side: int | None = None) -> tuple[Cost, Cost]:
    """LightningDiT on the recipe's latents, and its alignment head (nothing where it has none); papers.md 1.4, 2.4.

    side: of a cascade's lower resolution, whose FLOPs are meant; values and tensors are the same at all.
    """
    width, depth, heads = dimensions(section)
    finest, head_width = (recipe.latent_size // section.patch_size) ** 2, width // heads
    tokens = finest if side is None else (side // section.patch_size) ** 2
    groups, channels = len(recipe.channel_groups), recipe.latent_channels
    norm = _table(width) if section.rmsnorm else Cost()
    head_norm = _table(head_width) if section.rmsnorm else _norm(head_width)
    hidden = int(2 / 3 * 4 * width)
    mlp = (
        [_linear(width, 2 * hidden, tokens), _linear(hidden, width, tokens)]
        if section.swiglu
        else [_linear(width, 4 * width, tokens), _linear(4 * width, width, tokens)]
    )
    block = _sum(
        [
            norm.times(2),
            _linear(width, 3 * width, tokens),
            head_norm.times(2 if section.qk_norm else 0),
            _attention(tokens, width),
            _linear(width, width, tokens),
            *mlp,
            _linear(width, (6 if section.shift else 4) * width),
        ]
    )
    clock = _linear(_TIME_FREQUENCIES, width // groups) + _linear(width // groups, width // groups)
    out = section.patch_size**2 * channels * (2 if section.learn_sigma else 1)
    network = _sum(
        [
            _convolution(channels, width, section.patch_size, tokens),
            clock.times(groups),
            _table((recipe.data.classes + 1) * width),
            _table(finest * width),
            _table(finest * head_width).times(2 if section.rope else 0),
            block.times(depth),
            norm + _linear(width, out, tokens) + _linear(width, 2 * width),
        ]
    )
    if recipe.train_dit.cascade is not None:
        network += _sum(
            [
                _table(len(recipe.sides) * width),
                _convolution(channels, width, section.patch_size, tokens, bias=False),
                _linear(_TIME_FREQUENCIES, width) + _linear(width, width),
            ]
        )
    if section.align_depth is None or recipe.foundation is None:
        return network, Cost()
    wide = section.align_hidden
    return network, _sum(
        [
            _linear(width, wide, tokens),
            _linear(wide, wide, tokens),
            _linear(wide, recipe.foundation.feature_dim, tokens),
        ]
    )


def blocks_flops(recipe: Recipe, section: DiffusionModel, side: int | None = None) -> int:
    """Of all blocks, which a training with `recompute` runs once more. `side` as for :func:`dit`."""
    if isinstance(section, UnetModel):
        return 0
    width, depth, _ = dimensions(section)
    one = dit(recipe, section.model_copy(update={"size": None, "hidden_size": width, "depth": 1, "heads": 1}), side)[0]
    none = dit(recipe, section.model_copy(update={"size": None, "hidden_size": width, "depth": 0, "heads": 1}), side)[0]
    return depth * (one.flops - none.flops)


def autoencoder(section: AutoencoderModel, side: int) -> tuple[Cost, Cost]:
    """Encoder to the posterior's moments, and decoder, for images of side × side pixels (papers.md 1.1)."""
    if section.identity:
        return Cost(), Cost()
    widths = [section.base_channels * multiplier for multiplier in section.channel_multipliers]
    z, last, blocks = section.z_channels, len(widths) - 1, section.blocks_per_level
    encoder, cells = [_convolution(3, section.base_channels, 3, side**2)], side**2
    for level, width in enumerate(widths):
        before = widths[level - 1] if level else section.base_channels
        encoder += _level(before, width, blocks, level in section.attention_levels, cells)
        if level != last:
            cells //= 4
            encoder.append(_convolution(width, width, 3, cells))
    encoder += [*_middle(widths[-1], cells), _norm(widths[-1]), _convolution(widths[-1], 2 * z, 3, cells)]
    encoder.append(_convolution(2 * z, 2 * z, 1, cells))
    decoder = [_convolution(z, z, 1, cells), _convolution(z, widths[-1], 3, cells), *_middle(widths[-1], cells)]
    for level in reversed(range(len(widths))):
        attends = section.decoder_attention and level in section.attention_levels
        decoder += _level(widths[min(level + 1, last)], widths[level], blocks + 1, attends, cells)
        if level:
            cells *= 4
            decoder.append(_convolution(widths[level], widths[level], 3, cells))
    decoder += [_norm(widths[0]), _convolution(widths[0], 3, 3, cells)]
    return _sum(encoder), _sum(decoder)


def semantic_vae(section: SemvaeModel, feature_dim: int, tokens: int) -> tuple[Cost, Cost]:
    """Encoder and decoder for a grid of `tokens` features (papers.md 2.2)."""
    width = section.width

    def stack(inward: int, outward: int) -> Cost:
        attention = [_linear(width, 3 * width, tokens), _attention(tokens, width), _linear(width, width, tokens)]
        mlp = [_linear(width, 4 * width, tokens), _linear(4 * width, width, tokens)]
        block = _sum([_norm(width).times(2), *attention, *mlp])
        ends = [_linear(inward, width, tokens), _norm(width), _linear(width, outward, tokens)]
        return _sum([*ends, block.times(section.depth)])

    return stack(feature_dim, 2 * section.channels), stack(section.channels, feature_dim)


def discriminator(section: Discriminator, side: int) -> tuple[Cost, Cost]:
    """Its first convolution, whose input never needs a gradient in the discriminator's own step, and all others."""
    widths = [section.width * min(2**level, 8) for level in range(section.layers + 1)]
    side //= 2
    first, rest = _convolution(3, widths[0], 4, side**2), list[Cost]()
    for level in range(1, section.layers + 1):
        side = side // 2 if level < section.layers else side - 1
        rest += [_convolution(widths[level - 1], widths[level], 4, side**2, bias=False), _norm(widths[level])]
    return first, _sum([*rest, _convolution(widths[-1], 1, 4, (side - 1) ** 2)])


def lpips_flops(side: int) -> tuple[int, int]:
    """Of VGG16 looking at one image of side × side pixels, and of weighing two images' activations (papers.md 1.2)."""
    looking, weighing, inward = 0, 0, 3
    for width, convolutions in _VGG16:
        for _ in range(convolutions):
            looking, inward = looking + _convolution(inward, width, 3, side**2).flops, width
        weighing += _convolution(width, 1, 1, side**2).flops
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
    parts = [_convolution(3, channels, 6, (size // 2) ** 2, bias=False), _batch_norm(channels)]
    while side > CLASSIFIER_GRID:
        wider = min(2 * channels, 8 * section.width)
        parts += [_convolution(channels, wider, 3, side**2, bias=False), _batch_norm(wider)]
        side, channels = side // 2, wider
    return _sum([*parts, _linear(channels * CLASSIFIER_GRID**2, classes)])


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
    block = _sum(
        [
            _linear(width, 3 * width, tokens),
            _attention(tokens, width),
            _linear(width, width, tokens),
            _linear(width, 4 * width, tokens),
            _linear(4 * width, width, tokens),
        ]
    )
    return _convolution(3, width, patch, cells).flops + depth * block.flops, f"formula: {section.name}"


def foundation_values(section: Foundation) -> int:
    """Weights of a frozen plain vision transformer; of any other network 0, as those that recipes name are small."""
    found = _VIT.match(section.name)
    if found is None:
        return 0
    (width, depth), patch = _VITS[found[1]], int(found[2])
    return depth * (12 * width**2 + 13 * width) + 3 * patch**2 * width


def _counted(section: Foundation) -> int:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from models.foundation import FoundationModel

    with torch.device("meta"):
        network = FoundationModel(section.name, input_size=section.input_size, layer=section.layer)
        pixels = torch.empty(1, 3, section.input_size, section.input_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(pixels)
    return int(counter.get_total_flops())


# --------------------------------------------------------------------------------------------------------- parts


def dimensions(section: DitModel) -> tuple[int, int, int]:
    """Width, depth and heads."""
    named = SIZES[section.size] if section.size else section.dimensions
    return named["hidden_size"], named["depth"], named["num_heads"]


def _level(inward: int, width: int, blocks: int, attends: bool, cells: int) -> list[Cost]:
    residuals = [_residual(inward if number == 0 else width, width, cells) for number in range(blocks)]
    return [*residuals, *([_self_attention(width, cells)] * (blocks if attends else 0))]


def _middle(width: int, cells: int) -> list[Cost]:
    return [_residual(width, width, cells).times(2), _self_attention(width, cells)]


def _residual(inward: int, outward: int, cells: int) -> Cost:
    body = [_norm(inward), _convolution(inward, outward, 3, cells)]
    body += [_norm(outward), _convolution(outward, outward, 3, cells)]
    return _sum(body) + (_convolution(inward, outward, 1, cells) if inward != outward else Cost())


def _told_residual(inward: int, outward: int, told: int, cells: int) -> Cost:
    """A residual block of a UNet, which an embedding of width `told` is added to."""
    return _residual(inward, outward, cells) + _linear(told, outward)


def _self_attention(width: int, cells: int) -> Cost:
    return _norm(width) + _convolution(width, width, 1, cells).times(4) + _attention(cells, width)


def _linear(inward: int, outward: int, rows: int = 1) -> Cost:
    return Cost(inward * outward + outward, 2, 2 * rows * inward * outward)


def _convolution(inward: int, outward: int, kernel: int, cells: int, bias: bool = True) -> Cost:
    """cells: of its output."""
    weights = inward * outward * kernel**2
    return Cost(weights + bias * outward, 1 + bias, 2 * cells * weights)


def _attention(tokens: int, width: int) -> Cost:
    return Cost(flops=4 * tokens**2 * width)


def _norm(width: int) -> Cost:
    return Cost(2 * width, 2)


def _batch_norm(width: int) -> Cost:
    """Weight, bias, running mean and variance, and a counter."""
    return Cost(4 * width + 1, 5)


def _table(values: int) -> Cost:
    return Cost(values, 1)


def _sum(parts: Iterable[Cost]) -> Cost:
    return sum(parts, Cost())
