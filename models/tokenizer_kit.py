"""Whether a tokenizer keeps its contract: what is tried, and what came of it, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.foundation import FoundationModel
from models.image_autoencoder import ImageAutoencoder

_BATCH = 4
_FAR = 3.0
"""Decoded values beyond this are no image in [-1, 1]; a tokenizer that is not trained stays below."""
_CLOSE = 1e-3
"""Share of the latents' spread by which an image's latent may depend on its batch."""


@dataclass(frozen=True)
class Finding:
    """One promise of the contract."""

    promise: str
    kept: bool
    seen: str


def pictures(side: int, count: int = _BATCH) -> Tensor:
    """Smooth coloured fields (count, 3, side, side) in [-1, 1], no two alike; the same every time."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    return smooth.clamp(-1, 1)


@torch.no_grad()
def try_out(network: ImageAutoencoder, side: int, images_BCHW: Tensor | None = None) -> list[Finding]:
    """All findings on images of side × side pixels; `images_BCHW` (at least two) in place of drawn ones.

    A promise that rests on a broken one is not tried. The network is on the CPU, in eval mode, with its weights.
    """
    images, found = pictures(side) if images_BCHW is None else images_BCHW, list[Finding]()
    for finding in _findings(network, images):
        found.append(finding)
        if not finding.kept and finding.promise in ("latents", "images"):
            break
    return found


@torch.no_grad()
def features_vary(model: FoundationModel, side: int) -> tuple[float, float]:
    """How much features of drawn pictures of side × side pixels vary over images and over cells: standard deviations
    over the features' own size. 0 is a network that sees nothing, as one without its weights."""
    device = next(model.parameters()).device
    features = model(pictures(side).to(device)).float()
    size = float(features.square().mean().sqrt()) or 1.0
    return float(features.std(dim=0).mean()) / size, float(features.flatten(2).std(dim=2).mean()) / size


def _findings(network: ImageAutoencoder, images: Tensor) -> Iterator[Finding]:
    cells = images.shape[-1] // network.downscale
    wanted = (len(images), network.embed_dim, cells, cells)
    latents, said = _tried(lambda: network.encode(images).mean)
    yield _shaped("latents", latents, wanted, said)
    assert latents is not None
    again, said = _tried(lambda: network.decode(latents))
    yield _shaped("images", again, tuple(images.shape), said)
    assert again is not None
    farthest = float(again.abs().max())
    yield Finding("range", farthest <= _FAR, f"decoded values up to {farthest:.2f}; images are in [-1, 1]")
    same = torch.equal(network.encode(images).mean, latents) and torch.equal(network.decode(latents), again)
    yield Finding("determinism", same, "the same twice" if same else "another result the second time")
    spread = float(latents.std()) or 1.0
    apart = max(float((network.encode(images[:1]).mean - latents[:1]).abs().max()) / spread, 0.0)
    alone = float((network.decode(latents[:1]) - again[:1]).abs().max())
    worst = max(apart, alone)
    yield Finding("batch independence", worst <= _CLOSE, f"an image alone differs by {worst:.1e} from in its batch")
    least = float(latents.flatten(1).std(dim=0).max())
    yield Finding("latents vary", least > 0, f"over images by a standard deviation of up to {least:.2e}")
    own = float((again - images).square().mean())
    other = float((again.roll(1, dims=0) - images).square().mean())
    yield Finding("round trip", own < other, f"squared error {own:.3f} to its own image and {other:.3f} to another's")


def _tried(work: Callable[[], Tensor]) -> tuple[Tensor | None, str]:
    try:
        return work(), ""
    except Exception as error:  # whatever somebody's own code raises
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _shaped(promise: str, found: Tensor | None, wanted: tuple[int, ...], said: str) -> Finding:
    if not isinstance(found, Tensor):
        return Finding(promise, False, said or f"expected a tensor, found {type(found).__name__}")
    if tuple(found.shape) != wanted:
        return Finding(promise, False, f"of shape {tuple(found.shape)}, expected {wanted}")
    if not found.dtype.is_floating_point or not bool(torch.isfinite(found).all()):
        return Finding(promise, False, f"{str(found.dtype).removeprefix('torch.')} values that are not all finite")
    return Finding(promise, True, f"of shape {tuple(found.shape)}, finite")
