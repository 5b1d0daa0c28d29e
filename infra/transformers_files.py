"""Foundation models of transformers by location: their configurations and safetensors."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from configs.data import Foundation
from configs.errors import UserError
from infra.fetched import HUB, fetch

PREFIX = "transformers/"
_CONFIG, _PREPROCESSOR, _WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"


def of_transformers(section: Foundation) -> bool:
    return section.name.startswith(PREFIX)


def folder_of(section: Foundation, weights: bool) -> Path:
    """The local folder of its files, fetched where they are on the hub.

    weights: with its weights; else the configuration alone.

    Raises:
        UserError: they cannot be had.
    """
    place = section.weights
    if place in ("hub", "random"):
        place = HUB + section.name.removeprefix(PREFIX)
    if not place.startswith(HUB):
        folder = Path(place.removeprefix("file://")).expanduser()
        if "://" in place or not (folder / _CONFIG).is_file():
            raise UserError(
                f"foundation.weights {section.weights}: has no {_CONFIG}; a model of transformers is hub, random, or a "
                f"folder (local, or {HUB}…) with {_CONFIG} and {_WEIGHTS}"
            )
        return folder
    bare, at, revision = place.partition("@")
    config = fetch(f"{bare}/{_CONFIG}{at}{revision}")
    with suppress(UserError):  # many have none
        fetch(f"{bare}/{_PREPROCESSOR}{at}{revision}")
    if weights:
        fetch(f"{bare}/{_WEIGHTS}{at}{revision}")
    return config.parent
