"""What autoencoders hold and compute, ours and those of diffusers, by encoder and decoder.

Convolutional ones follow from their dimensions; of any other class torch counts, on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from configs.autoencoders import AutoencoderModel, DiffusersModel, PythonModel, Tokenizer
from infra.diffusers_files import described
from models.diffusers_config import Described
from tasks.plan.parts import Cost, bottleneck, convolution, layer_norm, resolution, total


@dataclass(frozen=True)
class Convolutional:
    """A convolutional autoencoder (papers.md 1.1), whoever built it."""

    widths: tuple[int, ...]
    """Of each level, full resolution first."""
    decoder_widths: tuple[int, ...]
    blocks: int
    channels: int
    first: int
    """Width that the image is taken to."""
    attention: tuple[int, ...] = ()
    """Levels whose blocks attend."""
    decoder_attention: bool = True
    middle_attention: bool = True
    quant: bool = True
    post_quant: bool = True
    patch: int = 1
    """Side of the squares of pixels that are channels of a cell of level 0."""
    linear_path: bool = False
    rest: Cost = Cost()  # noqa: RUF009  # immutable
    """Of what neither direction computes."""


def autoencoder(section: Tokenizer, side: int) -> tuple[Cost, Cost]:
    """Encoder to the posterior's moments, and decoder, for images of side × side pixels.

    Raises:
        UserError: the configuration of one of diffusers' cannot be had.
    """
    if section.identity or isinstance(section, PythonModel):  # a plan runs no code of others
        return Cost(), Cost()
    found = convolutional(section)
    return _counted(section, side) if found is None else _costs(found, side)  # type: ignore[arg-type]


def convolutional(section: Tokenizer) -> Convolutional | None:
    """The dimensions of a convolutional autoencoder; None of another."""
    if isinstance(section, AutoencoderModel):
        widths = tuple(section.base_channels * multiplier for multiplier in section.channel_multipliers)
        return Convolutional(
            widths,
            widths,
            section.blocks_per_level,
            section.z_channels,
            section.base_channels,
            section.attention_levels,
            section.decoder_attention,
            patch=section.patch_size,
            linear_path=section.linear_path,
        )
    return None if isinstance(section, PythonModel) else _plain(described(section))


def _plain(found: Described) -> Convolutional | None:
    """Of diffusers' own, where all levels are plain; the defaults are diffusers'."""
    flux = found.class_name == "AutoencoderKLFlux2"
    if found.class_name != "AutoencoderKL" and not flux:
        return None
    values: dict[str, Any] = found.arguments
    widths, levels = tuple(values["block_out_channels"]), len(values["block_out_channels"])
    given = values.get("down_block_types", ["DownEncoderBlock2D"]), values.get("up_block_types", ["UpDecoderBlock2D"])
    if [list(each) for each in given] != [["DownEncoderBlock2D"] * levels, ["UpDecoderBlock2D"] * levels]:
        return None
    patch = values.get("patch_size", [2, 2])
    moments = patch[0] * patch[1] * found.channels if flux else 0
    return Convolutional(
        widths,
        tuple(values.get("decoder_block_out_channels") or widths) if flux else widths,
        values.get("layers_per_block", 2 if flux else 1),
        found.channels,
        widths[0],
        middle_attention=values.get("mid_block_add_attention", True),
        quant=values.get("use_quant_conv", True),
        post_quant=values.get("use_post_quant_conv", True),
        rest=Cost(2 * moments + 1, 3) if flux else Cost(),  # a batch norm that only their pipelines use
    )


def _costs(of: Convolutional, side: int) -> tuple[Cost, Cost]:
    widths, z, last = of.widths, of.channels, len(of.widths) - 1
    cells, pixels = (side // of.patch) ** 2, 3 * of.patch**2
    encoder = [convolution(pixels, of.first, 3, cells)]
    for level, width in enumerate(widths):
        before = widths[level - 1] if level else of.first
        encoder += resolution(before, width, of.blocks, level in of.attention, cells)
        if level != last:
            cells //= 4
            encoder.append(convolution(width, width, 3, cells))
    encoder += bottleneck(widths[-1], cells, of.middle_attention)
    encoder += [layer_norm(widths[-1]), convolution(widths[-1], 2 * z, 3, cells)]
    encoder += [convolution(2 * z, 2 * z, 1, cells)] * of.quant
    cell = of.patch * 2**last  # pixels of a latent's side
    encoder += [convolution(3, 2 * z, cell, cells)] * of.linear_path
    widths = of.decoder_widths
    path = [convolution(z, 3, cell, cells)] * of.linear_path  # transposed, which is reckoned by its input's cells
    decoder = path + [convolution(z, z, 1, cells)] * of.post_quant + [convolution(z, widths[-1], 3, cells)]
    decoder += bottleneck(widths[-1], cells, of.middle_attention)
    for level in reversed(range(len(widths))):
        attends = of.decoder_attention and level in of.attention
        decoder += resolution(widths[min(level + 1, last)], widths[level], of.blocks + 1, attends, cells)
        if level:
            cells *= 4
            decoder.append(convolution(widths[level], widths[level], 3, cells))
    decoder += [layer_norm(widths[0]), convolution(widths[0], pixels, 3, cells), of.rest]
    return total(encoder), total(decoder)


@lru_cache(maxsize=8)
def _counted(section: DiffusersModel, side: int) -> tuple[Cost, Cost]:
    import torch

    from tasks.networks import build_autoencoder

    with torch.device("meta"):
        network: Any = build_autoencoder(section)
    flops = network.flops(side)
    whole, encoder = (
        [value.numel() for value in part.state_dict().values()] for part in (network.kept, network.kept.encoder)
    )
    return (
        Cost(sum(encoder), len(encoder), flops[0]),
        Cost(sum(whole) - sum(encoder), len(whole) - len(encoder), flops[1]),
    )
