"""What a `config.json` of diffusers says of an autoencoder, checked; imports nothing, so that plans can read it.

Sizes that a recipe states must be these. Factors and means by which other teams scale latents are told to people and
used nowhere: latents are standardised by statistics of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_FACTORS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "batch_norm_eps")
_LEVELS = {
    "AutoencoderKL": "block_out_channels",
    "AutoencoderKLFlux2": "block_out_channels",
    "AutoencoderDC": "encoder_block_out_channels",
}
"""The entry with a width for each level, of which all but the first halve the side."""
_RAE = {"encoder_hidden_size": 768, "patch_size": 16, "encoder_input_size": 224, "encoder_patch_size": 14}
"""Sizes of a representation autoencoder, with what they are where a configuration does not say."""


@dataclass(frozen=True)
class Described:
    """An autoencoder by its configuration."""

    class_name: str
    channels: int
    """Of its latents."""
    downscale: int
    """Pixels of a latent's cell along a side."""
    side: int | None
    """Pixels along a side of the only images it makes; None where that is open."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What the class is built from."""

    @property
    def factors(self) -> dict[str, Any]:
        """By which its own team scales latents."""
        return {name: self.arguments[name] for name in _FACTORS if self.arguments.get(name) is not None}


def describe(values: Any, class_name: str) -> Described:
    """The autoencoder that `config.json` describes.

    values: the parsed file. class_name: one of the four that are known.
    Raises ValueError, naming the entry, where it describes another class or sizes that cannot be.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"is no configuration of diffusers: expected an object, found {type(values).__name__}")
    named = values.get("_class_name")
    if named is None:
        raise ValueError(
            f"has no _class_name, so it is no configuration of diffusers ({', '.join(sorted(values)[:4]) or 'empty'})"
        )
    if named != class_name:
        raise ValueError(f"is of class {named}, but the recipe's class_name is {class_name}: make them the same")
    arguments = {name: value for name, value in values.items() if not name.startswith("_")}
    if class_name == "AutoencoderRAE":
        return _representation(arguments)
    widths = arguments.get(entry := _LEVELS[class_name])
    if not isinstance(widths, list) or not widths or not all(_positive(width) for width in widths):
        raise ValueError(f"{entry} is {widths!r}: expected a list of widths")
    channels = _size(arguments, "latent_channels")
    for name in ("in_channels", "out_channels"):
        if arguments.get(name, 3) != 3:
            raise ValueError(f"{name} is {arguments[name]}: images here have 3 channels")
    return Described(class_name, channels, 2 ** (len(widths) - 1), None, arguments)


def _representation(arguments: dict[str, Any]) -> Described:
    width, patch, seen, cell = (_size(arguments, name, default) for name, default in _RAE.items())
    if seen % cell:
        raise ValueError(f"encoder_input_size {seen} is not a multiple of encoder_patch_size {cell}")
    if arguments.get("reshape_to_2d", True) is not True:
        raise ValueError("reshape_to_2d is false, so latents are rows of tokens: a grid is expected")
    return Described("AutoencoderRAE", width, patch, patch * (seen // cell), arguments)


def _size(arguments: Mapping[str, Any], name: str, default: int | None = None) -> int:
    found = arguments.get(name, default)
    if not _positive(found):
        raise ValueError(f"{name} is {found!r}: expected a positive integer")
    return int(found)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
