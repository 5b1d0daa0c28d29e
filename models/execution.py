"""Compile and activation checkpointing, applied to a plain model from outside, block by block."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def prepare(model: nn.Module, *, compile: bool = False, checkpoint_activations: bool = False) -> nn.Module:
    """The same model, with its `blocks` checkpointed and the whole compiled in place; tensor names do not
    change. Precision is the caller's: run the model under torch.autocast.

    checkpoint_activations: recompute each block in the backward pass instead of keeping its activations.
    compile: one graph without breaks; raises torch's own error when there is one.
    Raises ValueError when the model has no `blocks` to checkpoint.
    """
    if checkpoint_activations:
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList):
            raise ValueError(
                f"{type(model).__name__} has no `blocks`, so there is nothing to checkpoint; switch "
                f"activation checkpointing off for it"
            )
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    if compile:
        model.compile(fullgraph=True)
    return model
