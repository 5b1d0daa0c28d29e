"""Feature vectors and the judge's opinion of a set of images, whatever stage it comes from, by actors on Ray Data.

Images always run through the networks in batches of one fixed size, the last one filled up, so that a feature
does not depend on how the set is cut into files or spread over actors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.schema import ActorCompute, Foundation
from infra.artifacts import Artifact
from infra.progress import Bar
from tasks.judge import predict, trained_judge
from tasks.networks import default_device, load_foundation, trained_autoencoder
from tasks.pictures import Pixels, to_pixels, to_tensor
from tasks.pool import spread
from tasks.readout import BATCH, read_images, stretches

_LENGTH = 500
"""Images per unit of work."""


@dataclass(frozen=True)
class Findings:
    """What was found out about each image of a set, in the set's order."""

    labels: NDArray[np.int64]
    features: NDArray[np.float32]
    """(N, D)"""
    predictions: NDArray[np.int64] | None = None
    """Labels by the judge, where there is one."""
    psnr: NDArray[np.float64] | None = None
    """Peak signal-to-noise ratio in dB of each image's reconstruction, where images were reconstructed."""

    def first(self, count: int) -> Findings:
        """Of the first `count` images."""
        return Findings(*(None if values is None else values[:count] for values in vars(self).values()))  # type: ignore[arg-type]

    @property
    def consistency(self) -> float | None:
        """Share of images that the judge gives the label they have."""
        return None if self.predictions is None else float((self.predictions == self.labels).mean())

    @classmethod
    def joined(cls, pieces: Sequence[Findings]) -> Findings:
        columns = zip(*(vars(piece).values() for piece in pieces), strict=True)
        return cls(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Networks:
    """What an examiner loads: plain values and references."""

    size: int
    """Side in pixels at which images are looked at."""
    features: Foundation
    judge: Artifact | None = None
    tokenizer: Artifact | None = None


@dataclass(frozen=True)
class ImageSet:
    """Which images to look at."""

    artifact: Artifact
    prefix: str
    """Of its files: `train/`, `test/`, or `part-` for a sample."""
    limit: int
    reconstruct: bool = False
    """Look at what the tokenizer makes of them (the posterior's mean, decoded) instead of at themselves."""


def examine(what: str, sets: Mapping[str, ImageSet], networks: Networks, compute: ActorCompute) -> dict[str, Findings]:
    """Findings of every set, all by the same actors.

    Args:
        what: the name on the progress bar.
        sets: by the name their findings get.
        networks: what to look at them with.
        compute: actors to do it.

    Raises:
        UserError: a set is empty or damaged, or the networks cannot be loaded.
    """
    plan: list[dict[str, Any]] = [
        {"name": name, "set": chosen, "stretch": stretch}
        for name, chosen in sets.items()
        for stretch in stretches(chosen.artifact, chosen.prefix, chosen.limit, _LENGTH)
    ]
    found: dict[str, dict[int, Findings]] = {name: {} for name in sets}
    with Bar(what, sum(item["stretch"].rows for item in plan)) as bar:
        for name, first, findings in spread(plan, Examiner, (networks, compute.cpus_per_actor), compute):
            found[name][first] = findings
            bar.advance(len(findings.labels))
    return {name: Findings.joined([pieces[first] for first in sorted(pieces)]) for name, pieces in found.items()}


class Examiner:
    """An actor with the networks; takes one stretch of images per call."""

    def __init__(self, networks: Networks, threads: int = 1) -> None:
        self.device = default_device()
        if self.device.type == "cpu":
            torch.set_num_threads(threads)
        self.size = networks.size
        self.features = load_foundation(networks.features).to(self.device)
        self.judge = None if networks.judge is None else trained_judge(networks.judge).to(self.device)
        self.tokenizer = None if networks.tokenizer is None else trained_autoencoder(networks.tokenizer).to(self.device)

    def __call__(self, item: Mapping[str, Any]) -> tuple[str, int, Findings]:
        stretch, chosen = item["stretch"], item["set"]
        batches = read_images(chosen.artifact.storage, stretch, self.size, BATCH)
        found = [self.look(labels, pixels, chosen.reconstruct) for labels, pixels in batches]
        return item["name"], stretch.first, Findings.joined(found)

    @torch.inference_mode()
    def look(self, labels: NDArray[np.int64], pixels_BHW3: Pixels, reconstruct: bool = False) -> Findings:
        """Findings of at most one batch."""
        count, psnr = len(labels), None
        images = self._filled(pixels_BHW3)
        if reconstruct:
            assert self.tokenizer is not None, "reconstructing needs a tokenizer"
            reconstructed = to_pixels(self.tokenizer.decode(self.tokenizer.encode(images).mean))[:count]
            psnr = peak_signal_to_noise(pixels_BHW3, reconstructed)
            images = self._filled(reconstructed)
        features = self.features(images).mean(dim=(2, 3))[:count].float().cpu().numpy()
        predictions = None if self.judge is None else predict(self.judge, images)[:count]
        return Findings(labels, features, predictions, psnr)

    def _filled(self, pixels_BHW3: Pixels) -> Tensor:
        """Images in [-1, 1], filled up to the fixed batch with grey."""
        images = to_tensor(pixels_BHW3)
        missing = BATCH - len(images)
        return torch.cat([images, images.new_zeros(missing, *images.shape[1:])]).to(self.device)


def peak_signal_to_noise(one_BHW3: Pixels, other_BHW3: Pixels) -> NDArray[np.float64]:
    """PSNR in dB of each pair of uint8 images, (B,); equal images count as half a level apart."""
    gap = one_BHW3.astype(np.float64) - other_BHW3
    return 10.0 * np.log10(255.0**2 / np.maximum(np.square(gap).mean(axis=(1, 2, 3)), 0.25))
