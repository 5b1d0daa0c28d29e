"""Denoising in pixels as Karras et al. 2022 (EDM) do it: preconditioning, noise levels, loss weights, Heun's steps.

A noise level sigma is told as the time t = 1 / (1 + sigma), 0 for noise alone and 1 for data, so that a denoiser has
the (x, t, y) of everything else here and guidance acts on it as on a velocity: it is linear in the network's output.
Table and equation numbers below are that paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.groups import single_group
from models.guidance import moment
from models.multistep import MULTISTEP, MultistepSolver
from models.objectives import LossTerms

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
SOLVERS = ("euler", "heun", "dpmpp_2m", "unipc")


def time_of(sigma: Tensor) -> Tensor:
    """t in (0, 1] of a noise level."""
    return 1 / (1 + sigma)


def sigma_of(t: Tensor) -> Tensor:
    """The noise level of a time; the inverse of `time_of`."""
    return 1 / t - 1


@dataclass(frozen=True)
class Preconditioning:
    """How a network of unit-variance input and output becomes a denoiser (table 1, column EDM)."""

    sigma_data: float = 0.5

    def __call__(self, network: Callable[[Tensor, Tensor], Tensor], x_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        """D(x; sigma) in float32 of images (B, C, H, W) with noise of deviation sigma_B.

        network: (scaled x, noise label (B,)) -> raw output of the shape of x.
        """
        sigma, data = sigma_B.float().view(-1, 1, 1, 1), self.sigma_data
        total = (sigma.square() + data**2).sqrt()
        raw = network(x_BCHW / total, sigma_B.float().log() / 4)
        return (data / total).square() * x_BCHW + sigma * data / total * raw.float()


@dataclass(frozen=True)
class DenoisingMatching:
    """The objective: squared error of the denoised image, weighted so that every level's gradient is alike (eq. 5, 8).

    mean, std: of the logarithm of training's noise levels.
    """

    sigma_data: float = 0.5
    mean: float = -1.2
    std: float = 1.2

    def sigmas(self, u_B: Tensor) -> Tensor:
        """Noise levels (B,) from uniform numbers in (0, 1)."""
        return (self.mean + self.std * torch.special.ndtri(u_B.float())).exp()

    def loss(
        self,
        model: Denoiser | nn.Module,
        x1_BCHW: Tensor,
        y_B: Tensor,
        noise_BCHW: Tensor,
        u_B: Tensor,
        align_target_BChw: Tensor | None = None,
        images_seen: int = 0,
    ) -> LossTerms:
        """As `VelocityMatching.loss`; without alignment, and levels are drawn alike from first to last."""
        sigma_B = self.sigmas(u_B)
        sigma, t_B1 = sigma_B.view(-1, 1, 1, 1), time_of(sigma_B)[:, None]
        denoised = model(x1_BCHW + sigma * noise_BCHW, t_B1, y_B)
        weight_B = (sigma_B.square() + self.sigma_data**2) / (sigma_B * self.sigma_data).square()
        error_B = weight_B * (denoised.float() - x1_BCHW).square().flatten(1).mean(dim=1)
        by_time = torch.stack([t_B1[:, 0], error_B.detach()])
        return LossTerms({"denoising": error_B.mean()}, {"denoising": 1.0}, {"by_time/pixels": by_time})


def sigma_grid(steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """steps + 1 noise levels from `high` to `low` and then 0, float64 (eq. 5 of the sampler's table)."""
    if steps < 2:
        raise ValueError(f"the noise levels need at least 2 steps, found {steps}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


@torch.no_grad()
def sample(denoiser: Denoiser, noise_BCHW: Tensor, y_B: Tensor, sigmas: Tensor, *, solver: str = "heun") -> Tensor:
    """Images (B, C, H, W) from standard normal noise along `sigmas`, without new noise.

    denoiser: (x, t (B, 1), y) -> denoised images, guided or not.
    solver: "heun" corrects every step but the last by the slope at its end, 2 steps - 1 evaluations (algorithm 1,
        S_churn = 0); "euler", "dpmpp_2m" and "unipc" ask once for each step.
    Raises ValueError on any other solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"pixels are denoised by {', '.join(SOLVERS)}, found '{solver}'")

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        t_1 = time_of(sigma).to(x.dtype)[None]
        t_B1 = x.new_full((len(x), 1), t_1.item())
        return moment(denoiser, t_1)(x, t_B1, y_B).to(x.dtype)

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - denoised(x, sigma)) / sigma.to(x.dtype)

    levels = sigmas.cpu()  # known to the host, which then never waits for the device
    x = noise_BCHW * levels[0].to(noise_BCHW.dtype)
    if solver in MULTISTEP:
        steps = MultistepSolver(solver, single_group(x.shape[1]))
        for now, after in pairwise(levels.tolist()):
            data = denoised(x, torch.tensor(now, dtype=levels.dtype))
            x = steps.step(x, data, [(1.0, now)], [(1.0, after)])
        return x
    for now, after in pairwise(levels):
        step = (after - now).to(x.dtype)
        first = slope(x, now)
        ahead = x + step * first
        to_data = bool(after == 0)
        x = ahead if to_data or solver == "euler" else x + step * 0.5 * (first + slope(ahead, after))
    return x
