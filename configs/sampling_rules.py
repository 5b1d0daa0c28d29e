"""Rules of how a recipe is sampled: resolutions, guidance, labels, steps, and a flow map's passes.

As in `configs/rules.py`, each raises ValueError with fields, what was found and what would be right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from configs.diffusion import DitModel
from configs.sampling import AutoGuidance, ClassifierFree, Guidance, Guided, RoutedGuidance, Sample

if TYPE_CHECKING:
    from configs.recipe import Recipe


def sampled(recipe: Recipe) -> list[tuple[str, Sample]]:
    """The sample section, and as it holds at every stage that says otherwise, with their fields'
    names."""
    if recipe.lacks("sample"):
        return []
    stages = enumerate(recipe.sample.stages)
    return [
        ("sample", recipe.sample),
        *((f"sample.stages.{number}", recipe.sample.at(stage)) for number, stage in stages if stage.guidance),
    ]


def _guided(recipe: Recipe) -> list[tuple[str, Guidance]]:
    """Guidance wherever a recipe has some, of a few-step teacher too, with the fields' names."""
    found = [(f"{field}.guidance", section.guidance) for field, section in sampled(recipe)]
    if recipe.tune_fewstep is not None:
        found.append(("tune_fewstep.guidance", recipe.tune_fewstep.guidance))
    return found


def _stages(recipe: Recipe) -> None:
    cascade, stages = recipe.train_dit.cascade, recipe.sample.stages
    if cascade is None:
        if stages:
            raise ValueError(
                "sample.stages is set but train_dit.cascade is not: leave the stages out, or add a cascade"
            )
        return
    sampled = [stage.side for stage in stages] or list(cascade.sides)
    if sampled != list(cascade.sides[len(cascade.sides) - len(sampled) :]):
        raise ValueError(
            f"sample.stages goes through {sampled}: name the last sides of train_dit.cascade.sides "
            f"{list(cascade.sides)} in their order, since each one is trained on the one before it"
        )
    if len(sampled) < len(cascade.sides) and recipe.train_dit.images and cascade.condition_dropout == 0.0:
        raise ValueError(
            f"sample.stages begins at {sampled[0]} but train_dit.cascade.condition_dropout is 0, so that side is never "
            "trained without a condition: raise it, or begin at the coarsest side"
        )


def _guidance(recipe: Recipe) -> None:
    for field, guidance in _guided(recipe):
        channels = getattr(guidance, "channels", None)
        if channels is not None and channels > recipe.latent_channels:
            raise ValueError(f"{field}.channels is {channels} but the latent has {recipe.latent_channels} channels")
        texture = recipe.channel_groups["texture"]
        if channels is not None and channels <= texture and getattr(guidance, "groups", "both") == "semantic":
            raise ValueError(
                f"{field}.groups is semantic, whose channels come after {texture} of texture, but only the first "
                f"{channels} are guided (channels): leave channels out"
            )
        if isinstance(guidance, Guided) and guidance.groups != "both" and recipe.train_semvae is None:
            raise ValueError(
                f"{field}.groups is {guidance.groups} but there are no semantic channels (train_semvae): use both"
            )
        if isinstance(guidance, AutoGuidance) and guidance.semantic_scale is not None and recipe.train_semvae is None:
            raise ValueError(f"{field}.semantic_scale is set but there are no semantic channels (train_semvae)")


def _routed_guides(recipe: Recipe) -> None:
    for field, section in sampled(recipe):
        if isinstance(section.guidance, RoutedGuidance) and recipe.train_dit.routing is None:
            raise ValueError(
                f"{field}.guidance.method is routed but train_dit.routing is not set, so no token goes around a block: "
                "set it, or use classifier_free"
            )


def _label_dropout(recipe: Recipe) -> None:
    trained = recipe.train_dit
    unconditional = not recipe.lacks("sample") and recipe.sample.labels == "unconditional"
    if not trained.images or trained.objective.label_dropout > 0 or unconditional:
        return
    for field, guidance in _guided(recipe):
        if isinstance(guidance, ClassifierFree | RoutedGuidance) and guidance.scale > 1.0:
            raise ValueError(
                f"{field}.method is {guidance.method} but train_dit.objective.label_dropout is 0, so the model never "
                "learns to do without a label: raise it (0.1 is usual), or use method: none"
            )


def _balanced(recipe: Recipe) -> None:
    if recipe.sample.labels == "balanced" and recipe.sample.images % recipe.data.classes:
        raise ValueError(
            f"sample.images {recipe.sample.images} cannot be balanced over data.classes {recipe.data.classes}: "
            f"use {max(1, round(recipe.sample.images / recipe.data.classes)) * recipe.data.classes} "
            "or labels: random"
        )


def _labels(recipe: Recipe) -> None:
    plan, classes = recipe.sample.labels, recipe.data.classes
    if plan == "unconditional":
        for field, section in sampled(recipe):
            if isinstance(section.guidance, ClassifierFree):
                raise ValueError(
                    f"sample.labels is unconditional but {field}.guidance.method is classifier_free, whose two passes "
                    "would be the same: use method: none, or labels that name classes"
                )
        if recipe.train_dit.images and recipe.train_dit.objective.label_dropout == 0.0:
            raise ValueError(
                "sample.labels is unconditional but train_dit.objective.label_dropout is 0, so the model never learns "
                "to do without a label: raise it, or use labels that name classes"
            )
    if isinstance(plan, str):
        return
    if not plan:
        raise ValueError("sample.labels is empty: name labels, or use balanced")
    if max(plan) >= classes:
        raise ValueError(f"sample.labels names {max(plan)}; data.classes {classes} has labels 0 to {classes - 1}")
    if isinstance(plan, dict) and sum(plan.values()) != recipe.sample.images:
        raise ValueError(
            f"sample.labels asks for {sum(plan.values())} images in all but sample.images is {recipe.sample.images}: "
            "make them equal"
        )


def _averages(recipe: Recipe) -> None:
    wanted, trained = recipe.sample.ema_sigma, recipe.train_dit
    if wanted is None:
        return
    if not trained.images:
        raise ValueError(
            f"sample.ema_sigma is {wanted}, but train_dit.images is 0, so that there are no snapshots to make that "
            "average of: leave ema_sigma out"
        )
    if trained.snapshot_every is None:
        raise ValueError(
            f"sample.ema_sigma is {wanted}, but train_dit.snapshot_every stores no snapshots to make that average of: "
            "set it, and two train_dit.ema_sigmas, or leave ema_sigma out"
        )


def _steps(recipe: Recipe) -> None:
    for resolution in recipe.sampled_resolutions:
        own = recipe.sample.at(resolution)
        if own.off_by_one and own.steps < 2:
            raise ValueError(f"sample.steps is {own.steps} and off_by_one counts its points: use at least 2")
        if own.shift_base is not None and (own.shift or own.times or own.solver == "dopri5"):
            raise ValueError(
                f"sample.shift_base {own.shift_base} shifts steps by the latents' dimension, beside solver "
                f"{own.solver}, shift {own.shift:g}, times {own.times}: leave out shift and times, and take a "
                "solver of fixed steps"
            )
        if own.times is not None and (own.shift or own.off_by_one or own.solver == "dopri5"):
            raise ValueError(
                f"sample.times is the whole grid, beside solver {own.solver}, shift {own.shift:g} and off_by_one "
                f"{str(own.off_by_one).lower()}: leave out shift and off_by_one, and take a solver of fixed steps"
            )


def _fewstep(recipe: Recipe) -> None:
    section, trained = recipe.tune_fewstep, recipe.train_dit
    if section is None:
        return
    if not isinstance(trained.model, DitModel) or trained.model.head is not None or trained.cascade is not None:
        raise ValueError(
            "tune_fewstep makes a flow map of a LightningDiT at one resolution: leave it out, or train_dit.cascade, "
            "train_dit.model.head and a UNet"
        )


def _sampled_by_map(recipe: Recipe) -> None:
    section, sample = recipe.tune_fewstep, recipe.sample
    if section is None:
        return
    if sample.steps not in section.evaluations:
        raise ValueError(
            f"sample.steps is {sample.steps} but tune_fewstep.evaluations are {list(section.evaluations)}: sample in "
            "as many passes as the map has learnt"
        )
    if sample.guidance.method != "none":
        raise ValueError(
            f"sample.guidance.method is {sample.guidance.method} but a flow map brings its guidance along: set it to "
            "none here, and tune_fewstep.guidance to what it is to learn"
        )
    bent = sample.shift or sample.shift_base or sample.times or sample.off_by_one or sample.ema_sigma
    bent = bent or sample.delta is not None
    if sample.solver != "euler" or bent or sample.labels == "unconditional":
        raise ValueError(
            "sample of a flow map (tune_fewstep) takes even steps of labelled images: use solver euler, and leave "
            "shift, shift_base, times, off_by_one, delta, ema_sigma and labels: unconditional out"
        )


RULES: dict[Callable[[Recipe], None], tuple[str, ...]] = {
    _stages: ("train_dit", "sample"),
    _guidance: (),
    _routed_guides: ("train_dit", "sample"),
    _label_dropout: ("train_dit",),
    _balanced: ("sample",),
    _labels: ("train_dit", "sample"),
    _averages: ("train_dit", "sample"),
    _steps: ("train_dit", "sample"),
    _fewstep: ("train_dit",),
    _sampled_by_map: ("train_dit", "sample"),
}
"""Each rule with the sections that it cannot do without."""
