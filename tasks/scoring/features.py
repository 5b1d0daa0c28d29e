"""Feature vectors and the judge's opinion of a set of images, whatever stage it comes from, by actors on Ray Data.

Images always run through the networks in batches of one fixed size, the last one filled up, so that a feature
does not depend on how the set is cut into files or spread over actors. Means and covariances are gathered in the
set's order whatever order actors finish in; of a large set only the first images' vectors stay in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.compute import ActorCompute
from configs.data import Foundation
from infra.artifacts import Artifact
from infra.device import computing, default_device
from infra.progress import Bar
from tasks.data.actors import spread
from tasks.data.crops import Crop
from tasks.data.images import read_images, read_keys, stretches
from tasks.data.pixels import Pixels, peak_signal_to_noise, to_pixels, to_tensor
from tasks.data.portions import SCORED_AT_ONCE, SCORING_BATCH
from tasks.foreign.foundations import vectors
from tasks.networks import Network, load_foundation, ready, trained_autoencoder
from tasks.randomness import key_noise
from tasks.scoring.classifier import judged, trained_classifier
from tasks.scoring.gaussian import Gaussian, GaussianAccumulator
from tasks.scoring.inception import Inception, InceptionFeatures
from tasks.scoring.lpips import Lpips
from tasks.scoring.pieces import decoded, encoded

LATENTS = "z"
"""The column of `encode` that holds a tokenizer's latents."""
_INCEPTION_BATCH = 8
"""On a CPU: it looks at 299 × 299 pixels, so what fills a batch up costs more than a larger batch would gain."""


@dataclass(frozen=True)
class PerImageFeatures:
    """What was found out about each image of a set, in the set's order."""

    labels: NDArray[np.int64]
    features: NDArray[np.float32]
    """(N, D)"""
    predictions: NDArray[np.int64] | None = None
    """Labels by the judge, where there is one."""
    psnr: NDArray[np.float64] | None = None
    """Peak signal-to-noise ratio in dB of each image's reconstruction, where images were reconstructed."""
    ssim: NDArray[np.float32] | None = None
    """Structural similarity of each image and its reconstruction, there too."""
    lpips: NDArray[np.float32] | None = None
    """Perceptual distance of each image from its reconstruction, where LPIPS was asked for as well."""
    pool: NDArray[np.float32] | None = None
    """(N, 2048), (N, 2023) and (N, 1008): what Inception finds, where it looked (see `InceptionFeatures`)."""
    spatial: NDArray[np.float32] | None = None
    logits: NDArray[np.float32] | None = None
    judged: NDArray[np.float32] | None = None
    """(N, channels): features of the judge, where a distance on them was asked for."""

    def first(self, count: int) -> PerImageFeatures:
        """Of the first `count` images."""
        return PerImageFeatures(*(None if values is None else values[:count] for values in vars(self).values()))  # type: ignore[arg-type]

    @property
    def consistency(self) -> float | None:
        """Share of images that the judge gives the label they have."""
        return None if self.predictions is None else float((self.predictions == self.labels).mean())

    @classmethod
    def joined(cls, pieces: Sequence[PerImageFeatures]) -> PerImageFeatures:
        columns = zip(*(vars(piece).values() for piece in pieces), strict=True)
        return cls(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]


WITHOUT_LPIPS = "set evaluate_tokenizer.lpips_weights to null to score without LPIPS"
_PUBLISHED = InceptionFeatures._fields
VECTORS = ("features", "pool", "spatial", "judged")
"""The findings that have a mean and a covariance."""


@dataclass(frozen=True)
class ImageFeatures:
    """What was found out about a set: of each of its first images, and of all together."""

    findings: PerImageFeatures
    gaussians: dict[str, Gaussian]
    """By name of :data:`VECTORS`; over all images."""
    images: int
    """Number of all images."""

    @classmethod
    def of(cls, findings: PerImageFeatures) -> ImageFeatures:
        """A set of which everything is kept."""
        folded = _InOrder(len(findings.labels))
        folded.add(0, findings)
        return folded.examined()

    def first(self, count: int) -> ImageFeatures:
        """Of the first `count` images, which must have been kept."""
        return self if count == self.images else ImageFeatures.of(self.findings.first(count))


@dataclass(frozen=True)
class FeatureNetworks:
    """What an examiner loads: plain values and references."""

    crop: Crop | int
    """Squares of images that are looked at; a side in pixels is ADM's centre crop."""
    features: Foundation
    judge: Artifact | None = None
    judged: bool = False
    """Keep the judge's features."""
    tokenizer: Artifact | None = None
    inception: str | None = None
    """Path or URL of its weights."""
    precision: str = "fp32"
    """Of them all, see `evaluate.precision`."""
    lpips: str | None = None
    """VGG16 of LPIPS (see `perceptual.Lpips`); None leaves it out."""
    compiled: bool = False
    """The features' network and the tokenizer; the others are a small share of the work."""


@dataclass(frozen=True)
class ImageSet:
    """Which images to look at."""

    artifact: Artifact
    prefix: str
    """Of its files: `train/`, `test/`, or `part-` for a sample."""
    limit: int
    keep: int | None = None
    """Findings of so many first images are kept; None keeps all."""
    reconstruct: bool = False
    """Look at what the tokenizer makes of them (the posterior's mean, decoded) instead of at themselves."""
    sampled: int | None = None
    """Seed of posterior samples to decode instead, which belong to images' keys as in `encode`; None takes means."""


def extract_features(
    what: str, sets: Mapping[str, ImageSet], networks: FeatureNetworks, compute: ActorCompute
) -> dict[str, ImageFeatures]:
    """Findings of every set, all by the same actors.

    Args:
        what: the name on the progress bar.
        sets: by the name their findings get.
        networks: what to look at them with.
        compute: actors to do it.

    Raises:
        UserError: a set is empty or damaged, has too few images, or the networks cannot be loaded.
    """
    plan: list[dict[str, Any]] = [
        {"name": name, "set": chosen, "stretch": stretch}
        for name, chosen in sets.items()
        for stretch in stretches(chosen.artifact, chosen.prefix, chosen.limit, SCORED_AT_ONCE)
    ]
    folded = {name: _InOrder(chosen.limit if chosen.keep is None else chosen.keep) for name, chosen in sets.items()}
    with Bar(what, sum(item["stretch"].rows for item in plan)) as bar:
        for name, first, findings in spread(plan, FeatureExtractor, (networks, compute.cpus_per_actor), compute):
            folded[name].add(first, findings)
            bar.advance(len(findings.labels))
    return {name: each.examined() for name, each in folded.items()}


class _InOrder:
    """Takes the stretches of a set in any order and folds them in the set's."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._early: dict[int, PerImageFeatures] = {}
        """Stretches whose turn has not come, by their first image."""
        self._kept: list[PerImageFeatures] = []
        self._accumulators: dict[str, GaussianAccumulator] = {}
        self._images = 0

    def add(self, first: int, findings: PerImageFeatures) -> None:
        self._early[first] = findings
        while (turn := self._early.pop(self._images, None)) is not None:
            for name in VECTORS:
                if (values := getattr(turn, name)) is not None:
                    self._accumulators.setdefault(name, GaussianAccumulator()).add(values)
            if self._images < self._keep:
                self._kept.append(turn.first(self._keep - self._images))
            self._images += len(turn.labels)

    def examined(self) -> ImageFeatures:
        assert not self._early, "a stretch is missing"
        gaussians = {name: moments.gaussian() for name, moments in self._accumulators.items()}
        return ImageFeatures(PerImageFeatures.joined(self._kept), gaussians, self._images)


class FeatureExtractor:
    """An actor with the networks; takes one stretch of images per call."""

    def __init__(self, networks: FeatureNetworks, threads: int = 1) -> None:
        self.device = default_device()
        if self.device.type == "cpu":
            torch.set_num_threads(threads)
        self.crop, self.precision = networks.crop, networks.precision
        self.section = networks.features
        self.features = self._ready(load_foundation(networks.features), networks.compiled)
        self.judge = None if networks.judge is None else trained_classifier(networks.judge).to(self.device)
        self.judged = networks.judged
        self.inception = None if networks.inception is None else Inception(networks.inception).to(self.device)
        self.lpips = None if networks.lpips is None else Lpips(networks.lpips, WITHOUT_LPIPS)
        tokenizer = None if networks.tokenizer is None else trained_autoencoder(networks.tokenizer)
        self.tokenizer = None if tokenizer is None else self._ready(tokenizer, networks.compiled)

    def _ready(self, network: Network, compiled: bool) -> Network:
        return ready(network.to(self.device), compiled, self.precision)

    def __call__(self, item: Mapping[str, Any]) -> tuple[str, int, PerImageFeatures]:
        stretch, chosen = item["stretch"], item["set"]
        batches = read_images(chosen.artifact.storage, stretch, self.crop, SCORING_BATCH)
        keys = [] if chosen.sampled is None else read_keys(chosen.artifact.storage, stretch)
        found = list[PerImageFeatures]()
        for number, (labels, pixels) in enumerate(batches):
            own = keys[number * SCORING_BATCH :][: len(labels)]
            found.append(self.look(labels, pixels, chosen.reconstruct, own, chosen.sampled or 0))
        return item["name"], stretch.first, PerImageFeatures.joined(found)

    @torch.inference_mode()
    def look(
        self,
        labels: NDArray[np.int64],
        pixels_BHW3: NDArray[Any],
        reconstruct: bool = False,
        keys: Sequence[str] = (),
        seed: int = 0,
    ) -> PerImageFeatures:
        """Findings of at most one batch.

        pixels_BHW3: levels 0 to 255, uint8, or floats between them: those reach the tokenizer, SSIM and LPIPS as they
            are, everything else as levels.
        keys: of the images, to reconstruct from posterior samples; none for means.
        """
        with computing(self.precision, self.device):
            return self._found(labels, pixels_BHW3, reconstruct, keys, seed)

    def _found(
        self, labels: NDArray[np.int64], pixels_BHW3: NDArray[Any], reconstruct: bool, keys: Sequence[str], seed: int
    ) -> PerImageFeatures:
        count, likeness = len(labels), dict[str, Any]()
        between = pixels_BHW3.dtype != np.uint8
        pixels = to_pixels(to_tensor(pixels_BHW3)) if between else pixels_BHW3
        if reconstruct:
            assert self.tokenizer is not None, "reconstructing needs a tokenizer"
            images = self._filled(pixels_BHW3)
            again = decoded(self.tokenizer, self._latents(images, keys, seed))[:count]
            real, pixels = pixels, to_pixels(again)
            pair = (images[:count], again.float()) if between else tuple(map(self._tensor, (real, pixels)))
            likeness = {"psnr": peak_signal_to_noise(real, pixels), **self._likeness(*pair)}
        images = self._filled(pixels)
        features = vectors(self.section, self.features, images)[:count].float().cpu().numpy()
        predictions, seen = (None, None) if self.judge is None else judged(self.judge, images)
        return PerImageFeatures(
            labels,
            features,
            None if predictions is None else predictions[:count],
            likeness.pop("psnr", None),
            judged=seen[:count] if seen is not None and self.judged else None,
            **likeness,
            **self._published(pixels),
        )

    def _latents(self, images: Tensor, keys: Sequence[str], seed: int) -> Tensor:
        """Means of the posteriors, or for images with keys their samples."""
        posterior = encoded(self.tokenizer, images)  # type: ignore[arg-type]  # who reconstructs has one
        if not keys:
            return posterior.mean
        noise = np.zeros(posterior.mean.shape, np.float32)
        noise[: len(keys)] = key_noise(seed, keys, LATENTS, posterior.mean.shape[1:])
        return posterior.sample(torch.from_numpy(noise).to(self.device))

    def _tensor(self, pixels_BHW3: Pixels) -> Tensor:
        return to_tensor(pixels_BHW3).to(self.device)

    def _likeness(self, real_B3HW: Tensor, again_B3HW: Tensor) -> dict[str, Any]:
        """How like images and their reconstructions are, in [-1, 1]."""
        from torchmetrics.functional.image import structural_similarity_index_measure

        real, again = real_B3HW, again_B3HW
        ssim: Any = structural_similarity_index_measure(again, real, reduction="none", data_range=(-1.0, 1.0))
        found: dict[str, Any] = {"ssim": ssim.reshape(-1).cpu().numpy()}
        if self.lpips is not None:
            found["lpips"] = self.lpips(again, real).flatten().cpu().numpy()
        return found

    def _published(self, pixels_BHW3: Pixels) -> dict[str, NDArray[np.float32]]:
        """What Inception finds, in batches of its own fixed size, filled up like the others'."""
        if self.inception is None:
            return {}
        count, batch = len(pixels_BHW3), _INCEPTION_BATCH if self.device.type == "cpu" else SCORING_BATCH
        filled = np.zeros((-(-count // batch) * batch, *pixels_BHW3.shape[1:]), np.uint8)
        filled[:count] = pixels_BHW3
        images = torch.from_numpy(filled).permute(0, 3, 1, 2).to(self.device)
        found = [self.inception(each) for each in images.split(batch)]
        return {name: torch.cat([getattr(each, name) for each in found])[:count].cpu().numpy() for name in _PUBLISHED}

    def _filled(self, pixels_BHW3: NDArray[Any]) -> Tensor:
        """Images in [-1, 1], filled up to the fixed batch with grey."""
        images = to_tensor(pixels_BHW3)
        missing = SCORING_BATCH - len(images)
        return torch.cat([images, images.new_zeros(missing, *images.shape[1:])]).to(self.device)
