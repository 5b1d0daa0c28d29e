"""From noise to latents, or pixels, through the resolutions that a sample names.

Latents without a cascade are the cascade of one resolution that they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor, nn

from configs.diffusion import UnetModel
from configs.recipe import Recipe
from configs.sampling import AutoGuidance as AutoGuidanceSection
from configs.sampling import ClassifierFree as ClassifierFreeSection
from configs.sampling import Guidance as GuidanceSection
from configs.sampling import NoGuidance as NoGuidanceSection
from configs.sampling import RoutedGuidance as RoutedGuidanceSection
from configs.sampling import Sample
from infra.weights import load_pretrained
from models.cascade import Cascade, Conditioned
from models.edm import sample as denoise
from models.edm import sigma_grid
from models.flops import forward_flops
from models.flow_map import FlowMapDiT, walk
from models.groups import ChannelGroups
from models.guidance import AutoGuidance, ClassifierFree, Guidance, NoGuidance, Velocity, Watched
from models.routing import RoutedPass
from models.solvers import sample as solve
from tasks.networks import DiffusionNetwork, build_network, channel_groups, sampling_clock

Watch = Callable[[Tensor, tuple[float, ...]], None]
"""Is told of every evaluation: the normalised data (B, C, h, w) that the network expects now, and the groups' times."""
Noise = Callable[[tuple[int, ...], int], Tensor]
"""Standard normal numbers of a batch's images, (B, *shape), by shape and number of the draw."""
_DRAWS_PER_STAGE = 1 << 32
_CONDITION = 1 << 31
"""Draw of a stage's condition; those of its steps come before."""


@dataclass
class _Resolution:
    """One resolution of a sample, its settings, and how often networks ran there."""

    side: int
    section: Sample
    augment: float
    weak: nn.Module | None
    passes: dict[str, int]


class Integrator:
    """From noise to normalised latents (or pixels) at full resolution, through the resolutions that a sample names.

    recipe: of the sample; `train_dit` and the sizes must be those that the model was trained with.
    model: frozen, on its device. Weak guides are built and loaded here, each once.
    ready: what is done to a weak guide before it is used, such as compiling it.
    captured: gives what runs a network's passes in its place, such as recorded ones; None runs it as it is.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: DiffusionNetwork,
        ready: Callable[[DiffusionNetwork], DiffusionNetwork] = lambda model: model,
        captured: Callable[[nn.Module], Callable[..., Tensor]] | None = None,
    ) -> None:
        self.recipe, self.model = recipe, model
        self.groups, self.clock = channel_groups(recipe), sampling_clock(recipe)
        section = recipe.train_dit.cascade
        self.cascade = None if section is None else Cascade(section.sides, section.upsample)
        unet = recipe.train_dit.model
        self.sigmas: Callable[[int], Tensor] | None = None
        if isinstance(unet, UnetModel):
            self.sigmas = partial(sigma_grid, low=unet.sigma_min, high=unet.sigma_max, rho=unet.rho)
        weak: dict[str, nn.Module] = {}
        self.stages: list[_Resolution] = []
        for stage in recipe.sampled_resolutions:
            own = recipe.sample.at(stage)
            guide = None
            if isinstance(own.guidance, AutoGuidanceSection):
                found = own.guidance.model_dump_json(include={"weights", "model"})
                if found not in weak:
                    weak[found] = ready(_weak_guide(recipe, own.guidance, model))
                guide = weak[found]
            if isinstance(own.guidance, RoutedGuidanceSection):
                guide = weak.setdefault("routed", _routed_guide(recipe, model))
            self.stages.append(_Resolution(stage.side, own, stage.augment, guide, {"main": 0, "guide": 0}))
        networks = [model, *weak.values()]
        self._runs = {id(each): each if captured is None else captured(each) for each in networks}
        self._batches = 0
        self.watch: Watch | None = None
        """Looks on; nothing that is made depends on it."""

    def __call__(self, labels_B: Tensor, noise: Noise) -> Tensor:
        """Normalised latents (B, C, side, side) of these labels, all channel groups.

        noise: of the images' own random numbers; every stage has draws of its own, the first one those of a sample
            without a cascade.
        """
        latents: Tensor | None = None
        for number, stage in enumerate(self.stages):
            shape, first = (self.groups.channels, stage.side, stage.side), number * _DRAWS_PER_STAGE
            condition_noise = None if latents is None else noise(tuple(latents.shape[1:]), first + _CONDITION)

            def step_noise(step: int, shape: tuple[int, ...] = shape, first: int = first) -> Tensor:
                return noise(shape, first + step + 1)

            if isinstance(self.model, FlowMapDiT):
                latents = self._walked(stage, labels_B, noise(shape, first))
                continue
            velocity = self._watched(self._velocity(stage, latents, condition_noise))
            if self.sigmas is not None:
                grid = self.sigmas(stage.section.steps)
                latents = denoise(velocity, noise(shape, first), labels_B, grid, solver=stage.section.solver)
                continue
            latents = solve(
                velocity,
                noise(shape, first),
                labels_B,
                clock=self.clock,
                groups=self.groups,
                solver=stage.section.solver,
                steps=stage.section.steps,
                shift=self.recipe.time_shift(stage.section.shift_base, stage.section.shift),
                steps_are_points=stage.section.off_by_one,
                step_noise=step_noise,
                times=stage.section.times,
            )
        self._batches += 1
        assert latents is not None  # a recipe has at least one stage
        return latents

    def _walked(self, stage: _Resolution, labels_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        stage.passes["main"] += stage.section.steps
        run, steps = self._runs[id(self.model)], stage.section.steps
        return walk(run, noise_BCHW, labels_B, clock=self.clock, groups=self.groups, evaluations=steps)

    def evaluations(self) -> dict[str, float]:
        """Network evaluations per image so far, in units of one of the model at full resolution (papers.md 3.2).

        `effective_evaluations` are the model's and its guide's; `evaluations` counts passes whatever they cost.
        """
        cost, passes = 0.0, 0
        for stage, costs in zip(self.stages, self._costs, strict=True):
            cost += sum(stage.passes[name] * costs[name] for name in stage.passes)
            passes += sum(stage.passes.values())
        batches = max(1, self._batches)
        return {"effective_evaluations": cost / batches, "evaluations": passes / batches}

    @cached_property
    def _costs(self) -> list[dict[str, float]]:
        """Of one pass of each stage's networks, in units of the model at full resolution."""
        full = forward_flops(self.model)
        networks = [{"main": self.model, "guide": stage.weak or self.model} for stage in self.stages]
        return [
            {name: forward_flops(network, side=stage.side) / full for name, network in own.items()}
            for stage, own in zip(self.stages, networks, strict=True)
        ]

    def _watched(self, velocity: Velocity) -> Velocity:
        watch = self.watch
        if watch is None:
            return velocity

        def tell(x_BCHW: Tensor, t_BG: Tensor, said_BCHW: Tensor) -> None:
            times = tuple(t_BG[0].tolist())
            if self.sigmas is None:  # a velocity, along which data are a straight way off
                said_BCHW = x_BCHW + self.groups.weighted(said_BCHW, [1.0 - t for t in times])
            watch(said_BCHW, times)

        return Watched(velocity, tell)

    def _velocity(self, stage: _Resolution, lower: Tensor | None, noise: Tensor | None) -> Velocity:
        """The guided velocity of one stage, on the result of the one before; runs of its networks are counted."""
        condition = level = None
        if self.cascade is not None and lower is not None and noise is not None:
            level = lower.new_full((len(lower),), stage.augment)
            condition = self.cascade.condition(lower, noise, level, stage.side)

        def counted(name: str, model: nn.Module) -> Velocity:
            run = self._runs[id(model)]
            given: Velocity = run if condition is None else Conditioned(run, condition, level)

            def velocity(x_BCHW: Tensor, t_BG: Tensor, y_B: Tensor) -> Tensor:
                stage.passes[name] += 1
                return given(x_BCHW, t_BG, y_B)

            return velocity

        main = counted("main", self.model)
        guide = None if stage.weak is None else counted("guide", stage.weak)
        return build_guidance(stage.section.guidance, self.groups, self.model.null_label, guide)(main)


def build_guidance(
    asked: GuidanceSection, groups: ChannelGroups, null_label: int, guide: Velocity | None = None
) -> Guidance:
    """The guidance that a section asks for; `guide` is the weak network's velocity where there is one."""
    if isinstance(asked, NoGuidanceSection):
        return NoGuidance()
    if isinstance(asked, ClassifierFreeSection):
        return ClassifierFree(
            asked.scales(groups.names),
            null_label=null_label,
            channels=asked.channels,
            interval=asked.interval,
            groups=groups,
        )
    assert guide is not None  # the integrator loads one for every stage that is guided so
    return AutoGuidance(guide, asked.scales(groups.names), asked.interval, groups)


def _routed_guide(recipe: Recipe, model: nn.Module) -> RoutedPass:
    routing = recipe.train_dit.routing
    assert routing is not None  # the recipe's rules
    return RoutedPass(model, routing.first, routing.last, routing.drop)


def _weak_guide(recipe: Recipe, section: AutoGuidanceSection, model: DiffusionNetwork) -> DiffusionNetwork:
    weak = build_network(recipe, section.model)
    load_pretrained(weak, section.weights)
    return weak.requires_grad_(False).eval().to(next(model.parameters()).device)
