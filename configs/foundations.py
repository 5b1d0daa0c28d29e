"""What the usual foundation models give, without building them: width and grid of their features.

Networks that are not here are built before a run begins, to ask them (`tasks.networks.check_foundation`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from configs.data import Foundation

_VIT_WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024}
_LITE0 = ((2, 16), (4, 24), (8, 40), (16, 112), (32, 320))
"""Pixels a cell and channels of each level of EfficientNet-Lite0."""


@dataclass(frozen=True)
class Features:
    """Of one image: `width` channels on a grid of `side` × `side` cells."""

    width: int
    side: int


def known_features(section: Foundation) -> Features | None:
    """The features of a network of this name; None where only the network itself can tell."""
    vit = re.fullmatch(r"(?:timm/)?vit_(tiny|small|base|large)_patch(\d+)(?:_reg4)?_[^.]+(?:\..+)?", section.name)
    if vit is not None:
        return Features(_VIT_WIDTHS[vit[1]], section.input_size // int(vit[2]))
    if section.name == "efficientnet_lite0" and -len(_LITE0) <= (section.layer or -1) < len(_LITE0):
        reduction, width = _LITE0[-1 if section.layer is None else section.layer]
        return Features(width, -(-section.input_size // reduction))
    return None
