"""Encoding and decoding of images too large for a device, tile by tile.

Tiles overlap and are blended with linear ramps. Attention and group norms look at a whole tile where they would look
at a whole image, so the result is not exactly that of one pass; ramps keep what differs from showing as a seam
(docs/tokenizers.md has the measure and its bound). A network without them is reproduced exactly once the overlap
covers its receptive field. (Our choice; papers.md 5, issues 24 and 86, recommend tiling without saying how.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from models.autoencoder import AutoencoderKL
from models.posterior import DiagonalGaussian


def tiled_encode(model: AutoencoderKL, images_BCHW: Tensor, tile: int = 256, overlap: int = 64) -> DiagonalGaussian:
    """Posterior of images of any size, as `AutoencoderKL.encode` gives it; means and log-variances are blended.

    tile, overlap: in pixels, multiples of the downscale factor; neighbours share `overlap`.
    Raises ValueError when a size does not fit.
    """
    factor = model.downscale
    _check(images_BCHW.shape, tile, overlap, factor, "pixels")
    return DiagonalGaussian(_blended(lambda part: model.encode(part).moments, images_BCHW, tile, overlap, 1, factor))


def tiled_decode(model: AutoencoderKL, latents_BCHW: Tensor, tile: int = 16, overlap: int = 4) -> Tensor:
    """Images from latents of any size, as `AutoencoderKL.decode` gives them.

    tile, overlap: in cells.
    Raises ValueError when a size does not fit.
    """
    _check(latents_BCHW.shape, tile, overlap, 1, "cells")
    return _blended(model.decode, latents_BCHW, tile, overlap, model.downscale, 1)


def seam_error(tiled_BCHW: Tensor, whole_BCHW: Tensor, tile: int, overlap: int) -> float:
    """How much a tile's edge shows: by how much steps between neighbouring pixels differ from those of one pass, on
    average along the worst edge, beyond what they differ by along a usual line (the median), in the images' range.

    tile, overlap: of the decoding, in pixels.
    """
    worst = 0.0
    for dim in (-2, -1):
        steps = (tiled_BCHW.diff(dim=dim) - whole_BCHW.diff(dim=dim)).abs()
        lines = steps.movedim(dim, 0).flatten(1).mean(dim=1)
        for start in _starts(whole_BCHW.shape[dim], tile, overlap):
            edges = [edge for edge in (start - 1, start + tile - 1) if 0 <= edge < len(lines)]
            worst = max([worst, *(float(lines[edge] - lines.median()) for edge in edges)])
    return worst


def _blended(
    network: Callable[[Tensor], Tensor], x_BCHW: Tensor, tile: int, overlap: int, up: int, down: int
) -> Tensor:
    """The network tile by tile; `up` and `down` are output pixels per input pixel and the inverse."""
    total: Tensor | None = None
    weight: Tensor | None = None
    for rows, columns in _tiles(x_BCHW.shape[-2:], tile, overlap):
        found = network(x_BCHW[..., rows, columns])
        height, width = (side * up // down for side in x_BCHW.shape[-2:])
        if total is None or weight is None:
            total = found.new_zeros(*found.shape[:2], height, width)
            weight = found.new_zeros(height, width)
        there = tuple(slice(part.start * up // down, part.stop * up // down) for part in (rows, columns))
        ramps = [
            _ramp(part, side, overlap * up // down).to(found) for part, side in zip(there, (height, width), strict=True)
        ]
        mask = ramps[0][:, None] * ramps[1][None, :]
        total[..., there[0], there[1]] += found * mask
        weight[there[0], there[1]] += mask
    assert total is not None and weight is not None  # there is always a tile
    return total / weight


def _tiles(sides: torch.Size, tile: int, overlap: int) -> Iterator[tuple[slice, slice]]:
    for top in _starts(sides[0], tile, overlap):
        for left in _starts(sides[1], tile, overlap):
            yield slice(top, min(top + tile, sides[0])), slice(left, min(left + tile, sides[1]))


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side; the last ends with the side."""
    if side <= tile:
        return [0]
    return [*range(0, side - tile, tile - overlap), side - tile]


def _ramp(part: slice, side: int, overlap: int) -> Tensor:
    """Weights of a tile along one side: 0 over the outer quarter of an overlap, where the tile's padding shows, then
    rising over the middle half; the image's own edges are whole.
    """
    weights = torch.ones(part.stop - part.start)
    middle = max(1, overlap - 2 * (overlap // 4))
    rise = ((torch.arange(overlap) - overlap // 4 + 0.5) / middle).clamp(0, 1)
    if part.start > 0:
        weights[:overlap] *= rise
    if part.stop < side:
        weights[len(weights) - overlap :] *= rise.flip(0)
    return weights


def _check(shape: torch.Size, tile: int, overlap: int, factor: int, unit: str) -> None:
    sides = {"tile": tile, "overlap": overlap, "image height": shape[-2], "image width": shape[-1]}
    wrong = [f"{name} {value}" for name, value in sides.items() if value % factor]
    if wrong:
        raise ValueError(f"tiled encoding needs multiples of {factor} {unit}, found {', '.join(wrong)}")
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap must be at least 0 and below tile, found {overlap} and {tile} {unit}")
