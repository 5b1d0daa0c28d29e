"""The order of the stages, written once: flows run it, plans and reports read it. Imports none of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from tasks.stage import Stage

StageName = Literal["shard", "train_vavae", "train_semvae", "encode", "train_dit", "sample", "evaluate", "report"]
"""The stages from images to a report, in order."""
PIPELINE: tuple[str, ...] = get_args(StageName)
TOKENIZERS: tuple[str, ...] = ("shard", "train_vavae", "train_semvae", "evaluate_tokenizer")
"""The stages that train and score the tokenizers alone."""
FLOWS = {"sfd-full": PIPELINE, "lowdiff-full": PIPELINE, "tokenizer-eval": TOKENIZERS}
"""Stages by flow, in order."""


def load_stage(name: str) -> Stage:
    """The stage of a name, from its module. Raises ImportError where there is none."""
    stage: Stage = import_module(f"tasks.{name}").STAGE
    return stage
