"""What is in the latents of both tokenizers, whatever images they are of: by actors, in two passes.

The first pass looks at training images and gathers what lines from latents to features, principal components and
linear probes are fitted to; the second looks at test images with them. Feature grids are never kept: a pass gives sums
over cells, means over each image's cells, and latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from configs.compute import ActorCompute
from configs.data import Foundation
from infra.artifacts import Artifact
from infra.device import computing, default_device
from infra.progress import Bar
from tasks.data.actors import spread
from tasks.data.images import read_images, stretches
from tasks.data.pixels import Pixels, to_tensor
from tasks.data.portions import SCORED_AT_ONCE, SCORING_BATCH
from tasks.networks import load_foundation, trained_autoencoder, trained_semantic_vae
from tasks.scoring.latent_scores import CellSums, Rows, Usage, one_cell_each, probe, uniformity
from tasks.scoring.pieces import encoded


@dataclass(frozen=True)
class Subjects:
    """Which networks are looked at: plain values and references."""

    size: int
    """Side in pixels at which images are looked at."""
    tokenizer: Artifact
    foundation: Foundation | None = None
    """Whose features latents are compared with; None looks at latents alone."""
    semantic: Artifact | None = None
    precision: str = "fp32"
    """Of them all, see `evaluate.precision`."""


@dataclass(frozen=True)
class Fitted:
    """What the first pass found, for the second."""

    line_CD: Rows
    mean_D: Rows
    components_DK: Rows


@dataclass(frozen=True)
class Latents:
    """Of the images of one set, in its order; what there is no network for is None."""

    labels: NDArray[np.int64]
    means: Rows
    """(N, C, h, w): means and deviations of the tokenizer's posteriors."""
    deviations: Rows
    features: Rows | None = None
    """(N, D): features of an image, the mean over its cells."""
    semantic: Rows | None = None
    """(N, K, h, w): means of the Semantic VAE's posteriors."""
    comparisons: Rows | None = None
    """(N, names of :data:`COMPARED`), the mean over an image's cells; from the second pass."""

    @classmethod
    def joined(cls, pieces: Iterable[Latents]) -> Latents:
        columns = zip(*(vars(piece).values() for piece in pieces), strict=True)
        return cls(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]


COMPARED = (
    "align_cosine",
    "align_distance_error",
    "feature_cosine",
    "feature_error",
    "pca_feature_cosine",
    "pca_feature_error",
)


class LatentFeatureExtractor:
    """An actor with the networks; takes one stretch of images per call."""

    def __init__(self, subjects: Subjects, threads: int = 1) -> None:
        self.device = default_device()
        if self.device.type == "cpu":
            torch.set_num_threads(threads)
        self.size, self.precision = subjects.size, subjects.precision
        self.tokenizer = trained_autoencoder(subjects.tokenizer).to(self.device)
        self.foundation = None if subjects.foundation is None else load_foundation(subjects.foundation).to(self.device)
        self.semantic = None if subjects.semantic is None else trained_semantic_vae(subjects.semantic).to(self.device)

    def __call__(self, item: Mapping[str, Any]) -> tuple[int, Latents, CellSums | None]:
        stretch, fitted = item["stretch"], item["fitted"]
        batches = read_images(item["artifact"].storage, stretch, self.size, SCORING_BATCH)
        found, sums = [], None
        for labels, pixels in batches:
            latents, more = self.look(labels, pixels, fitted)
            found.append(latents)
            if more is not None:
                sums = more if sums is None else sums + more
        return stretch.first, Latents.joined(found), sums

    @torch.inference_mode()
    def look(
        self, labels: NDArray[np.int64], pixels_BHW3: Pixels, fitted: Fitted | None = None
    ) -> tuple[Latents, CellSums | None]:
        """Latents of one batch; its sums without `fitted`, its comparisons with it."""
        with computing(self.precision, self.device):
            return self._found(labels, pixels_BHW3, fitted)

    def _found(
        self, labels: NDArray[np.int64], pixels_BHW3: Pixels, fitted: Fitted | None
    ) -> tuple[Latents, CellSums | None]:
        images = to_tensor(pixels_BHW3).to(self.device)
        posterior = encoded(self.tokenizer, images)
        z, deviations = posterior.mean.float(), posterior.std.float()
        if self.foundation is None:
            return Latents(labels, _numpy(z), _numpy(deviations)), None
        f = self.foundation(images).float()
        s = None if self.semantic is None else self.semantic.encode(f).mean.float()
        comparisons = None if fitted is None else self._compared(z, f, s, fitted)
        latents = Latents(
            labels,
            _numpy(z),
            _numpy(deviations),
            _numpy(f.mean(dim=(2, 3))),
            None if s is None else _numpy(s),
            comparisons,
        )
        return latents, CellSums.of(_cells(z), _cells(f)) if fitted is None else None

    def _compared(self, z: Tensor, f: Tensor, s: Tensor | None, fitted: Fitted) -> Rows:
        line, mean, basis = (
            torch.from_numpy(np.array(values)).float().to(self.device) for values in vars(fitted).values()
        )
        projected = torch.einsum("cd,bchw->bdhw", line, z)
        centred = f - mean[:, None, None]
        pca = torch.einsum("dk,ek,behw->bdhw", basis, basis, centred) + mean[:, None, None]
        restored = f if s is None else self.semantic.decode(s).float()  # type: ignore[union-attr]
        columns = [
            _cosine(projected, f),
            _distance_error(z, f),
            _cosine(restored, f),
            (restored - f).square().mean(dim=(1, 2, 3)),
            _cosine(pca, f),
            (pca - f).square().mean(dim=(1, 2, 3)),
        ]
        return _numpy(torch.stack(columns, dim=1))


def extract_latent_features(
    shards: Artifact, subjects: Subjects, compute: ActorCompute, *, train: int, test: int, points: int, seed: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores of the latents, and what there is per channel.

    Args:
        shards: artifact of stage `shard`.
        subjects: the networks.
        compute: actors to look.
        train, test: at most so many images of each split. No training images: nothing is fitted, and nothing compared
            with features.
        points: images whose cells the density is estimated from.
        seed: of the drawn cells and embeddings.

    Raises:
        UserError: a split without images, or networks that cannot be loaded.
    """

    def passed(split: str, limit: int, fitted: Fitted | None) -> tuple[Latents, CellSums | None]:
        plan: list[dict[str, Any]] = [
            {"artifact": shards, "stretch": stretch, "fitted": fitted}
            for stretch in stretches(shards, f"{split}/", limit, SCORED_AT_ONCE)
        ]
        found = []
        with Bar(f"latents of {split}", sum(item["stretch"].rows for item in plan)) as bar:
            for result in spread(plan, LatentFeatureExtractor, (subjects, compute.cpus_per_actor), compute):
                found.append(result)
                bar.advance(len(result[1].labels))
        return joined(found)

    if not train:
        return scored(None, passed("test", test, None)[0], None, points, seed)
    first, sums = passed("train", train, None)
    channels = 0 if first.semantic is None else first.semantic.shape[1]
    second, _ = passed("test", test, None if sums is None else fit(sums, channels))
    return scored(first, second, None if sums is None else fit(sums, channels), points, seed)


def joined(found: Sequence[tuple[int, Latents, CellSums | None]]) -> tuple[Latents, CellSums | None]:
    """One pass from its stretches, in the set's order whoever finished first."""
    ordered = sorted(found, key=lambda each: each[0])
    sums = [more for _, _, more in ordered if more is not None]
    return Latents.joined(latents for _, latents, _ in ordered), sum(sums[1:], sums[0]) if sums else None


def fit(sums: CellSums, channels: int) -> Fitted:
    """`channels` principal components of the features, and the line from latents to them."""
    return Fitted(sums.line_CD, *sums.components(channels))


def scored(
    train: Latents | None, test: Latents, fitted: Fitted | None, points: int, seed: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores by name, and figures per channel."""
    usage = Usage.of(test.means, test.deviations)
    even = uniformity(one_cell_each(test.means[:points], seed), seed=seed)
    scores = {
        "density_variation": even.variation,
        "density_gini": even.gini,
        "density_entropy": even.entropy,
        "channels_active": usage.active,
        "channels_effective": usage.effective,
    }
    if train is not None:
        scores["latent_probe"] = probe(_flat(train.means), train.labels, _flat(test.means), test.labels)
        scores["latent_pooled_probe"] = probe(_pooled(train.means), train.labels, _pooled(test.means), test.labels)
    if test.comparisons is not None and fitted is not None and train is not None and train.features is not None:
        assert test.features is not None  # of the same networks
        means = dict(zip(COMPARED, test.comparisons.mean(axis=0).tolist(), strict=True))
        wanted = COMPARED if test.semantic is not None else COMPARED[:2]
        scores |= {name: means[name] for name in wanted}
        scores["feature_probe"] = probe(train.features, train.labels, test.features, test.labels)
        if train.semantic is not None and test.semantic is not None:
            for name, cells in (("semantic_probe", _flat), ("semantic_pooled_probe", _pooled)):
                scores[name] = probe(cells(train.semantic), train.labels, cells(test.semantic), test.labels)
            pca = [(each - fitted.mean_D) @ fitted.components_DK for each in (train.features, test.features)]
            scores["pca_probe"] = probe(pca[0], train.labels, pca[1], test.labels)
    return scores, {"channels": {each.name: getattr(usage, each.name).tolist() for each in fields(usage)}}


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return F.cosine_similarity(one, other, dim=1).mean(dim=(1, 2))


def _distance_error(z: Tensor, f: Tensor) -> Tensor:
    """Mean of |cos(z_i, z_j) - cos(f_i, f_j)| over pairs of an image's cells, (B,)."""
    units = [F.normalize(each.flatten(2), dim=1) for each in (z, f)]
    gaps = units[0].transpose(1, 2) @ units[0] - units[1].transpose(1, 2) @ units[1]
    return gaps.abs().mean(dim=(1, 2))


def _cells(x_BDhw: Tensor) -> Rows:
    return _numpy(x_BDhw.permute(0, 2, 3, 1).flatten(0, 2))


def _flat(latents_NChw: Rows) -> Rows:
    return latents_NChw.reshape(len(latents_NChw), -1)


def _pooled(latents_NChw: Rows) -> Rows:
    pooled: Rows = latents_NChw.mean(axis=(2, 3))
    return pooled


def _numpy(values: Tensor) -> Rows:
    array: Rows = values.cpu().numpy()
    return array
