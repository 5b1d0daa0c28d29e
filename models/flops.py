"""Floating-point operations per image, by closed formula: two per multiply-add of matrix products and convolutions.

Norms, activations, rotary positions and the softmax are left out, as is usual (they are under one per cent of any
published size). Works on the meta device. Equal to what `torch.utils.flop_counter` counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from models.autoencoder import AutoencoderKL, Level, Middle
from models.cascade_dit import CascadeDiT
from models.lightningdit import LightningDiT
from models.routing import RoutedPass
from models.semantic_vae import SemanticVAE, TransformerBlock
from models.sizes import kept_count
from models.wide_head_dit import WideHeadDiT

Routed = tuple[int, int, float]
_EMBEDDERS = ("t_embedder", "level_embedder", "step_embedders")


def forward_flops(network: nn.Module, *, side: int | None = None, alignment: bool = False) -> int:
    """Of one image through the network.

    side: pixels along a side of the image (AutoencoderKL), cells along a side of the feature grid (SemanticVAE) or of
        the latent (LightningDiT, which knows its own; a lower one for a cascade).
    alignment: with the projection to foundation features (LightningDiT).
    A CascadeUNet and an autoencoder of diffusers are counted by torch.
    Raises TypeError on any other network, ValueError where `side` is missing.
    """
    if isinstance(network, RoutedPass):
        model: Any = network.model
        return blocks_flops(model, side, network.routed) + _around_blocks(model, False, side)
    if isinstance(network, LightningDiT):
        return blocks_flops(network, side) + _around_blocks(network, alignment, side)
    counted: Any = getattr(network, "flops_at", None)  # of networks whose library is not imported to ask
    if counted is not None:
        return int(counted(side))
    if not isinstance(network, AutoencoderKL | SemanticVAE):
        raise TypeError(f"no formula for {type(network).__name__}; count it with torch.utils.flop_counter")
    if side is None:
        raise ValueError(f"side is missing: the FLOPs of {type(network).__name__} depend on the size of its input")
    if isinstance(network, AutoencoderKL):
        return encoder_flops(network, side) + decoder_flops(network, side)
    return stack_flops(network.encoder, side * side) + stack_flops(network.decoder, side * side)


def training_flops_per_image(
    network: nn.Module,
    *,
    side: int | None = None,
    alignment: bool = False,
    recompute: bool = False,
    routed: Routed | None = None,
) -> int:
    """Of one image's forward and backward pass: every product once forward, and once each for the gradients of its
    input and of its weight. Arguments as `forward_flops`.

    recompute: with the blocks' second forward pass (activation checkpointing, LightningDiT). It is work that the
        hardware does and not the model: utilisation of the model (MFU) leaves it out, of the hardware (HFU) not.
    routed: first and last block and the share of tokens that goes around them (LightningDiT).
    """
    if not isinstance(network, LightningDiT):
        return 3 * forward_flops(network, side=side, alignment=alignment)
    blocks = blocks_flops(network, side, routed)
    return 3 * (blocks + _around_blocks(network, alignment, side)) + (blocks if recompute else 0)


def blocks_flops(network: LightningDiT, side: int | None = None, routed: Routed | None = None) -> int:
    """Of one image, or of one at a lower `side`, through all blocks. For N tokens of width D, a block with SwiGLU of
    width h costs 8 N D² + 4 N² D (attention), 6 N D h (feed-forward) and 12 D² (modulation, once per image).
    """
    if isinstance(network, WideHeadDiT):
        return _trunk_and_head(network, side)
    first, last, drop = routed or (1, 0, 0.0)
    whole = _tokens(network, side)
    blocks: list[Any] = list(network.blocks)
    total = 0
    for number, block in enumerate(blocks, start=1):
        tokens = kept_count(whole, drop) if first <= number <= last else whole
        total += _linears([block.attn, block.mlp], tokens) + _linears([block.adaLN_modulation], 1)
        total += _attention(tokens, network.hidden_size)
    return total


def encoder_flops(network: AutoencoderKL, side: int) -> int:
    """Of one image of side × side pixels, to the moments of its posterior."""
    encoder, cells = network.encoder, (side // network.patch_size) ** 2
    total = _convolution(encoder.conv_in, cells)
    for level in encoder.down:
        total += _level(level, cells)
        if level is not encoder.down[-1]:
            cells //= 4
            total += _convolutions(level.get_submodule("downsample"), cells)
    total += _middle(encoder.mid, cells) + _convolution(encoder.conv_out, cells)
    return total + _convolution(network.quant_conv, cells) + _path(network.encoder_path, cells)


def decoder_flops(network: AutoencoderKL, side: int) -> int:
    """Of one latent, to an image of side × side pixels."""
    decoder = network.decoder
    cells = (side // network.downscale) ** 2
    total = _path(network.decoder_path, cells)
    total += _convolution(network.post_quant_conv, cells) + _convolution(decoder.conv_in, cells)
    total += _middle(decoder.mid, cells)
    for level in reversed(decoder.up):
        total += _level(level, cells)
        if level is not decoder.up[0]:
            cells *= 4
            total += _convolutions(level.get_submodule("upsample"), cells)
    return total + _convolution(decoder.conv_out, cells)


def stack_flops(stack: nn.Sequential, tokens: int) -> int:
    """Of one grid of features through the encoder or the decoder of a SemanticVAE."""
    total = 0
    for part in stack:
        if isinstance(part, TransformerBlock):
            width = part.attn.embed_dim
            # Queries, keys and values of `nn.MultiheadAttention` are one bare weight, its output is a linear layer.
            total += 6 * tokens * width**2 + _linears([part.attn, part.mlp], tokens) + _attention(tokens, width)
        elif isinstance(part, nn.Linear):
            total += _linears([part], tokens)
    return total


def _tokens(network: LightningDiT, side: int | None) -> int:
    return ((side or network.input_size) // network.patch_size) ** 2


def _trunk_and_head(network: WideHeadDiT, side: int | None) -> int:
    """Of a wide head's blocks every token has a modulation of its own."""
    tokens, total = _tokens(network, side), 0
    blocks: list[Any] = list(network.blocks)
    for number, block in enumerate(blocks):
        head = number >= network.trunk_depth
        total += _linears([block.attn, block.mlp], tokens) + _linears([block.adaLN_modulation], tokens if head else 1)
        total += _attention(tokens, network.head_hidden if head else network.hidden_size)
    return total


def _around_blocks(network: LightningDiT, alignment: bool, side: int | None) -> int:
    tokens = _tokens(network, side)
    embedders = [part for name, part in network.named_children() if name.startswith(_EMBEDDERS)]
    final: Any = network.final_layer
    if isinstance(network, WideHeadDiT):
        inward = nn.ModuleList([network.x_embedder, network.s_embedder])
        return (
            _convolutions(inward, tokens)
            + _linears([network.t_embedder], 1)
            + _linears([network.s_projector, final.adaLN_modulation, final.linear], tokens)
        )
    total = _convolutions(network.x_embedder, tokens) + _linears(embedders, 1)
    if isinstance(network, CascadeDiT):
        total += _convolutions(network.condition_embedder, tokens)
    total += _linears([final.adaLN_modulation], 1) + _linears([final.linear], tokens)
    if alignment and network.repa_projector is not None:
        total += _linears([network.repa_projector], tokens)
    return total


def _level(level: Any, cells: int) -> int:
    assert isinstance(level, Level)
    return _convolutions(level.block, cells) + _attentions(level.attn, cells)


def _middle(middle: Middle, cells: int) -> int:
    return _convolutions(nn.ModuleList([middle.block_1, middle.block_2]), cells) + _attentions([middle.attn_1], cells)


def _attentions(blocks: Iterable[Any], cells: int) -> int:
    return sum(_convolutions(block, cells) + _attention(cells, block.q.out_channels) for block in blocks)


def _attention(tokens: int, width: int) -> int:
    """Queries with keys, and their weights with values, over all heads together."""
    return 4 * tokens**2 * width


def _linears(parts: Iterable[nn.Module], rows: int) -> int:
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)]
    return sum(2 * rows * layer.in_features * layer.out_features for layer in layers)


def _convolutions(part: nn.Module, cells: int) -> int:
    return sum(_convolution(layer, cells) for layer in part.modules() if isinstance(layer, nn.Conv2d))


def _path(layer: nn.Conv2d | nn.ConvTranspose2d | None, cells: int) -> int:
    """cells: of latents."""
    return 0 if layer is None else _convolution(layer, cells)


def _convolution(layer: nn.Conv2d | nn.ConvTranspose2d, cells: int) -> int:
    """cells: of its output, or of its input where it is transposed."""
    return 2 * cells * layer.weight.numel()
