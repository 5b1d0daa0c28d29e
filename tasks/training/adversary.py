"""A second network that is trained against the first, in the same steps, by an optimizer of its own.

Whatever engine trains the first, the adversary is plain data parallel: it is small, and DeepSpeed's
engines each want to be the only one. A batch that is left out for the first network is left out for
the adversary too; one that is bad for the adversary alone leaves the adversary as it was, and the
guard is told. Progress stays images, however many optimizers step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from configs.compute import TrainCompute
from configs.training import Training
from tasks.training.engine import Engine, build_engine


class Adversary(Protocol):
    """What a trainee gives as its `adversary`; built like the trainee, alike in every worker."""

    module: nn.Module
    """Called as `module(**inputs)`; gives named scalars, of which `total` is minimised."""

    def inputs(self, given: Mapping[str, Any], terms: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Arguments of `module` after a pass of the trainee's module over `given` that gave `terms`; None where the
        adversary does not train yet.
        """
        ...


class AdversarialTraining:
    """Advances both networks: the trainee's, then its adversary."""

    def __init__(
        self, engine: Engine, adversary: Adversary, section: Training, compute: TrainCompute, device: torch.device
    ) -> None:
        self._main, self._adversary = engine, adversary
        plain = compute.model_copy(update={"engine": "plain", "zero_stage": 0})
        self.engine = build_engine(adversary.module.to(device).train(), section, plain, device)
        """The adversary's."""

    def advance(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """As an engine does; the adversary's terms are named `rival_…`."""
        terms = self._main.advance(inputs)
        given = self._adversary.inputs(inputs, terms)
        if given is None:
            return terms
        main, own = self._main.optimizer, self.engine.optimizer
        own.veto = main.bad
        for group in own.param_groups:
            group["lr"] = main.param_groups[0]["lr"]
        found = self.engine.advance(given)
        main.event = torch.maximum(main.event, own.event)
        return terms | {f"rival_{name}": value.detach() for name, value in found.items()}
