"""Autoencoders in diffusers' own layout, by location: `config.json` beside safetensors, in shards or not.

What a plan needs, the configuration alone, is read without any library that computes. Mistakes raise UserError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.autoencoders import DiffusersModel
from configs.errors import UserError
from infra.fetched import HUB, fetch
from models.diffusers_config import Described, describe

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
_FIELD = "train_vavae.model.location"
_SAFE = (".safetensors", ".safetensors.index.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NAMES = ("diffusion_pytorch_model", "model")
"""What weights are called in a folder: by diffusers, and in an artifact of `train_vavae`."""


def described(section: DiffusersModel) -> Described:
    """What the configuration at the section's location says, which is what the section says.

    Raises:
        UserError: it cannot be had, is of another class, or of other sizes than the recipe states.
    """
    folder, _ = _folder_and_file(section.location)
    try:
        found = describe(_config(_within(folder, CONFIG)), section.class_name)
    except ValueError as error:
        raise UserError(f"{_FIELD} {section.location}: {CONFIG} {error}") from None
    for name in ("channels", "downscale"):
        said, is_ = getattr(section, name), getattr(found, name)
        if said != is_:
            raise UserError(
                f"train_vavae.model.{name} is {said} but this {section.class_name} ({section.location}) has {is_}: "
                f"set {name}: {is_}"
            )
    return found


def tensors(section: DiffusersModel) -> dict[str, Tensor]:
    """Its weights by name, memory-mapped."""
    from infra.weights import load_tensors

    return load_tensors(str(_weights(section.location)), section.class_name)


def identity(section: DiffusersModel) -> str | None:
    """What a fingerprint knows of it besides its name: the content of its files; a hub's name stands for itself."""
    if section.location.startswith(HUB):
        return None
    from infra.weights import file_hash

    folder, _ = _folder_and_file(section.location)
    return f"{file_hash(_found(_within(folder, CONFIG)))} {file_hash(_weights(section.location))}"


def _config(location: str) -> Any:
    path = _found(location)
    return _parsed(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _parsed(path: Path, _time: int) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None


def _found(location: str) -> Path:
    """The configuration, with a hint at what is there in its place."""
    folder = Path(location.removeprefix("file://")).expanduser().parent
    if "://" in location.removeprefix("file://") or (folder / CONFIG).is_file():
        return fetch(location)
    if (folder / "vae" / CONFIG).is_file():
        raise UserError(f"{_FIELD} {folder}: is a whole pipeline; name the folder of its autoencoder, {folder / 'vae'}")
    there = sorted(each.name for each in folder.iterdir())[:6] if folder.is_dir() else []
    raise UserError(
        f"{_FIELD} {folder}: has no {CONFIG} ({', '.join(there) or 'nothing is there'}); expected diffusers' own "
        f"layout, {CONFIG} beside {_NAMES[0]}.safetensors"
    )


def _weights(location: str) -> Path:
    folder, file = _folder_and_file(location)
    if file is not None:
        return fetch(_within(folder, file))
    bare = Path(folder.removeprefix("file://")).expanduser()
    if "://" not in folder.removeprefix("file://"):
        return _in_folder(bare)
    refusals: list[UserError] = []
    for name in (f"{stem}{ending}" for stem in _NAMES for ending in _SAFE):
        try:
            return fetch(_within(folder, name))
        except UserError as error:
            refusals.append(error)
            if "no such file" not in str(error) and "the hub has no" not in str(error):
                break
    raise refusals[-1 if len(refusals) == 1 else 0]


def _in_folder(folder: Path) -> Path:
    names = {each.name for each in folder.iterdir()}
    for stem in _NAMES:
        for ending in reversed(_SAFE):
            if f"{stem}{ending}" in names:
                return folder / f"{stem}{ending}"
    safe = sorted(name for name in names if name.endswith(_SAFE))
    if len(safe) == 1:
        return folder / safe[0]
    if safe:
        raise UserError(f"{_FIELD} {folder}: has several files of weights ({', '.join(safe[:4])}); name one of them")
    pickled = sorted(name for name in names if name.endswith(_PICKLES))
    what = f"only {pickled[0]}, a pickle, which could run code" if pickled else "no weights"
    raise UserError(f"{_FIELD} {folder}: has {what}; expected {_NAMES[0]}.safetensors, or its index and shards")


def _folder_and_file(location: str) -> tuple[str, str | None]:
    """The folder that a location is, or the one that holds the file it is; a hub's revision stays at the folder."""
    bare, at, revision = location.partition("@") if location.startswith(HUB) else (location, "", "")
    if bare.endswith(_PICKLES):
        raise UserError(
            f"{_FIELD} {location}: is a pickle, which could run code; expected safetensors in diffusers' own layout"
        )
    if not bare.endswith(_SAFE):
        return bare.rstrip("/") + at + revision, None
    folder, _, name = bare.rpartition("/")
    return (folder or ".") + at + revision, name


def _within(folder: str, name: str) -> str:
    if not folder.startswith(HUB):
        return f"{folder}/{name}"
    bare, at, revision = folder.partition("@")
    return f"{bare}/{name}{at}{revision}"


def to_json(found: Described) -> bytes:
    """The configuration as an artifact keeps it, which makes the artifact's folder one of diffusers' layout."""
    values: Mapping[str, Any] = {"_class_name": found.class_name, **found.arguments}
    return json.dumps(values, indent=2, sort_keys=True).encode()
