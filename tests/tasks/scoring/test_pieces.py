"""Large images go through an autoencoder a few at a time, wherever stages look at them, and with the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.image_autoencoder import ImageAutoencoder, certain
from models.posterior import DiagonalGaussian
from tasks.data.portions import at_once
from tasks.data.statistics import LatentStatistics
from tasks.sampling.sampler import Decoder
from tasks.scoring.pieces import decoded, encoded


class Averages(ImageAutoencoder):
    """Latents are means of 64 × 64 pixels; remembers how many images came at once."""

    downscale, embed_dim = 64, 3

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def encode(self, x_BCHW: Tensor) -> DiagonalGaussian:
        self.seen.append(len(x_BCHW))
        return certain(F.avg_pool2d(x_BCHW, 64))

    def decode(self, z_BCHW: Tensor) -> Tensor:
        self.seen.append(len(z_BCHW))
        return F.interpolate(z_BCHW, scale_factor=64.0)


@pytest.mark.parametrize(
    ("images", "side", "most"), [(64, 32, 64), (64, 256, 64), (32, 512, 8), (64, 512, 16), (2, 1024, 1)]
)
def test_memory_is_that_of_a_batch_of_256_pixels(images: int, side: int, most: int) -> None:
    assert at_once(images, side) == most


@pytest.mark.parametrize(("side", "pieces"), [(256, [6]), (512, [1] * 6)])
def test_pieces_give_what_the_batch_gives(side: int, pieces: list[int]) -> None:
    tokenizer, images = Averages(), torch.rand(6, 3, side, side)
    z = encoded(tokenizer, images).mean
    assert torch.equal(z, F.avg_pool2d(images, 64))
    assert torch.equal(decoded(tokenizer, z), F.interpolate(z, scale_factor=64.0))
    assert tokenizer.seen == 2 * pieces


def test_a_sample_is_decoded_eight_at_once_at_512_pixels() -> None:
    statistics: dict[str, Any] = {"z": {"mean": [0.0] * 3, "std": [1.0] * 3, "count": 1}}
    tokenizer = Averages()
    pixels = Decoder(tokenizer, LatentStatistics(statistics))(torch.zeros(16, 3, 8, 8))
    assert pixels.shape == (16, 512, 512, 3) and tokenizer.seen == [8, 8]
    tokenizer.seen.clear()
    Decoder(tokenizer, LatentStatistics(statistics))(torch.zeros(64, 3, 4, 4))
    assert tokenizer.seen == [32, 32]
