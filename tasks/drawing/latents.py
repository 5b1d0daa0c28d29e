"""What a tokenizer makes of an image: the image again, where it errs, its latents by channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from infra.device import computing
from models.image_autoencoder import ImageAutoencoder
from tasks.data.pixels import Pixels, peak_signal_to_noise, to_pixels, to_tensor
from tasks.drawing import pictures

ERROR_TIMES = 4
"""Errors are shown so many times as large."""


@dataclass(frozen=True)
class Reconstructed:
    """One image and what came of it."""

    original: Pixels
    """(H, W, 3)"""
    again: Pixels
    """The decoded posterior mean, (H, W, 3)."""
    latents: NDArray[np.float32]
    """The posterior mean, (C, h, w)."""

    @property
    def psnr(self) -> float:
        """In dB."""
        return float(peak_signal_to_noise(self.original[None], self.again[None])[0])

    @property
    def error(self) -> Pixels:
        """Absolute error, :data:`ERROR_TIMES` as large, (H, W, 3)."""
        gap = np.abs(self.original.astype(np.int16) - self.again)
        return (ERROR_TIMES * gap).clip(0, 255).astype(np.uint8)

    def channels(self, columns: int) -> Pixels:
        """A tile for each channel, black at its least and white at its greatest value."""
        low, high = (each(self.latents, axis=(1, 2), keepdims=True) for each in (np.min, np.max))
        levels = 255 * (self.latents - low) / np.maximum(high - low, 1e-8)
        return pictures.grid(levels.astype(np.uint8)[..., None].repeat(3, axis=3), columns)


@torch.inference_mode()
def reconstruct(network: ImageAutoencoder, image_HW3: Pixels) -> Reconstructed:
    """By a frozen tokenizer, on its device, in this process."""
    device = next((each.device for each in network.parameters()), torch.device("cpu"))
    with computing("fp32", device):
        mean = network.encode(to_tensor(image_HW3[None], device)).mean
        return Reconstructed(image_HW3, to_pixels(network.decode(mean))[0], mean[0].float().cpu().numpy())
