"""An autoencoder on large images: as many at once as take a batch's memory at 256 × 256 pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from models.image_autoencoder import ImageAutoencoder
from models.posterior import DiagonalGaussian
from tasks.data.portions import at_once


def encoded(tokenizer: ImageAutoencoder, images_B3HW: Tensor) -> DiagonalGaussian:
    """Posteriors (B, C, h, w) of images in [-1, 1]."""
    pieces = images_B3HW.split(at_once(len(images_B3HW), images_B3HW.shape[-1]))
    return DiagonalGaussian(torch.cat([tokenizer.encode(piece).moments for piece in pieces]))


def decoded(tokenizer: ImageAutoencoder, latents_BChw: Tensor) -> Tensor:
    """Images (B, 3, H, W), nominally in [-1, 1] and not clamped."""
    pieces = latents_BChw.split(at_once(len(latents_BChw), latents_BChw.shape[-1] * tokenizer.downscale))
    return torch.cat([tokenizer.decode(piece) for piece in pieces])
