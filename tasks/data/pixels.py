"""Pixels as networks see them and as people do: [-1, 1] and the levels 0 to 255 (papers.md 1.1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.uint8]


def to_tensor(images_BHW3: Any, device: torch.device | None = None) -> Tensor:
    """Levels 0 to 255 → [-1, 1].

    images_BHW3: uint8 or float32 (B, H, W, 3), numpy or torch. Comes back as float32 (B, 3, H, W), channels side by
        side in memory.
    device: where to; None leaves it where it is. From page-locked memory the copy is not waited for.
    """
    if isinstance(images_BHW3, np.ndarray):
        images_BHW3 = torch.from_numpy(np.require(images_BHW3, requirements=["C", "W"]))
    pixels: Tensor = images_BHW3 if device is None else images_BHW3.to(device, non_blocking=True)
    return pixels.permute(0, 3, 1, 2).to(torch.float32, copy=True).div_(127.5).sub_(1.0)


def to_levels(images_B3HW: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] → uint8 (B, H, W, 3): 127.5 x + 128, clamped and truncated."""
    levels = (127.5 * images_B3HW.float() + 128.0).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()


def to_pixels(images_B3HW: Tensor) -> Pixels:
    """The levels of :func:`to_levels` on the host."""
    return to_levels(images_B3HW).cpu().numpy()


def peak_signal_to_noise(one_BHW3: Pixels, other_BHW3: Pixels) -> NDArray[np.float64]:
    """PSNR in dB of each pair of uint8 images, (B,); equal images count as half a level apart."""
    gap = one_BHW3.astype(np.float64) - other_BHW3
    return 10.0 * np.log10(255.0**2 / np.maximum(np.square(gap).mean(axis=(1, 2, 3)), 0.25))
