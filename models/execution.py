"""Compile, activation checkpointing and memory layout, applied to a plain model from outside."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch
from torch.utils.checkpoint import checkpoint

from models.autoencoder import AutoencoderKL, Decoder, Encoder, Identity
from models.foundation import FoundationModel
from models.graphs import Tell, Turn, at_once, compiled
from models.image_autoencoder import ImageAutoencoder
from models.semantic_vae import SemanticVAE, TransformerBlock


def prepare(
    model: nn.Module,
    *,
    compile: bool = False,
    checkpoint_activations: bool = False,
    channels_last: bool = False,
    tell: Tell = lambda _line: None,
    turn: Turn = at_once,
) -> nn.Module:
    """The same model, with its `blocks` compiled and checkpointed in place; tensor names do not change.
    Precision is the caller's: run the model under torch.autocast.

    compile: one graph for all blocks, since they differ in their weights only: compiling takes as
        long for 28 blocks as for one, and what lies around them is under one per cent of the work.
        Of an autoencoder, one graph each for all of the encoder and of the decoder but their last
        convolutions; one that is not ours stays as it is. A foundation model that is a ViT has
        blocks too; any other model is compiled whole. A graph never breaks: torch's own error says
        where it would. Every kind of call has a graph of its own, made when it first comes, and
        there may be any number of them (`models/graphs.py`).
    checkpoint_activations: recompute each block's activations in the backward pass instead of keeping them.
    channels_last: an autoencoder's convolutions work on activations whose channels lie side by side in memory; weights
        stay as they are, and so does what is stored. Other models have no convolutions to speak of.
    tell: takes a line when something is compiled and when that is done.
    turn: what a graph is made in, so that processes beside each other can make it once.
    Raises ValueError when the model has no `blocks` to checkpoint.
    """
    if isinstance(model, ImageAutoencoder) and not isinstance(model, AutoencoderKL):
        _refuse_checkpointing(model, checkpoint_activations)
        if compile:
            tell("an autoencoder that is not ours runs as it is: nothing of it is compiled")
        return model
    if isinstance(model, AutoencoderKL):
        _refuse_checkpointing(model, checkpoint_activations)
        _prepare_autoencoder(model, compile, channels_last, tell, turn)
        return model
    blocks = _blocks(model)
    if isinstance(model, SemanticVAE):
        _refuse_checkpointing(model, checkpoint_activations)
    if blocks is None:
        _refuse_checkpointing(model, checkpoint_activations)
        if compile:
            whole = compiled(type(model).forward, tell, turn)
            model.forward = MethodType(whole, model)  # type: ignore[method-assign]
        return model
    kinds = {type(block) for block in blocks} if compile else set()
    shared = {kind: compiled(kind.forward, tell, turn) for kind in kinds}
    for block in blocks:
        forward = MethodType(shared[type(block)], block) if compile else block.forward
        if checkpoint_activations:  # around the graph; blocks draw no random numbers
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = forward  # type: ignore[method-assign]
    return model


def has_blocks(model: nn.Module) -> bool:
    """Whether activations of the model can be checkpointed."""
    return _blocks(model) is not None


def halve(model: nn.Module, dtype: torch.dtype) -> None:
    """Store a frozen model's linear layers and convolutions in the half precision that it runs in, in place.

    torch.autocast would make these very copies anew in every pass, as it keeps only those of weights that are trained:
    for a small batch that takes as long as the pass. Results are the same in every bit, under autocast to `dtype`; all
    other weights stay as they are. Raises ValueError where there are weights to train.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has weights to train, which stay float32")
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)


def _blocks(model: nn.Module) -> Iterable[nn.Module] | None:
    """Of one structure, or nearly; the stages of a convolutional network have little in common."""
    if isinstance(model, SemanticVAE):
        return [each for each in (*model.encoder, *model.decoder) if isinstance(each, TransformerBlock)]
    vit = isinstance(model, FoundationModel) and model.patch is not None
    found = getattr(model.network if vit else model, "blocks", None)
    return found if isinstance(found, nn.ModuleList | nn.Sequential) else None


def _prepare_autoencoder(model: AutoencoderKL, compile: bool, channels_last: bool, tell: Tell, turn: Turn) -> None:
    if isinstance(model, Identity):
        return
    parts: tuple[Encoder, Decoder] = (model.encoder, model.decoder)
    for part in parts:
        if channels_last:
            part.register_forward_pre_hook(_channels_last)
        if compile:
            # The adaptive weights take gradients of one graph more than once, and a graph that gives its memory away
            # after the first refuses the second.
            functorch.donated_buffer = False
            trunk = compiled(type(part).trunk, tell, turn)
            part.trunk = MethodType(trunk, part)  # type: ignore[method-assign]


def _channels_last(_part: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.contiguous(memory_format=torch.channels_last) for each in given)


def _refuse_checkpointing(model: nn.Module, asked: bool) -> None:
    if asked:
        raise ValueError(
            f"{type(model).__name__} has no `blocks`, so there is nothing to checkpoint; switch "
            f"activation checkpointing off for it"
        )
