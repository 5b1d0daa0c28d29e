"""Snapshots of weight averages in an artifact, and any other average that is put together from them."""

from __future__ import annotations

import math
import re

from safetensors.torch import load as load_safetensors
from torch import Tensor

from configs.errors import UserError
from infra.artifacts import Artifact
from models.power_ema import Average, combination

FOLDER = "snapshots"
KEPT = "averages"
_NAME = re.compile(FOLDER + r"/(?P<images>\d+)-sigma-(?P<sigma>[0-9.e-]+)\.safetensors")


def snapshot_file(images_seen: int, sigma_rel: float) -> str:
    return f"{FOLDER}/{images_seen:014d}-sigma-{sigma_rel:g}.safetensors"


def kept_file(images_seen: int) -> str:
    """Of the average of `ema_decay` that `keep_averages_at` asks for: a network's weights, to be named anywhere."""
    return f"{KEPT}/{images_seen:014d}.safetensors"


def taken_at(artifact: Artifact, sigma_rel: float) -> list[int]:
    """Images seen at each stored snapshot of this width, ascending."""
    return sorted(stored.images for stored in _stored(artifact) if math.isclose(stored.sigma_rel, sigma_rel))


def average(artifact: Artifact, sigma_rel: float, images_seen: int | None = None) -> dict[str, Tensor]:
    """Averaged weights by name, float32, read one snapshot after the other.

    Args:
        artifact: of a trained stage.
        sigma_rel: width of the average relative to `images_seen` (Karras et al. 2024).
        images_seen: where it ends; None is the end of training.

    Raises:
        UserError: the artifact has no snapshots, or `sigma_rel` is not the width of a power profile.
    """
    found = _stored(artifact)
    if not found:
        raise UserError(
            f"{artifact.uri} has no snapshots to make an average of width {sigma_rel} from: train with ema_sigmas and "
            "snapshot_every"
        )
    end = max(stored.images for stored in found) if images_seen is None else images_seen
    try:
        shares = combination(list(found), Average(end, sigma_rel))
    except ValueError as error:
        raise UserError(f"{artifact.uri}: {error}") from None
    total: dict[str, Tensor] = {}
    for share, path in zip(shares.tolist(), found.values(), strict=True):
        for name, tensor in load_safetensors(artifact.read(path)).items():
            total[name] = tensor * share if name not in total else total[name].add_(tensor, alpha=share)
    return total


def _stored(artifact: Artifact) -> dict[Average, str]:
    """The snapshots' files."""
    found: dict[Average, str] = {}
    for entry in artifact.files(f"{FOLDER}/"):
        if match := _NAME.fullmatch(entry.path):
            found[Average(int(match["images"]), float(match["sigma"]))] = entry.path
    return found
