"""How often a solver asks the network and its guide for one image, without solving anything."""

from __future__ import annotations

from configs import Recipe
from configs.diffusion import SemanticFirstClock, UnetModel
from configs.sampling import Guided, Sample
from tasks.plan import networks


def solver_evaluations(recipe: Recipe, section: Sample, adaptive: int) -> tuple[int, float, str]:
    """Velocities of the main network and of the guide for one image, and how that was found (papers.md 1.7, 2.6).

    The guide runs wherever some group's time lies in the guidance interval.
    """
    if isinstance(recipe.train_dit.model, UnetModel):
        return _denoisings(recipe.train_dit.model, section)
    steps = section.intervals
    span, offsets = 1.0, [0.0] * len(recipe.channel_groups)
    clock = recipe.train_dit.clock
    if isinstance(clock, SemanticFirstClock):
        delta = clock.delta if section.delta is None else section.delta
        span, offsets = 1.0 + delta, [delta, 0.0]
    if section.solver == "dopri5":
        times, count, how = [span * i / 100 for i in range(100)], adaptive, f"{adaptive} evaluations of dopri5 assumed"
    else:
        shift = recipe.time_shift(section.shift_base, section.shift)
        even = [_shifted(i / steps, shift) for i in range(steps + 1)]
        grid = [span * t for t in section.times or even]
        times = grid[:-1] + (grid[1:] if section.solver == "heun" else [])
        count, how = len(times), f"{len(times)} evaluations of {section.solver}"
    own_times = [[min(max(g - offset, 0.0), 1.0) for offset in offsets] for g in times]
    return count, count * _guided(section, tuple(recipe.channel_groups), own_times) / len(times), how


def effective_evaluations(recipe: Recipe, adaptive: int) -> float:
    """Passes of the main network for one image, in units of one at full resolution (papers.md 3.2).

    Guidance is left out: it multiplies what a cascade costs and what it is compared with alike.
    """
    full = networks.diffusion(recipe, recipe.train_dit.model)[0].flops
    return sum(
        solver_evaluations(recipe, recipe.sample.at(each), adaptive)[0]
        * networks.diffusion(recipe, recipe.train_dit.model, each.side)[0].flops
        / full
        for each in recipe.sampled_resolutions
    )


def _denoisings(model: UnetModel, section: Sample) -> tuple[int, float, str]:
    """The same in pixel space: along the noise levels of `models/edm.py`, whose times are 1 / (1 + sigma)."""
    low, high = model.sigma_min ** (1 / model.rho), model.sigma_max ** (1 / model.rho)
    levels = [(high + i / (section.steps - 1) * (low - high)) ** model.rho for i in range(section.steps)]
    asked = levels + (levels[1:] if section.solver == "heun" else [])
    guided = _guided(section, ("texture",), [[1 / (1 + sigma)] for sigma in asked])
    return len(asked), float(guided), f"{len(asked)} evaluations of {section.solver}"


def _guided(section: Sample, groups: tuple[str, ...], times: list[list[float]]) -> int:
    """At how many of these moments, each with the time of every group, the guide runs."""
    guidance = section.guidance
    if not isinstance(guidance, Guided):
        return 0
    low, high = guidance.interval
    scales = guidance.scales(groups)
    return sum(any(low <= t <= high and scale != 1.0 for t, scale in zip(own, scales, strict=True)) for own in times)


def _shifted(t: float, shift: float) -> float:
    return t if shift in (0, 1) else shift * t / (1 + (shift - 1) * t)
