"""The toy trained against a judge that tells what it makes from what it should make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from configs.training import Training
from tasks.loading.loader import Batch
from tests.helpers.toy_training import BATCH, Run, Toy, ToyTrainee

BEGIN = 2 * BATCH
BLIND = frozenset({8 * BATCH + 3})
"""What the judge makes of this image is no number."""


class Maker(Toy):
    def forward(self, x: Tensor, noise: Tensor, judge: Any = None) -> dict[str, Tensor]:
        terms = super().forward(x, noise)
        made = self.net(x + 0.1 * noise)
        if judge is not None:
            terms["total"] = terms["total"] - 0.1 * judge(made).float().mean()
        return terms | {"made": made.detach()}


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 1))

    def frozen(self, made: Tensor) -> Tensor:
        held = {name: parameter.detach() for name, parameter in self.net.named_parameters()}
        return functional_call(self.net, held, (made,))

    def forward(self, real: Tensor, made: Tensor) -> dict[str, Tensor]:
        return {"total": ((1 - self.net(real)).relu() + (1 + self.net(made)).relu()).float().mean()}


class ToyAdversary:
    def __init__(self) -> None:
        self.module: nn.Module = Judge()
        self.blind = False

    def inputs(self, given: Mapping[str, Any], terms: Mapping[str, Tensor]) -> dict[str, Any] | None:
        if "judge" not in given:
            return None
        return {"real": given["x"].sin() * (torch.nan if self.blind else 1.0), "made": terms["made"]}


class AdversarialTrainee(ToyTrainee):
    blind: frozenset[int] = frozenset()

    def __init__(self, section: Training, run: Run) -> None:
        super().__init__(section, run)
        self.module = self.network = Maker()
        self.adversary = ToyAdversary()

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        given = super().inputs(batch, device)
        if self.module.training and batch.images_seen > BEGIN:
            given["judge"] = self.adversary.module.frozen
        self.adversary.blind = bool(np.isin(batch.positions, list(self.blind)).any())
        return given


class BlindAdversarialTrainee(AdversarialTrainee):
    blind = BLIND
