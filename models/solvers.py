"""Solvers: integrate a velocity from noise to data along a clock.

The global time runs from 0 to the clock's span; each group's velocity is masked outside its phase.
Number of steps means steps. Source: papers.md 1.7 and 2.6; the SDE is ours (see `_sde_step`); multistep
solvers stand in `models/multistep.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from models.clocks import Clock
from models.groups import ChannelGroups
from models.guidance import Velocity, moment
from models.multistep import MULTISTEP, MultistepSolver

Solver = Literal["euler", "heun", "dopri5", "sde", "dpmpp_2m", "unipc"]
StepNoise = Callable[[int], Tensor]


def shifted(t: Tensor, shift: float) -> Tensor:
    """Bend normalised time: s t / (1 + (s - 1) t); 0 and 1 leave it alone. s < 1 spends more steps early."""
    return t if shift in (0, 1) else shift * t / (1 + (shift - 1) * t)


def time_grid(steps: int, span: float = 1.0, shift: float = 0.0, times: Sequence[float] | None = None) -> Tensor:
    """Global times from 0 to span, float32 on the host: steps + 1 of them, even but for the shift, or `times`.

    The shift and `times`, which rise from 0 to 1, are of time normalised to [0, 1].
    Raises ValueError when `times` do not.
    """
    if times is None:
        return span * shifted(torch.linspace(0.0, 1.0, steps + 1), shift)
    rising = all(now < ahead for now, ahead in pairwise(times))
    if len(times) < 2 or times[0] != 0 or times[-1] != 1 or not rising:
        raise ValueError(f"times must rise from 0 to 1, found {list(times)}")
    return span * torch.tensor(times)


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise_BCHW: Tensor,
    y_B: Tensor,
    *,
    clock: Clock,
    groups: ChannelGroups,
    solver: Solver = "euler",
    steps: int = 50,
    shift: float = 0.0,
    steps_are_points: bool = False,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    per_image: bool = False,
    step_noise: StepNoise | None = None,
    noise_scale: float = 1.0,
    times: Sequence[float] | None = None,
    seen: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Normalised latents x1_BCHW from noise_BCHW and labels y_B, in the noise's dtype.

    velocity: (x_BCHW, t_BG, y_B) -> v_BCHW, guided or not.
    steps, shift: fixed steps and how they are spaced; dopri5 chooses its own.
    steps_are_points: the published meaning, where 250 "steps" are 250 grid points and so 249 steps.
    atol, rtol: tolerances of dopri5. per_image: let dopri5 choose steps for each image alone; the published
        behaviour couples the images of a batch through one error norm, so that samples depend on the batch.
    step_noise, noise_scale: for "sde": the Gaussian noise of step i (shape of x), and a factor on the
        diffusion (0 makes it Euler).
    times: a grid of one's own instead of `steps` and `shift`, as `time_grid` takes it.
    seen: is shown x after each step (not of dopri5, which has steps of its own).
    Raises ValueError on an unknown solver, too few steps, groups that do not fit, or missing step_noise.
    """
    if solver not in get_args(Solver):
        raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, found '{solver}'")
    if groups.channels != noise_BCHW.shape[1] or clock.groups != len(groups):
        raise ValueError(
            f"noise has {noise_BCHW.shape[1]} channels, the groups {groups.channels}; the clock has "
            f"{clock.groups} groups, the latent {len(groups)}: they must agree"
        )
    steps = steps - 1 if steps_are_points else steps
    if steps < 1:
        raise ValueError("sampling needs at least 1 step (2 points with steps_are_points)")
    if solver == "sde" and step_noise is None:
        raise ValueError("the sde solver needs step_noise: a function from step number to Gaussian noise")

    if solver == "dopri5":
        from torchdiffeq import odeint  # here, because it brings all of scipy's integrators

        span = torch.tensor([0.0, clock.span], device=noise_BCHW.device)

        def field(g: Tensor, x_BCHW: Tensor, labels_B: Tensor) -> Tensor:
            # On the device, as the time that the solver chooses by what it reads of its error: it waits at every step.
            t_G, mask_G = clock.at(g)
            v = velocity(x_BCHW, t_G.expand(len(x_BCHW), -1), labels_B)
            return v.to(x_BCHW.dtype) * groups.spread(mask_G[None])

        def adaptive(x_BCHW: Tensor, labels_B: Tensor) -> Tensor:
            # One-element tolerances make torchdiffeq control its steps in float64, as published. With plain
            # numbers it works in float32, where the error of a smooth stretch is rounding noise and the next
            # step is a matter of luck.
            tolerances = {"atol": [atol], "rtol": [rtol]}
            path = odeint(lambda g, x: field(g, x, labels_B), x_BCHW, span, method="dopri5", **tolerances)
            return path[-1]

        if not per_image:
            return adaptive(noise_BCHW, y_B)
        pairs = zip(noise_BCHW.split(1), y_B.split(1), strict=True)
        return torch.cat([adaptive(x, y) for x, y in pairs])

    def at(g: Tensor, x_BCHW: Tensor) -> Tensor:
        # Time, phases and guidance are decided on the host, which then never waits: it queues one step after the other.
        t_G, _ = clock.at(g)
        return moment(velocity, t_G)(x_BCHW, everywhere(t_G, x_BCHW), y_B).to(x_BCHW.dtype)

    def known(g: Tensor, x_BCHW: Tensor) -> Tensor:
        return groups.weighted(at(g, x_BCHW), clock.at(g)[1].tolist())

    x = noise_BCHW
    grid = time_grid(steps, clock.span, shift, times)
    if solver in MULTISTEP:
        return _multistep(at, x, grid, clock, MultistepSolver(solver, groups), seen)
    for i in range(len(grid) - 1):
        g, dt = grid[i], grid[i + 1] - grid[i]
        v = known(g, x)
        if solver == "heun":
            ahead = known(grid[i + 1], x + dt * v)
            x = x + dt * 0.5 * (v + ahead)
        elif solver == "sde" and step_noise is not None:
            x = _sde_step(x, v, clock.at(g), dt, groups, noise_scale, step_noise(i).to(x))
        else:
            x = x + dt * v
        if seen is not None:
            seen(x)
    return x


def everywhere(t_G: Tensor, x_BCHW: Tensor) -> Tensor:
    """Times (B, G) of a whole batch from the host, which does not wait for the batch's device."""
    times = [torch.full((len(x_BCHW),), t, dtype=t_G.dtype, device=x_BCHW.device) for t in t_G.tolist()]
    return torch.stack(times, dim=1)


def _multistep(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x_BCHW: Tensor,
    grid: Tensor,
    clock: Clock,
    solver: MultistepSolver,
    seen: Callable[[Tensor], None] | None,
) -> Tensor:
    """Along the grid by predicted data x + (1 - t) v. A group's steps are those of its own clock, so that one
    whose phase begins between two points of the grid loses nothing of its way."""
    # In double precision, as a step is weighed by a difference of times; a time that rounding keeps from
    # noise or data would make the step there one of finite length.
    times = [[_settled(t) for t in clock.at(g)[0].tolist()] for g in grid.double()]
    for i, (now, ahead) in enumerate(pairwise(times)):
        rest = solver.groups.weighted(velocity(grid[i], x_BCHW), [1.0 - t for t in now])
        points = [[(t, 1.0 - t) for t in each] for each in (now, ahead)]
        x_BCHW = solver.step(x_BCHW, x_BCHW + rest, *points)
        if seen is not None:
            seen(x_BCHW)
    return x_BCHW


def _settled(t: float) -> float:
    near = min(1.0, max(0.0, t))
    return round(near) if abs(near - round(near)) < 1e-6 else near


def _sde_step(
    x_BCHW: Tensor,
    v_BCHW: Tensor,
    at: tuple[Tensor, Tensor],
    dt: Tensor,
    groups: ChannelGroups,
    noise_scale: float,
    noise_BCHW: Tensor,
) -> Tensor:
    """One Euler-Maruyama step of dx = (v + D score) dt + sqrt(2 D) dW with D = noise_scale (1 - t).

    On straight paths E[x0 | x] = x - t v, hence score = -(x - t v) / (1 - t) and D * score =
    -noise_scale (x - t v): no singularity at the data. A group's last step is taken without noise, which
    lands on the posterior mean (our choice). `at`: the groups' times and activity, on the host as `dt`.
    """
    t_G, mask_G = at
    noisy_G = (mask_G & (t_G + dt < 1.0 - 1e-6)).to(x_BCHW.dtype)
    pieces = []
    split = zip(*(groups.split(each) for each in (x_BCHW, v_BCHW, noise_BCHW)), strict=True)
    for (x, v, noise), t, noisy in zip(split, t_G.to(x_BCHW.dtype), noisy_G, strict=True):
        drift = v - noisy * noise_scale * (x - t * v)
        spread = noisy * torch.sqrt(2.0 * noise_scale * (1.0 - t).clamp_min(0.0) * dt)
        pieces.append(x + dt * drift + spread * noise)
    return torch.cat(pieces, dim=1)
