"""One image through a tokenizer: its reconstruction, where that errs, and the latents by channel."""

from __future__ import annotations

import numpy as np

from tasks.drawing.latents import Reconstructed, reconstruct
from tasks.networks import build_autoencoder
from tests.helpers import builders


def test_the_posterior_mean_is_decoded_and_held_against_the_image() -> None:
    recipe = builders.small_recipe()
    network = build_autoencoder(recipe.train_vavae.model).requires_grad_(False).eval()
    image = builders.drawing(1, np.random.default_rng(0), side=32)
    found = reconstruct(network, image)
    assert found.again.shape == image.shape and found.latents.shape == (8, recipe.latent_size, recipe.latent_size)
    assert np.array_equal(found.again, reconstruct(network, image).again)
    same = Reconstructed(image, image, found.latents)
    assert same.psnr > 50 and not same.error.any()
    assert found.psnr < same.psnr and found.error.any(), "random weights reconstruct nothing"


def test_errors_are_four_times_as_large_and_channels_fill_their_range() -> None:
    dark, light = np.full((2, 2, 3), 10, np.uint8), np.full((2, 2, 3), 20, np.uint8)
    latents = np.stack([np.arange(4.0).reshape(2, 2), np.full((2, 2), 7.0)]).astype(np.float32)
    found = Reconstructed(dark, light, latents)
    assert (found.error == 40).all() and (Reconstructed(light, dark, latents).error == 40).all()
    assert (Reconstructed(dark, dark + 100, latents).error == 255).all(), "cut, not wrapped"
    tiles = found.channels(2)
    assert tiles.shape == (64, 130, 3) and tiles[0, 0, 0] == 0 and tiles[63, 63, 0] == 255
    assert (tiles[:, 66:] == 0).all(), "a channel of one value is black"
