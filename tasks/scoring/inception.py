"""The Inception network that FID, sFID, KID and the Inception score are defined by, from torch-fidelity.

Its published scores rest on one set of weights, converted from the TensorFlow graph of December 2015. Only with that
very file do scores get these names; with any other they are called after `inception_unverified`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs.errors import UserError, brief
from infra.weights import fetch, file_hash
from models.files import read_content
from tasks.scoring.distances import score_name

GENUINE = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of `weights-inception-2015-12-05-6726825d.pth`, which torch-fidelity and pytorch-fid both publish."""
POOL, SPATIAL = 2_048, 2_023
"""Widths of the two kinds of features: the last pooling, and 17 × 17 places of 7 channels."""
_SPATIAL_CHANNELS = 7
_NAMES = {
    "frechet": "fid",
    "spatial_frechet": "sfid",
    "kernel_distance": "kid",
    "class_score": "inception_score",
    "precision": "precision_inception",
    "recall": "recall_inception",
}


class InceptionFeatures(NamedTuple):
    pool: Tensor
    """(B, 2048) float32: the last pooling, of FID, KID, precision and recall."""
    spatial: Tensor
    """(B, 2023) float32: the first 7 channels of the seventh mixed block's 1 × 1 convolution (17 × 17 places, row by
    row, channels last), as ADM's evaluator takes them for sFID."""
    logits: Tensor
    """(B, 1008) float32, without the bias: what the Inception score was defined with."""


class Inception(nn.Module):
    """uint8 images (B, 3, H, W) of any size → :class:`InceptionFeatures`; resizing is the network's own.

    location: path or URL of weights in torch-fidelity's layout.
    Raises UserError where they cannot be had, are damaged or do not fit.
    """

    def __init__(self, location: str) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # It reads its file with pickle unrestrained: give it a file in memory that we know to hold tensors only.
        safe = io.BytesIO()
        torch.save(_tensors(location), safe)
        safe.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
            )
        except RuntimeError as error:
            raise UserError(
                f"evaluate.inception.weights {location}: not the tensors of torch-fidelity's Inception "
                f"({brief(error, 160)}); give its weights-inception-2015-12-05-6726825d.pth"
            ) from None
        self._places: list[Tensor] = []
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self.requires_grad_(False)
        self.eval()

    def _keep(self, _module: nn.Module, _inputs: Any, output_BCHW: Tensor) -> None:
        self._places = [output_BCHW[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)]

    @torch.inference_mode()
    def forward(self, images_B3HW: Tensor) -> InceptionFeatures:
        pool, logits = self.network(images_B3HW)
        spatial = self._places.pop()
        return InceptionFeatures(pool, spatial, logits)


@dataclass(frozen=True)
class Identity:
    """Which weights these are, found out before anything runs."""

    sha256: str

    @classmethod
    def at(cls, location: str) -> Identity:
        """Raises UserError where there is no such file."""
        path = fetch(location)
        return cls(file_hash(path))

    @property
    def genuine(self) -> bool:
        return self.sha256 == GENUINE

    def name(self, score: str) -> str:
        """What to call a score on these features: `frechet` → `fid`, if they are what FID is defined by."""
        return _NAMES[score] if self.genuine else score_name(score, "inception_unverified")


def _tensors(location: str) -> dict[str, Tensor]:
    path = fetch(location)
    try:
        content = read_content(path).values
    except ValueError as error:
        said = str(error).removeprefix(f"{path}: ")
        raise UserError(f"evaluate.inception.weights {location}: {said}") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"evaluate.inception.weights {location}: expected a dictionary of tensors; fetch it again")
    return content
