"""Weights from wherever they are (`infra/fetched.py`), read safely. Mistakes raise UserError."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.errors import UserError
from infra.fetched import HUB, fetch, told
from models.checkpoints import Checkpoint, Statistics, Which, check_fits, load_into, read, read_statistics
from models.files import INDEX, read_content, shards_of
from models.formats import Kind, kind_for
from models.foundation import load_efficientnet_lite0

_NAMES = ("hub", "package", "random")
"""What may stand where weights are named, and is no location."""


def identities(**locations: str | None) -> dict[str, str]:
    """What a fingerprint knows of weights besides their names: the content of files, by use.

    Packages' and hubs' names stand for themselves, as do no weights at all.

    Raises:
        UserError: a file does not exist, or cannot be reached.
    """
    found: dict[str, str] = {}
    for use, location in locations.items():
        if location and location not in _NAMES and not location.startswith(HUB):
            found[use] = file_hash(fetch(location))
    return found


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of an index of weights with its shards; read again only when size or time changed.

    Raises:
        UserError: an index is damaged, or one of its shards is missing.
    """
    found = path.stat()
    own = _hash(path, found.st_size, found.st_mtime_ns)
    if not path.name.endswith(INDEX):
        return own
    try:
        shards = [file_hash(path.with_name(name)) for name in shards_of(path)]
    except ValueError as error:
        raise UserError(f"weights {error}") from None
    except FileNotFoundError as error:
        raise UserError(f"weights {path}: its shard {Path(error.filename).name} is not beside it; fetch it") from None
    return hashlib.sha256(" ".join([own, *shards]).encode()).hexdigest()


@lru_cache(maxsize=16)
def _hash(path: Path, _size: int, _time: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(
    location: str, *, kind: Kind | None = None, num_heads: int | None = None, semantic_channels: int | None = None
) -> Checkpoint:
    """The checkpoint at a location, in the authors' layout or ours (see `models.checkpoints.read`)."""
    path = fetch(location)
    try:
        return read(path, kind=kind, num_heads=num_heads, semantic_channels=semantic_channels)
    except ValueError as error:
        raise UserError(told("weights", location, path, error)) from None


def load_pretrained(model: nn.Module, location: str, which: Which = "ema") -> Checkpoint:
    """Load the weights at a location into a network built by a recipe, and return the checkpoint, whose
    statistics may matter to the caller.

    Raises:
        UserError: the file cannot be had or read, or its tensors are not this network's.
    """
    checkpoint = load_checkpoint(location, kind=kind_for(model))
    try:
        load_into(model, checkpoint, location, which)
    except ValueError as error:
        raise UserError(str(error)) from None
    return checkpoint


def check_pretrained(build: Callable[[], nn.Module], location: str | None, field: str) -> None:
    """Refuse weights that do not fit the network a recipe describes, before anything runs.

    build: makes that network; it is called where memory costs nothing. location: None needs no check.

    Raises:
        UserError: naming the field, the file and what does not fit.
    """
    if location is None or location in _NAMES:
        return
    with torch.device("meta"):
        model = build()
    checkpoint = load_checkpoint(location, kind=kind_for(model))
    try:
        check_fits(model, checkpoint, f"{field} {location}")
    except ValueError as error:
        raise UserError(str(error)) from None


def load_statistics(location: str) -> Statistics:
    """The authors' latent statistics at a location."""
    path = fetch(location)
    try:
        return read_statistics(path)
    except ValueError as error:
        raise UserError(told("statistics", location, path, error)) from None


def foundation_weights(name: str, weights: str) -> dict[str, Tensor] | None:
    """State dict for `FoundationModel`, or None where timm's hub, or no weights at all, are wanted.

    Args:
        name: the model's name, for errors.
        weights: `hub`, `random`, `package` (EfficientNet-Lite0 only), or a location.
    """
    if weights in ("hub", "random"):
        return None
    if weights == "package":
        if "efficientnet_lite0" not in name:
            raise UserError(
                f"foundation.weights is package but {name} is in no package: only efficientnet_lite0 is; "
                f"use hub, or a path to its weights"
            )
        try:
            return load_efficientnet_lite0()
        except (ImportError, ValueError) as error:
            raise UserError(str(error)) from None
    return load_tensors(weights, name)


def load_tensors(location: str, whose: str) -> dict[str, Tensor]:
    """Tensors by name from a location, whatever they are of; `whose` names that in errors.

    Raises:
        UserError: it cannot be had, or holds something else.
    """
    path = fetch(location)
    try:
        content = read_content(path).values
    except ValueError as error:
        raise UserError(told(f"weights of {whose} at", location, path, error)) from None
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(
            f"weights of {whose} at {location}: expected a dictionary of tensors, found {type(content).__name__}"
        )
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
