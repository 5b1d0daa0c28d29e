"""How well latents interpolate: the Fréchet distance of what lies half-way between near neighbours.

After iFID (arXiv 2603.05630): every training image's latent is averaged with its nearest neighbour's among the others,
the midpoint is decoded, and the decoded midpoints are compared with the images themselves. Neighbours and midpoints are
of posterior means standardised by channel, as a diffusion model sees them (our choice). Reported to follow what
diffusion reaches on latents better than how well they reconstruct.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.compute import ActorCompute
from infra.artifacts import Artifact
from infra.device import computing
from infra.progress import Bar
from tasks.data.actors import spread
from tasks.data.images import stretches
from tasks.data.pixels import to_pixels
from tasks.data.portions import SCORED_AT_ONCE, SCORING_BATCH
from tasks.scoring.features import FeatureExtractor, FeatureNetworks, ImageSet, PerImageFeatures, extract_features
from tasks.scoring.latent_scores import Rows
from tasks.scoring.latents import LatentFeatureExtractor, Latents, Subjects, joined
from tasks.scoring.pieces import decoded

_ROWS_AT_ONCE = 512


def nearest_neighbours(points_ND: Rows) -> NDArray[np.int64]:
    """Of every point the nearest other one by Euclidean distance, (N,); the first of those as near.

    Memory is some rows of the distances at once. Raises ValueError where there is no other.
    """
    if len(points_ND) < 2:
        raise ValueError(f"{len(points_ND)} points have no neighbours: at least 2 are needed")
    squares = np.square(points_ND, dtype=np.float64).sum(axis=1)
    found = np.empty(len(points_ND), np.int64)
    for first in range(0, len(points_ND), _ROWS_AT_ONCE):
        rows = points_ND[first : first + _ROWS_AT_ONCE]
        distances = squares - 2.0 * (rows @ points_ND.T)  # but for the row's own square, which is the same for all
        distances[np.arange(len(rows)), np.arange(first, first + len(rows))] = np.inf
        found[first : first + len(rows)] = distances.argmin(axis=1)
    return found


def midpoints(means_NChw: Rows) -> Rows:
    """Half-way from every latent to its nearest neighbour, (N, C, h, w), in the latents' own scale.

    Neighbours are near where channels count alike, each standardised over all images and cells.
    """
    deviations = means_NChw.std(axis=(0, 2, 3), dtype=np.float64).astype(np.float32)
    scaled = means_NChw / np.where(deviations > 0, deviations, 1)[:, None, None]
    nearest = nearest_neighbours(scaled.reshape(len(scaled), -1))
    half: Rows = (means_NChw + means_NChw[nearest]) / 2
    return half


class MidpointExtractor(FeatureExtractor):
    """An actor that decodes latents and looks at the images."""

    def __call__(self, item: Mapping[str, Any]) -> Any:
        latents, found = item["latents"], []
        for start in range(0, len(latents), SCORING_BATCH):
            part = torch.from_numpy(latents[start : start + SCORING_BATCH]).to(self.device)
            with torch.inference_mode(), computing(self.precision, self.device):
                assert self.tokenizer is not None  # the caller's networks have one
                pixels = to_pixels(decoded(self.tokenizer, part).float())
            found.append(self.look(np.zeros(len(pixels), np.int64), pixels))
        return item["first"], PerImageFeatures.joined(found)


def interpolation_features(
    shards: Artifact, networks: FeatureNetworks, size: int, images: int, compute: ActorCompute
) -> tuple[Any, PerImageFeatures]:
    """Findings of at most so many training images (an `ImageFeatures`), and of the decoded midpoints of their latents.

    Raises:
        UserError: there are no training images, or networks that cannot be loaded.
        ValueError: one image, which has no neighbour.
    """
    assert networks.tokenizer is not None
    real = extract_features("training images", {"real": ImageSet(shards, "train/", images)}, networks, compute)["real"]
    subjects = Subjects(size, networks.tokenizer, precision=networks.precision)
    plan: list[dict[str, Any]] = [
        {"artifact": shards, "stretch": stretch, "fitted": None}
        for stretch in stretches(shards, "train/", images, SCORED_AT_ONCE)
    ]
    passed = list(spread(plan, LatentFeatureExtractor, (subjects, compute.cpus_per_actor), compute))
    latents: Latents = joined(passed)[0]
    halves = midpoints(latents.means)
    parts = [
        {"first": first, "latents": halves[first : first + SCORED_AT_ONCE]}
        for first in range(0, len(halves), SCORED_AT_ONCE)
    ]
    found = []
    with Bar("midpoints", len(halves)) as bar:
        for first, findings in spread(parts, MidpointExtractor, (networks, compute.cpus_per_actor), compute):
            found.append((first, findings))
            bar.advance(len(findings.labels))
    ordered = sorted(found, key=lambda each: each[0])
    return real, PerImageFeatures.joined([findings for _, findings in ordered])
