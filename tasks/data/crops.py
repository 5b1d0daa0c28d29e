"""Squares of images: how an image is scaled before, and where the square is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

Scaling = Literal["adm", "bicubic", "bilinear", "opencv"]
"""How the shorter side gets its length. `adm`: halved with a box filter while that leaves enough,
then bicubic (papers.md 1.1). `bicubic` and `bilinear`: torchvision's Resize, of a Pillow image, and
of a tensor, which leaves values between levels. `opencv`: of each pixel's two neighbours a side
alone, without smoothing, as albumentations does unless told."""


@dataclass(frozen=True)
class Crop:
    """A square of an image."""

    size: int
    """Its side in pixels."""
    scaling: Scaling = "adm"
    shorter: int | None = None
    """Pixels of the image's shorter side before the square is cut; None takes `size`."""
    random: bool = False
    """Whether training cuts it anywhere instead of from the centre (see `place`)."""

    @property
    def centred(self) -> Crop:
        """The same from the centre."""
        return replace(self, random=False)

    @property
    def dtype(self) -> str:
        return "float32" if self.scaling == "bilinear" else "uint8"

    def __call__(self, image: Image.Image, place: tuple[float, float] | None = None) -> np.ndarray:
        """Levels 0 to 255, (size, size, 3); float32, and between the levels, where scaling is
        `bilinear`, else uint8.

        place: how far from left and top the square lies, in [0, 1); None is the centre.
        """
        scaled = _SCALED[self.scaling](image, self.shorter or self.size)
        height, width = scaled.shape[:2]
        left = self._offset(width, place and place[0])
        top = self._offset(height, place and place[1])
        return scaled[top : top + self.size, left : left + self.size]

    def _offset(self, length: int, place: float | None) -> int:
        over = length - self.size
        if place is not None:
            return int((over + 1) * place)
        # torchvision's centre is half a pixel off another way where the rest is odd
        return over // 2 if self.scaling in ("adm", "opencv") else round(over / 2)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The ADM centre crop: uint8 (size, size, 3). Smaller images are scaled up."""
    return Crop(size)(image)


def adm_scaled(image: Image.Image, size: int) -> Image.Image:
    """The shorter side becomes `size`: halved with a box filter while there is enough, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image.resize(_rounded(image, size), Image.Resampling.BICUBIC)


def _rounded(image: Image.Image, shorter: int) -> tuple[int, int]:
    scale = shorter / min(image.size)
    return max(shorter, round(image.width * scale)), max(shorter, round(image.height * scale))


def _cut_off(image: Image.Image, shorter: int) -> tuple[int, int]:
    """As torchvision has it: what is left of a pixel does not count."""
    longer = int(shorter * max(image.size) / min(image.size))
    return (shorter, longer) if image.width <= image.height else (longer, shorter)


def _adm(image: Image.Image, shorter: int) -> np.ndarray:
    return np.asarray(adm_scaled(image, shorter), np.uint8)


def _bicubic(image: Image.Image, shorter: int) -> np.ndarray:
    return np.asarray(image.resize(_cut_off(image, shorter), Image.Resampling.BICUBIC), np.uint8)


def _bilinear(image: Image.Image, shorter: int) -> np.ndarray:
    shape, levels = _cut_off(image, shorter), np.asarray(image, np.float32)
    channels = (Image.fromarray(np.ascontiguousarray(levels[..., channel])) for channel in range(3))
    scaled = [np.asarray(each.resize(shape, Image.Resampling.BILINEAR)) for each in channels]
    return np.stack(scaled, axis=-1)


def _opencv(image: Image.Image, shorter: int) -> np.ndarray:
    width, height = _rounded(image, shorter)
    levels = np.asarray(image, np.uint8)
    if image.size == (width, height):
        return levels
    above, below, share = _neighbours(image.height, height)
    rows = levels[above] * (1 - share)[:, None, None] + levels[below] * share[:, None, None]
    left, right, share = _neighbours(image.width, width)
    both = rows[:, left] * (1 - share)[:, None] + rows[:, right] * share[:, None]
    return np.rint(both).astype(np.uint8)


def _neighbours(count: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `wanted` pixels the two of `count` that it lies between, and how near the second."""
    centres = (np.arange(wanted) + 0.5) * (count / wanted) - 0.5
    first = np.floor(centres).astype(int)
    share = (centres - first).astype(np.float32)
    return first.clip(0), (first + 1).clip(max=count - 1), share


_SCALED: dict[Scaling, Callable[[Image.Image, int], np.ndarray]] = {
    "adm": _adm,
    "bicubic": _bicubic,
    "bilinear": _bilinear,
    "opencv": _opencv,
}
