"""Sections of sampling: guidance, solvers, and which images are made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from configs.diffusion import DiffusionModel
from configs.section import Added, Positive, Precision, Section, Seed, Share, SigmaRel, Weight


class NoGuidance(Section):
    method: Literal["none"] = "none"


class Guided(Section):
    """Extrapolation from a guide, for chosen channel groups within an interval of their own time (papers.md 2.6)."""

    scale: Annotated[float, Field(ge=1.0)]
    groups: Annotated[Literal["both", "texture", "semantic"], Added(before="both")] = "both"
    """Channel groups that are guided; the other one keeps the main network's velocity."""
    interval_start: Annotated[Share, Added(before=0.0)] = 0.0
    """Guidance is off while a group's time is below this, or above `interval_end`."""
    interval_end: Annotated[Share, Added(before=1.0)] = 1.0

    def scales(self, groups: Iterable[str]) -> tuple[float, ...]:
        """Of each channel group by its name; 1 is no guidance."""
        return tuple(self._scale(name) if self.groups in ("both", name) else 1.0 for name in groups)

    @property
    def interval(self) -> tuple[float, float]:
        """Within which a group's time is guided, bounds included."""
        return self.interval_start, self.interval_end

    def _scale(self, group: str) -> float:
        return self.scale

    @model_validator(mode="after")
    def _interval_is_one(self) -> Guided:
        if self.interval_start > self.interval_end:
            raise ValueError(
                f"interval_start {self.interval_start:g} is above interval_end {self.interval_end:g}: guidance would "
                "never act; use method: none for that"
            )
        return self


class ClassifierFree(Guided):
    method: Literal["classifier_free"] = "classifier_free"
    interval_start: Share = 0.0
    channels: Positive | None = None
    """Guide the first channels only (3 reproduces the published LightningDiT scores); None guides all."""


class RoutedGuidance(Guided):
    """The guide is the same network without a label, through whose middle blocks only the kept tokens of
    `train_dit.routing` go: a weaker pass that costs less (SPRINT, arXiv 2510.21986)."""

    method: Literal["routed"] = "routed"


class AutoGuidance(Guided):
    """The guide is a weaker model, under the same label."""

    method: Literal["autoguidance"] = "autoguidance"
    semantic_scale: Annotated[float, Field(ge=1.0)] | None = None
    """Scale of the semantic group; None takes `scale`."""
    weights: str
    """Path, fsspec URL or hub name of the weak model, trained on the same latents."""
    model: DiffusionModel

    def _scale(self, group: str) -> float:
        return self.scale if group != "semantic" or self.semantic_scale is None else self.semantic_scale

    @model_validator(mode="after")
    def _semantics_are_guided(self) -> AutoGuidance:
        if self.groups == "texture" and self.semantic_scale is not None:
            raise ValueError(f"semantic_scale is {self.semantic_scale:g} but groups is texture: leave one of them out")
        return self


Guidance = Annotated[NoGuidance | ClassifierFree | RoutedGuidance | AutoGuidance, Field(discriminator="method")]


Solver = Literal["euler", "heun", "dopri5", "sde", "dpmpp_2m", "unipc"]
"""`dpmpp_2m` and `unipc` reuse what the network said before: one evaluation a step, as `euler`, of order 2 and 3."""


def _rising(times: tuple[float, ...]) -> tuple[float, ...]:
    if len(times) < 2 or times[0] != 0 or times[-1] != 1 or sorted(set(times)) != list(times):
        raise ValueError(f"a grid of times must rise from 0 (noise) to 1 (data), found {list(times)}")
    return times


Times = Annotated[tuple[float, ...], AfterValidator(_rising)]


class SampleResolution(Section):
    """One resolution of a cascade; what is left out is as in `sample`."""

    side: Positive
    """In cells, one of `train_dit.cascade.sides`."""
    steps: Positive | None = None
    solver: Solver | None = None
    shift: Weight | None = None
    guidance: Guidance | None = None
    times: Annotated[Times | None, Added(before=None)] = None
    augment: Share = 0.1
    """Share of noise in the condition, the lower result."""


Label = Annotated[int, Field(ge=0)]


class Sample(Section):
    images: Positive
    labels: Literal["balanced", "random", "unconditional"] | tuple[Label, ...] | dict[Label, Positive] = "balanced"
    """`balanced` goes round the classes, `random` draws them, `unconditional` gives none; a list of labels is gone
    round in its order, and `label: images` gives so many of each, in an order drawn from the seed."""
    guidance: Guidance = NoGuidance()
    solver: Solver = "euler"
    steps: Positive = 50
    shift: Weight = 0.0
    """Time shift s of papers.md 1.7; 0 is none."""
    shift_base: Annotated[Positive | None, Added(before=None)] = None
    """The shift by the latents' dimension instead, as `train_dit.objective.shift_base`."""
    times: Annotated[Times | None, Added(before=None)] = None
    """A grid of one's own instead of `steps` and `shift`: rising from 0 (noise) to 1 (data)."""
    delta: Annotated[Share | None, Added(before=None)] = None
    """How far semantics run ahead of texture, instead of `train_dit.clock.delta`."""
    off_by_one: bool = False
    """Count grid points instead of steps, as the published samplers do (250 means 249)."""
    ema: bool = True
    ema_sigma: Annotated[SigmaRel | None, Added(before=None)] = None
    """Sample from the average with a power profile of this width, put together from the training's snapshots
    (`docs/training.md`), instead."""
    batch: Positive = 250
    """Static batch of the sampler. Images do not depend on it, but for dopri5's shared step size."""
    stages: Annotated[tuple[SampleResolution, ...], Added(before=())] = ()
    """Resolutions of a cascade to go through, coarsest first, up to the latents' own and without a gap; empty goes
    through all of `train_dit.cascade`."""
    precision: Annotated[Precision, Added(before="tf32")] = "tf32"
    """Of the diffusion network and its guide. The decoder, whose output are levels of 8 bits, knows no `bf16`."""
    seed: Seed = 0

    @property
    def intervals(self) -> int:
        """Steps that a fixed grid has, however it is given."""
        return len(self.times) - 1 if self.times else self.steps - self.off_by_one

    def at(self, stage: SampleResolution) -> Sample:
        """The section as it holds at one resolution."""
        own = {name: getattr(stage, name) for name in ("steps", "solver", "shift", "guidance", "times")}
        return self.model_copy(update={name: value for name, value in own.items() if value is not None})
