"""What the usual foundation models give, without building them: width and grid of their features.

Networks that are not here are built before a run begins, to ask them (`tasks.networks.check_foundation`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from configs.data import Foundation

_VIT_WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024}
_VIT_DEPTHS = {"tiny": 12, "small": 12, "base": 12, "large": 24}
_LITE0 = ((2, 16), (4, 24), (8, 40), (16, 112), (32, 320))
"""Pixels a cell and channels of each level of EfficientNet-Lite0."""


@dataclass(frozen=True)
class Features:
    """Of one image: `width` channels on a grid of `side` × `side` cells."""

    width: int
    side: int


def known_features(section: Foundation) -> Features | None:
    """The features of a network of this name; None where only the network itself can tell."""
    vit = _vit(section)
    if vit is not None:
        return Features(_VIT_WIDTHS[vit[1]], section.input_size // int(vit[2]))
    if section.name == "efficientnet_lite0" and unfit(section) is None:
        reduction, width = _LITE0[-1 if section.layer is None else section.layer]
        return Features(width, -(-section.input_size // reduction))
    return None


def unfit(section: Foundation) -> str | None:
    """What a known network would not do with these settings, with the way out, as the end of a sentence that begins
    with the section's name; None where all is well, or only the network itself can tell."""
    vit = _vit(section)
    if vit is not None and (rest := section.input_size % (patch := int(vit[2]))):
        near = max(patch, section.input_size - rest)
        return f"input_size {section.input_size} is not a multiple of {section.name}'s patches of {patch}: use {near}"
    levels = _VIT_DEPTHS[vit[1]] if vit is not None else len(_LITE0) if section.name == "efficientnet_lite0" else None
    if levels is not None and section.layer is not None and not -levels <= section.layer < levels:
        return (
            f"layer {section.layer} is none of the {levels} of {section.name}: use 0 to {levels - 1}, or leave it out"
        )
    if section.vector == "token" and (section.layer is not None or section.name == "efficientnet_lite0"):
        return (
            f"vector is token, and {section.name} (layer {section.layer}) ends in no class token: leave layer out of a "
            "vision transformer, or use mean"
        )
    return None


def _vit(section: Foundation) -> re.Match[str] | None:
    return re.fullmatch(r"(?:timm/)?vit_(tiny|small|base|large)_patch(\d+)(?:_reg4)?_[^.]+(?:\..+)?", section.name)
