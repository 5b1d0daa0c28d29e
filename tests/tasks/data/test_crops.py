"""Squares of images are those of the codes that the papers' authors used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tasks.data.crops import Crop, Scaling
from tests.helpers.piles import picture


def interpolated(image: Image.Image, shape: tuple[int, int], smoothed: bool) -> np.ndarray:
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    found = F.interpolate(levels, size=shape, mode="bilinear", align_corners=False, antialias=smoothed)
    return found[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("scaling", ["adm", "bicubic", "bilinear", "opencv"])
@pytest.mark.parametrize("shape", [(32, 32), (90, 45), (33, 70), (20, 31), (40, 1)])
def test_squares_have_the_asked_size(scaling: Scaling, shape: tuple[int, int]) -> None:
    crop = Crop(24, scaling, shorter=32)
    for place in (None, (0.0, 0.999), (0.5, 0.5)):
        cut = crop(picture(2, *shape), place)
        assert cut.shape == (24, 24, 3) and cut.dtype == crop.dtype


def test_random_squares_are_of_images_scaled_as_opencv_does() -> None:
    """Bilinear between neighbours, without smoothing; the length of the longer side is rounded."""
    image = picture(3, 150, 100)
    whole = interpolated(image, (32, 48), smoothed=False)
    crop = Crop(32, "opencv", random=True)
    for place, left in ((None, 8), ((0.0, 0.0), 0), ((0.999, 0.3), 16), ((0.5, 0.0), 8)):
        found = crop(image, place).astype(float)
        assert np.abs(found - whole[:, left : left + 32]).max() <= 0.501, "the nearest level"
    lefts = {int((48 - 32 + 1) * x) for x in np.linspace(0, 0.9999, 200)}
    assert lefts == set(range(17)), "every place there is"


def test_a_tokenizers_images_are_scaled_as_torchvision_scales_tensors() -> None:
    """Smoothed, and not rounded to levels; what is left of a pixel of the longer side is cut off."""
    image = picture(4, 100, 151)
    whole = interpolated(image, (int(32 * 151 / 100), 32), smoothed=True)
    top = round((whole.shape[0] - 32) / 2)
    found = Crop(32, "bilinear")(image)
    np.testing.assert_allclose(found, whole[top : top + 32], atol=0.02)
    assert (found != np.rint(found)).mean() > 0.9


def test_features_of_the_semantic_vae_see_less_than_the_shorter_side() -> None:
    image = picture(5, 300, 200)
    scaled = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(Crop(28, "bicubic", shorter=32)(image), scaled[2:30, 10:38])
