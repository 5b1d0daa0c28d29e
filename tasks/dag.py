"""The order of the stages, written once: flows run it, plans and reports read it. Imports none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Literal, get_args

from configs.reproduction import of_tokenizer

if TYPE_CHECKING:
    from configs import Recipe
    from tasks.stage import Stage

StageName = Literal[
    "shard", "train_vavae", "train_semvae", "encode", "train_dit", "tune_fewstep", "sample", "evaluate", "report"
]
"""The stages from images to a report, in order."""
PIPELINE: tuple[str, ...] = get_args(StageName)
TOKENIZERS: tuple[str, ...] = ("shard", "train_vavae", "train_semvae", "evaluate_tokenizer")
"""The stages that train and score the tokenizers alone."""
REPRODUCE = "reproduce"
FLOWS = {"sfd-full": PIPELINE, "lowdiff-full": PIPELINE, "tokenizer-eval": TOKENIZERS, REPRODUCE: PIPELINE}
"""Stages by flow, in order."""


def load_stage(name: str) -> Stage:
    """The stage of a name, from its module. Raises ImportError where there is none."""
    stage: Stage = import_module(f"tasks.{name}").STAGE
    return stage


def stages_of(flow: str) -> tuple[Stage, ...]:
    """The stages of a flow in order, each present where the flow needs it of a recipe."""
    loaded = (load_stage(name) for name in FLOWS[flow])
    if FLOWS[flow] is not PIPELINE:  # the tokenizers by themselves are always looked at on images
        return tuple(loaded)
    return tuple(replace(stage, present=partial(in_pipeline, stage.name)) for stage in loaded)


def reproducing(recipe: str, overrides: Sequence[str] = ()) -> str:
    """The flow whose stages `reproduce` runs of a recipe: the whole DAG, or that of tokenizers."""
    return "tokenizer-eval" if of_tokenizer(recipe, overrides) else REPRODUCE


def in_pipeline(name: str, recipe: Recipe) -> bool:
    """Whether a recipe has this stage on the way from images, or from latents that are given, to a report.

    No latents are made where tokenizer, diffusion weights and their statistics are given, and no image
    is read where scores compare with none of the recipe's either.
    """
    if name == "shard":
        return recipe.needs_images
    if name == "train_semvae":
        return recipe.train_semvae is not None and recipe.needs_latents and not recipe.ready_latents
    if name == "tune_fewstep":
        return recipe.tune_fewstep is not None
    return recipe.needs_latents if name == "encode" else True
