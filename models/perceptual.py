"""How unlike two images look to a foundation model: LPIPS's distance without its calibration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.foundation import FoundationModel


class FeatureDistance:
    """Squared distance of the unit feature vectors of two batches of images, the mean over the
    cells of a layer, summed over layers, (B,) (Zhang et al. 2018, equation 1, with weights of 1).
    Gradients reach the second batch only.

    Not a module: it is no part of what is trained, saved or sharded. It follows the images' device.

    network: one of timm. layers: indices of its intermediate outputs. Raises ValueError where it
        has no such layer.
    """

    def __init__(self, network: FoundationModel, layers: tuple[int, ...]) -> None:
        levels = len(network.network.feature_info)
        if not all(0 <= layer < levels for layer in layers):
            raise ValueError(f"layers {list(layers)} are not all among the {levels} of {network.name}")
        self.network, self.layers = network, sorted(set(layers))

    @torch.no_grad()
    def look(self, images_B3HW: Tensor, *further: int) -> list[Tensor]:
        """What it compares of images, and after that the features of further layers, which may be
        counted from the last one (-1), found in the same pass; each (B, D, h, w)."""
        levels = len(self.network.network.feature_info)
        asked = [layer % levels for layer in (*self.layers, *further)]
        wanted = sorted(set(asked))
        grids = self.network.to(images_B3HW.device).levels(images_B3HW, wanted)
        return [grids[wanted.index(layer)] for layer in asked]

    def __call__(self, real: Sequence[Tensor] | Tensor, other_B3HW: Tensor) -> Tensor:
        """real: images, or what was seen of them."""
        targets = self.look(real) if isinstance(real, Tensor) else real
        grids = self.network.to(other_B3HW.device).levels(other_B3HW, self.layers)
        pairs = zip(map(_unit, targets), map(_unit, grids), strict=True)
        return torch.stack([(one - other).square().sum(dim=1).mean(dim=(1, 2)) for one, other in pairs]).sum(dim=0)


def _unit(features_BDhw: Tensor) -> Tensor:
    """Feature vectors of length 1; the floor keeps the gradient of one of length 0 finite."""
    features = features_BDhw.float()
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()
