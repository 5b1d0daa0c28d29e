"""Solvers on fields whose integrals are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.clocks import SemanticFirst, Synchronous
from models.groups import ChannelGroups, single_group
from models.guidance import Velocity
from models.solvers import sample, shifted, time_grid

PAIR = ChannelGroups(("texture", "semantic"), (1, 1))
ONE = single_group(1)
LABELS = torch.zeros(1, dtype=torch.long)


def growth(x: Tensor, t: Tensor, _y: Tensor) -> Tensor:
    """dx/dt = x (1 + t), so x(1) = x(0) exp(1.5)."""
    return x * (1 + t)[..., None, None]


def error(solver: str, steps: int, **options: object) -> float:
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    end = sample(growth, start, LABELS, clock=Synchronous(1), groups=ONE, solver=solver, steps=steps, **options)  # type: ignore[arg-type]
    return abs(end.item() - math.exp(1.5))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_order_of_convergence(solver: str, order: int, shift: float) -> None:
    coarse, fine = error(solver, 32, shift=shift), error(solver, 64, shift=shift)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_dopri5_is_accurate() -> None:
    assert error("dopri5", 1, rtol=1e-7, atol=1e-9) < 1e-6


@pytest.mark.parametrize("solver", ["euler", "heun", "dopri5"])
def test_a_constant_field_is_integrated_exactly_over_all_three_phases(solver: str) -> None:
    """Each group moves for exactly one unit, so unit velocity adds one to both."""
    clock = SemanticFirst(0.25)
    end = sample(
        lambda x, t, y: torch.ones_like(x),
        torch.zeros(2, 2, 1, 1),
        LABELS.expand(2),
        clock=clock,
        groups=PAIR,
        solver=solver,  # type: ignore[arg-type]
        steps=5000,
        rtol=1e-6,
    )
    # Masks include their bounds, so a fixed step at a bound may count one step more.
    torch.testing.assert_close(end, torch.ones_like(end), atol=1e-3, rtol=0)


def calls(steps: int, **options: object) -> list[float]:
    times: list[float] = []

    def velocity(x: Tensor, t: Tensor, _y: Tensor) -> Tensor:
        times.append(t[0, 0].item())
        return torch.zeros_like(x)

    sample(velocity, torch.zeros(1, 1, 1, 1), LABELS, clock=Synchronous(1), groups=ONE, steps=steps, **options)  # type: ignore[arg-type]
    return times


def test_steps_mean_steps_and_points_when_asked() -> None:
    assert calls(4) == [0.0, 0.25, 0.5, 0.75]
    assert calls(5, steps_are_points=True) == calls(4)
    assert len(calls(4, solver="heun")) == 8


def test_shift_bends_normalised_time() -> None:
    torch.testing.assert_close(
        shifted(torch.tensor([0.1, 0.5, 0.9]), 0.3), torch.tensor([0.032, 0.231, 0.730]), atol=6e-4, rtol=0
    )
    straight, bent = time_grid(10, 1.3), time_grid(10, 1.3, 0.3)
    assert bent[0] == 0 and bent[-1] == straight[-1]
    torch.testing.assert_close(bent, 1.3 * shifted(straight / 1.3, 0.3))
    assert torch.equal(time_grid(10, 1.3, 1.0), straight)


def gaussian(mean: float, spread: float) -> Velocity:
    """The exact velocity from N(0, 1) to N(mean, spread^2) along straight paths."""

    def velocity(x: Tensor, t: Tensor, _y: Tensor) -> Tensor:
        t = t[..., None, None]
        variance = (t * spread) ** 2 + (1 - t) ** 2
        return mean + (t * spread**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


@pytest.mark.parametrize("noise_scale", [0.0, 0.5, 1.0])
def test_the_sde_reaches_the_data_distribution(noise_scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 1, 200, 200, generator=generator)
    end = sample(
        gaussian(2.0, 0.5),
        start,
        LABELS,
        clock=Synchronous(1),
        groups=ONE,
        solver="sde",
        steps=200,
        noise_scale=noise_scale,
        step_noise=lambda i: torch.randn(1, 1, 200, 200, generator=generator),
    )
    assert end.mean().item() == pytest.approx(2.0, abs=0.02)
    assert end.std().item() == pytest.approx(0.5, abs=0.02)
    # With noise the end point forgets its start; without it is a function of it.
    tie = torch.corrcoef(torch.stack([start.flatten(), end.flatten()]))[0, 1].item()
    assert tie > 0.999 if noise_scale == 0.0 else tie < 0.95


def test_the_sde_respects_phases() -> None:
    """A group outside its phase is not shaken."""
    end = sample(
        lambda x, t, y: torch.zeros_like(x),
        torch.zeros(1, 2, 1, 1),
        LABELS,
        clock=SemanticFirst(1.0),
        groups=PAIR,
        solver="sde",
        steps=2,
        step_noise=lambda i: torch.full((1, 2, 1, 1), float(i + 1)),
    )
    assert end.flatten().tolist() == [0.0, 0.0], "both groups take one step, and a group's last step has no noise"


@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
def test_an_image_does_not_depend_on_its_batch(solver: str) -> None:
    noise = torch.randn(3, 2, 2, 2)
    shake = torch.randn(6, 3, 2, 2, 2)

    def run(rows: slice) -> Tensor:
        return sample(
            lambda x, t, y: torch.sin(3 * x) + t.mean(dim=1)[:, None, None, None],
            noise[rows],
            LABELS.expand(3)[rows],
            clock=SemanticFirst(0.3),
            groups=PAIR,
            solver=solver,  # type: ignore[arg-type]
            steps=6,
            step_noise=lambda i: shake[i, rows],
        )

    assert torch.equal(run(slice(0, 3))[1:2], run(slice(1, 2)))


def test_dopri5_can_be_freed_from_the_batch() -> None:
    noise = torch.randn(3, 1, 2, 2) * torch.tensor([0.1, 1.0, 30.0]).view(3, 1, 1, 1)

    def run(rows: slice, per_image: bool) -> Tensor:
        return sample(
            lambda x, t, y: torch.sin(5 * x),
            noise[rows],
            LABELS.expand(3)[rows],
            clock=Synchronous(1),
            groups=ONE,
            solver="dopri5",
            per_image=per_image,
        )

    assert torch.equal(run(slice(0, 3), True)[1:2], run(slice(1, 2), True))
    assert not torch.equal(run(slice(0, 3), False)[1:2], run(slice(1, 2), False))


def test_bad_requests_are_refused() -> None:
    for options, message in (
        ({"solver": "rk4"}, "solver must be one of"),
        ({"steps": 0}, "at least 1 step"),
        ({"steps": 1, "steps_are_points": True}, "at least 1 step"),
        ({"solver": "sde"}, "step_noise"),
        ({"groups": PAIR}, "must agree"),
    ):
        arguments = {"clock": Synchronous(1), "groups": ONE, "steps": 2} | options
        with pytest.raises(ValueError, match=message):
            sample(growth, torch.ones(1, 1, 1, 1), LABELS, **arguments)  # type: ignore[arg-type]
