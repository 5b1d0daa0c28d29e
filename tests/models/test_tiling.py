"""Tiles: exact where a network sees no further than the overlap, without seams where it does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.autoencoder import AttnBlock, AutoencoderKL
from models.tiling import seam_error, tiled_decode, tiled_encode


def autoencoder(norms: bool) -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(
        base_channels=8,
        channel_multipliers=(1, 2),
        blocks_per_level=1,
        z_channels=4,
        attention_levels=(1,) if norms else (),
        norm_groups=4,
    )
    if not norms:  # and no attention: what is left is convolutions
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, (nn.GroupNorm, AttnBlock)):
                    setattr(module, name, nn.Identity())
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("sides", [(96, 64), (64, 88), (32, 32)])
def test_convolutions_are_reproduced(sides: tuple[int, int]) -> None:
    model = autoencoder(norms=False)
    images = torch.randn(2, 3, *sides)
    whole = model.encode(images)
    tiled = tiled_encode(model, images, tile=64, overlap=48)
    # All but the ramps' foot: a tile's outermost pixels weigh little there and know least.
    torch.testing.assert_close(tiled.mean, whole.mean, rtol=0, atol=2e-2)
    z = torch.randn(2, 4, sides[0] // 2, sides[1] // 2)
    torch.testing.assert_close(tiled_decode(model, z, tile=32, overlap=24), model.decode(z), rtol=0, atol=2e-2)


def test_an_image_within_one_tile_is_one_pass() -> None:
    model = autoencoder(norms=True)
    images = torch.randn(1, 3, 48, 32)
    assert torch.equal(tiled_encode(model, images, tile=48, overlap=16).moments, model.encode(images).moments)


def test_overlap_hides_the_edges() -> None:
    """An untrained network exaggerates them; docs/tokenizers.md states the bound for a trained one."""
    model = autoencoder(norms=True)
    torch.manual_seed(1)
    z = torch.randn(1, 4, 96, 96)
    whole = model.decode(z)
    blended, abutting = (tiled_decode(model, z, tile=32, overlap=overlap) for overlap in (8, 0))
    seen, bare = seam_error(blended, whole, tile=64, overlap=16), seam_error(abutting, whole, tile=64, overlap=0)
    assert seen < 0.5 * bare
    assert seam_error(whole, whole, tile=64, overlap=16) == 0.0
    drawn = whole.clone()
    drawn[..., 64:] += 1.0  # a step at one edge of tiles that abut
    assert seam_error(drawn, whole, tile=64, overlap=0) == pytest.approx(1.0, abs=1e-4)


def test_sizes_that_do_not_fit_are_refused() -> None:
    model = autoencoder(norms=True)
    with pytest.raises(ValueError, match="multiples of 2 pixels, found tile 33, image width 51"):
        tiled_encode(model, torch.zeros(1, 3, 64, 51), tile=33, overlap=8)
    with pytest.raises(ValueError, match="below tile"):
        tiled_decode(model, torch.zeros(1, 4, 64, 64), tile=16, overlap=16)
