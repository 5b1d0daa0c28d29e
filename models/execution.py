"""Compile and activation checkpointing, applied to a plain model from outside, block by block."""

from __future__ import annotations

from functools import partial
from types import MethodType

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def prepare(model: nn.Module, *, compile: bool = False, checkpoint_activations: bool = False) -> nn.Module:
    """The same model, with its `blocks` compiled and checkpointed in place; tensor names do not change.
    Precision is the caller's: run the model under torch.autocast.

    compile: one graph for all blocks, since they differ in their weights only: compiling takes as long for 28 blocks
        as for one, and what lies around them is under one per cent of the work. A model without `blocks` is compiled
        whole. A graph never breaks: torch's own error says where it would.
    checkpoint_activations: recompute each block's activations in the backward pass instead of keeping them.
    Raises ValueError when the model has no `blocks` to checkpoint.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        if checkpoint_activations:
            raise ValueError(
                f"{type(model).__name__} has no `blocks`, so there is nothing to checkpoint; switch "
                f"activation checkpointing off for it"
            )
        if compile:
            model.compile(fullgraph=True)
        return model
    kinds = {type(block) for block in blocks} if compile else set()
    compiled = {kind: torch.compile(kind.forward, fullgraph=True) for kind in kinds}
    for block in blocks:
        forward = MethodType(compiled[type(block)], block) if compile else block.forward
        if checkpoint_activations:  # around the graph; blocks draw no random numbers
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = forward  # type: ignore[method-assign]
    return model
