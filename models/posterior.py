"""The diagonal Gaussian both autoencoders encode to."""

from __future__ import annotations

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)


class DiagonalGaussian:
    """Posterior over latents from moments_B2CHW: mean in the first half of the channels, log-variance in the
    second, clamped to [-30, 20] (papers.md 1.1, 2.2). Raises ValueError on an odd number of channels.
    """

    def __init__(self, moments_B2CHW: Tensor) -> None:
        if moments_B2CHW.shape[1] % 2:
            raise ValueError(
                f"moments need an even number of channels (mean and log-variance), found {moments_B2CHW.shape[1]}"
            )
        self.moments = moments_B2CHW
        self.mean, logvar = moments_B2CHW.chunk(2, dim=1)
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    @property
    def std(self) -> Tensor:
        """Standard deviation, shape and dtype of the mean."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise. The noise, or the generator it is drawn from, is the caller's: random numbers
        belong to images, not to networks. Raises ValueError when neither is given.
        """
        if noise is None:
            if generator is None:
                raise ValueError("a posterior sample needs `noise` (shape of the mean) or a `generator`")
            noise = torch.randn(
                self.mean.shape, generator=generator, device=generator.device, dtype=self.mean.dtype
            ).to(self.mean.device)
        return self.mean + self.std * noise.to(self.mean.dtype)

    def kl(self) -> Tensor:
        """KL divergence to the standard normal, (B,), in nats, summed over channels and cells."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)
