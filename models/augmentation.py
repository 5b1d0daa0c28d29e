"""Augmentation that does not leak into samples: what was done to an image is told to the network, which is then asked
for images to which nothing was done (Karras et al. 2020, "Training GANs with limited data"; Karras et al. 2022, EDM,
appendix F.2, whose kinds, strengths and labels these are).

Images are resampled bilinearly from reflected borders in one go; EDM filters with wavelets on a grid twice as fine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 13
"""Random numbers of an image."""
_UNIFORM = 9
"""How many of them become uniform."""
_SCALE, _SQUEEZE = 0.2, 0.2
"""Standard deviations of the logarithm, to base 2, of the scale and of the squeeze along one axis."""
_SHIFT = 0.125
"""Of the shift, in widths of the image."""


@dataclass(frozen=True)
class Augmentation:
    """Each kind with this probability, but a horizontal flip, which happens to every second image."""

    probability: float

    def __call__(self, images_BCHW: Tensor, draws_BK: Tensor) -> tuple[Tensor, Tensor]:
        """(images (B, C, side, side) float32, labels (B, 9) float32, all zero where nothing was done).

        draws_BK: standard normal, float32 (B, 13), the images' own numbers.
        """
        uniform_BK, normal_BK = torch.special.ndtr(draws_BK[:, :_UNIFORM]), draws_BK[:, _UNIFORM:]
        happens = (uniform_BK[:, :5] < self.probability).float()
        mirrored = (uniform_BK[:, 5] < 0.5).float()
        upended = happens[:, 0] * (uniform_BK[:, 6] < 0.5).float()
        scale = happens[:, 1] * normal_BK[:, 0]
        angle = happens[:, 2] * (2 * uniform_BK[:, 7] - 1) * math.pi
        squeeze, along = happens[:, 3] * normal_BK[:, 1], (2 * uniform_BK[:, 8] - 1) * math.pi
        shift_B2 = happens[:, 4, None] * normal_BK[:, 2:]
        labels = [mirrored, upended, scale, angle.cos() - 1, angle.sin(), squeeze * along.cos(), squeeze * along.sin()]
        labels_BA = torch.cat([torch.stack(labels, dim=1), shift_B2], dim=1)

        flipped = torch.where(mirrored.view(-1, 1, 1, 1) > 0, images_BCHW.flip(3), images_BCHW)
        flipped = torch.where(upended.view(-1, 1, 1, 1) > 0, flipped.flip(2), flipped)
        # From a place in the result to the place in the image that it shows: the inverse of what is done, last first.
        pull = _turn(-along) @ _stretch(-_SQUEEZE * squeeze, _SQUEEZE * squeeze) @ _turn(along)
        pull = _stretch(-_SCALE * scale, -_SCALE * scale) @ _turn(-angle) @ pull
        moved = -(pull @ (2 * _SHIFT * shift_B2)[..., None])  # sides are 2 long
        grid = F.affine_grid(torch.cat([pull, moved], dim=2), list(flipped.shape), align_corners=False)
        resampled = F.grid_sample(flipped, grid, padding_mode="reflection", align_corners=False)
        untouched = (happens[:, 1:] == 0).all(dim=1).view(-1, 1, 1, 1)
        return torch.where(untouched, flipped, resampled), labels_BA


def _turn(angle_B: Tensor) -> Tensor:
    """(B, 2, 2)"""
    cos, sin = angle_B.cos(), angle_B.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)


def _stretch(x_B: Tensor, y_B: Tensor) -> Tensor:
    """(B, 2, 2), by powers of two."""
    return torch.diag_embed(torch.stack([x_B, y_B], dim=1).exp2())
