"""What every tokenizer of images is to the rest: ours, those of diffusers, those of one's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.posterior import LOGVAR_RANGE, DiagonalGaussian


class ImageAutoencoder(nn.Module):
    """Images in [-1, 1] to a latent posterior and back."""

    downscale: int
    """Pixels of a latent's cell along a side."""
    embed_dim: int
    """Channels of its latents."""

    def encode(self, x_BCHW: Tensor) -> DiagonalGaussian:
        """Posterior over (B, embed_dim, H / downscale, W / downscale) of images in [-1, 1]."""
        raise NotImplementedError

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Images, nominally in [-1, 1] and not clamped, from latents in the encoder's own scale."""
        raise NotImplementedError

    def forward(self, x_BCHW: Tensor, noise: Tensor | None = None) -> tuple[Tensor, DiagonalGaussian, Tensor]:
        """(reconstruction, posterior, latent); the latent is the posterior mean when no noise is given."""
        posterior = self.encode(x_BCHW)
        z = posterior.mean if noise is None else posterior.sample(noise)
        return self.decode(z), posterior, z

    @property
    def kept(self) -> nn.Module:
        """The module whose tensors, by their published names, an artifact keeps."""
        return self

    @property
    def decoding(self) -> list[nn.Parameter]:
        """All weights that only decoding uses."""
        raise NotImplementedError

    @property
    def last_encoder_weight(self) -> Tensor:
        """The weight whose gradients balance the alignment loss (papers.md 1.2)."""
        raise NotImplementedError

    @property
    def last_decoder_weight(self) -> Tensor:
        """The weight whose gradients balance the adversarial loss (papers.md 1.2)."""
        raise NotImplementedError


def certain(latent_BCHW: Tensor) -> DiagonalGaussian:
    """A posterior as sharp as it can be around latents of an encoder that has none."""
    return DiagonalGaussian(torch.cat([latent_BCHW, torch.full_like(latent_BCHW, LOGVAR_RANGE[0])], dim=1))
