"""The contract of a tokenizer: each promise is broken once, and found."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.image_autoencoder import ImageAutoencoder, certain
from models.posterior import DiagonalGaussian
from models.tokenizer_kit import Finding, pictures, try_out


class Blocks(ImageAutoencoder):
    """Means of 4 × 4 pixels: a tokenizer without weights that keeps every promise."""

    downscale, embed_dim = 4, 3

    def encode(self, x_BCHW: Tensor) -> DiagonalGaussian:
        return certain(F.avg_pool2d(x_BCHW, 4))

    def decode(self, z_BCHW: Tensor) -> Tensor:
        return F.interpolate(z_BCHW, scale_factor=4.0)


def broken(**methods: Callable[..., object]) -> list[Finding]:
    return [each for each in try_out(type("Broken", (Blocks,), methods)(), 16) if not each.kept]


def test_a_tokenizer_that_keeps_all_promises() -> None:
    found = try_out(Blocks(), 16)
    assert all(each.kept for each in found) and len(found) == 7
    assert len({each.promise for each in found}) == 7
    assert all(each.kept for each in try_out(Blocks(), 32, pictures(32, 2)))


def _raises(self: Blocks, z_BCHW: Tensor) -> Tensor:
    raise RuntimeError("no\nweights")


_calls = count()


@pytest.mark.parametrize(
    ("methods", "promise", "said"),
    [
        ({"encode": lambda self, x: certain(F.avg_pool2d(x, 8))}, "latents", "(4, 3, 2, 2), expected (4, 3, 4, 4)"),
        ({"decode": _raises}, "images", "RuntimeError: no weights"),
        ({"decode": lambda self, z: Blocks.decode(self, z) * torch.nan}, "images", "not all finite"),
        ({"decode": lambda self, z: 200 * Blocks.decode(self, z)}, "range", "images are in [-1, 1]"),
        (
            {"decode": lambda self, z: Blocks.decode(self, z) + 0.01 * next(_calls)},
            "determinism",
            "another result the second time",
        ),
        (
            {"encode": lambda self, x: certain(F.avg_pool2d(x - x.mean(dim=0, keepdim=True), 4))},
            "batch independence",
            "an image alone differs by",
        ),
        ({"encode": lambda self, x: certain(torch.zeros_like(F.avg_pool2d(x, 4)))}, "latents vary", "deviation"),
        ({"decode": lambda self, z: -Blocks.decode(self, z)}, "round trip", "squared error"),
    ],
    ids=lambda value: value if isinstance(value, str) and " of" not in value else "",
)  # fmt: skip
def test_every_broken_promise_is_found(methods: dict[str, Callable[..., object]], promise: str, said: str) -> None:
    found = broken(**methods)
    assert promise in [each.promise for each in found]
    assert any(said in each.seen and "\n" not in each.seen for each in found if each.promise == promise)
