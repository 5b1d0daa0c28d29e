"""Multistep solvers on distributions whose paths are known, and beside another implementation."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from models.clocks import SemanticFirst, Synchronous
from models.edm import sample as denoise
from models.edm import sigma_grid, sigma_of
from models.groups import ChannelGroups, single_group
from models.guidance import ClassifierFree
from models.multistep import MULTISTEP, MultistepSolver
from models.solvers import sample, shifted, time_grid

PAIR = ChannelGroups(("texture", "semantic"), (1, 1))
ONE = single_group(1)
MEAN, SPREAD = 2.0, 0.5
LABELS = torch.zeros(4, dtype=torch.long)
NOISE = torch.linspace(-2.0, 2.0, 4, dtype=torch.float64).view(4, 1, 1, 1)
ORDER = {"dpmpp_2m": 2, "unipc": 3}


def velocity(x: Tensor, t: Tensor, _y: Tensor) -> Tensor:
    """From N(0, 1) to N(MEAN, SPREAD^2) on straight paths, each channel at its own time."""
    t = t[..., None, None]
    variance = (t * SPREAD) ** 2 + (1 - t) ** 2
    return MEAN + (t * SPREAD**2 - (1 - t)) / variance * (x - t * MEAN)


def error(solver: str, steps: int, **options: object) -> float:
    """The exact path takes the quantiles of noise to those of the data."""
    end = sample(
        velocity,
        NOISE,
        LABELS,
        clock=Synchronous(1),
        groups=ONE,
        solver=solver,
        steps=steps,
        **options,  # type: ignore[arg-type]
    )
    return float((end - (MEAN + SPREAD * NOISE)).abs().max())


@pytest.mark.parametrize("solver", MULTISTEP)
def test_data_of_one_point_are_reached_in_one_step(solver: str) -> None:
    """The predicted data do not change along such a path, and nothing is left to extrapolate."""

    def to_one_point(x: Tensor, t: Tensor, _y: Tensor) -> Tensor:
        return (3.0 - x) / (1 - t[..., None, None])

    for steps in (1, 2, 5):
        clock = Synchronous(1)
        end = sample(to_one_point, NOISE, LABELS, clock=clock, groups=ONE, solver=solver, steps=steps)  # type: ignore[arg-type]
        torch.testing.assert_close(end, torch.full_like(NOISE, 3.0))


@pytest.mark.parametrize("solver", MULTISTEP)
def test_order_of_convergence(solver: str) -> None:
    """Between two inner points of the path, where all steps are of the full order."""

    def inner(steps: int) -> float:
        grid = torch.sigmoid(torch.linspace(-1.5, 2.5, steps + 1, dtype=torch.float64)).tolist()
        steps_of = MultistepSolver(solver, ONE)  # type: ignore[arg-type]

        def exact(t: float) -> Tensor:
            spread = math.sqrt((t * SPREAD) ** 2 + (1 - t) ** 2)
            return t * MEAN + spread * NOISE

        x = exact(grid[0])
        for now, ahead in pairwise(grid):
            t = torch.full((4, 1), now, dtype=torch.float64)
            data = x + (1 - now) * velocity(x, t, LABELS)
            x = steps_of.step(x, data, [(now, 1 - now)], [(ahead, 1 - ahead)])
        return float((x - exact(grid[-1])).abs().max())

    measured = math.log2(inner(40) / inner(80))
    assert measured == pytest.approx(ORDER[solver], abs=0.2)


@pytest.mark.parametrize("solver", MULTISTEP)
def test_ten_steps_do_what_euler_does_in_fifty(solver: str) -> None:
    assert error(solver, 10) < error("euler", 50) < error("euler", 10)


@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("solver", MULTISTEP)
def test_the_published_schedulers_take_the_same_steps(solver: str, shift: float) -> None:
    steps = 8
    grid = shifted(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift)
    grid[-1] = 1.0
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 2}
    other = (
        DPMSolverMultistepScheduler(**options, algorithm_type="dpmsolver++", final_sigmas_type="zero")
        if solver == "dpmpp_2m"
        else UniPCMultistepScheduler(**options, solver_type="bh2", predict_x0=True, final_sigmas_type="zero")
    )
    other.set_timesteps(steps)
    other.sigmas = 1 - grid  # theirs are noise levels from 1 to 0, ours times from 0 to 1
    theirs = NOISE
    for now, timestep in zip(grid, other.timesteps, strict=False):
        v = velocity(theirs, torch.full((4, 1), float(now), dtype=torch.float64), LABELS)
        theirs = other.step(-v, timestep, theirs, return_dict=False)[0]
    ours = sample(
        velocity,
        NOISE,
        LABELS,
        clock=Synchronous(1),
        groups=ONE,
        solver=solver,
        times=grid.tolist(),  # type: ignore[arg-type]
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("solver", MULTISTEP)
def test_a_group_goes_as_it_would_alone_at_its_own_times(solver: str) -> None:
    clock = SemanticFirst(0.3)
    both = sample(
        velocity,
        NOISE.expand(4, 2, 1, 1),
        LABELS,
        clock=clock,
        groups=PAIR,
        solver=solver,
        steps=13,  # type: ignore[arg-type]
    )
    grid = time_grid(13, clock.span).double()
    for channel, offset in enumerate(clock.offsets):
        own = [t for t in (grid - offset).tolist() if 1e-6 < t < 1 - 1e-6]
        alone = sample(
            velocity,
            NOISE,
            LABELS,
            clock=Synchronous(1),
            groups=ONE,
            solver=solver,
            times=[0.0, *own, 1.0],  # type: ignore[arg-type]
        )
        torch.testing.assert_close(both[:, channel : channel + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solver", MULTISTEP)
def test_every_step_asks_once_and_guidance_keeps_its_interval(solver: str) -> None:
    times: dict[int, list[float]] = {0: [], 9: []}

    def asked(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        times[int(y[0])].append(round(float(t[0, 0]), 6))
        return velocity(x, t, y)

    guided = ClassifierFree(2.0, null_label=9, interval=(0.3, 0.8))(asked)
    sample(guided, NOISE, LABELS, clock=Synchronous(1), groups=ONE, solver=solver, steps=5)  # type: ignore[arg-type]
    assert times == {0: [0.0, 0.2, 0.4, 0.6, 0.8], 9: [0.4, 0.6, 0.8]}


@pytest.mark.parametrize("solver", MULTISTEP)
def test_pixels_are_denoised_better_than_by_as_many_euler_steps(solver: str) -> None:
    def ideal(x: Tensor, t: Tensor, _y: Tensor) -> Tensor:
        sigma = sigma_of(t)[..., None, None].to(x.dtype)
        return MEAN + SPREAD**2 / (SPREAD**2 + sigma**2) * (x - MEAN)

    levels = sigma_grid(18)
    exact = MEAN + SPREAD * (NOISE * levels[0] - MEAN) / (SPREAD**2 + levels[0] ** 2).sqrt()

    def wrong(solver: str) -> float:
        found = denoise(ideal, NOISE, LABELS, levels, solver=solver)  # type: ignore[arg-type]
        return float((found - exact).abs().max())

    assert wrong(solver) < 0.5 * wrong("euler")


def test_a_grid_of_times_rises_from_noise_to_data() -> None:
    for times in ([0.0], [0.1, 1.0], [0.0, 0.9], [0.0, 0.5, 0.5, 1.0]):
        with pytest.raises(ValueError, match="rise from 0 to 1"):
            time_grid(4, times=times)
    assert time_grid(99, 1.3, times=[0.0, 0.25, 1.0]).tolist() == pytest.approx([0.0, 0.325, 1.3])
