"""Random weights of the true Inception layout in a file: the genuine ones are in no package."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class _Untrained(FeatureExtractorInceptionV3):
    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        """Keeps the random weights it was built with."""


def put_inception(folder: Path, seed: int = 0) -> Path:
    """A file of random weights in torch-fidelity's layout, scaled to keep signals alive through the depth."""
    torch.manual_seed(seed)
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = _Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = folder / "inception.pth"
    torch.save(network.state_dict(), path)
    return path
