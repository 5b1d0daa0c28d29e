"""Moving averages of weights in float32, beside the network: any number of them, and snapshots of some."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from configs.training import Training
from models.power_ema import exponent, new_share

MAIN = "ema"
"""The average of `ema_decay`, which is sampled from."""

Share = Callable[[int, int], float]
"""Of new weights in an average, from the images seen before and after the step that made them."""


class Ema:
    """Starts as a copy and follows after each good step: e += share (w - e) (papers.md 1.5).

    local: the weights as this worker holds them, by name; the averages are held alike.
    """

    def __init__(self, local: Mapping[str, Tensor], share: Share) -> None:
        self.share = share
        self._local = dict(local)
        self.averages = {name: tensor.detach().float().clone() for name, tensor in local.items()}

    @torch.no_grad()
    def update(self, before: int, after: int, bad: Tensor) -> None:
        """Follow the weights, unless `bad` (a scalar on their device, 0 or 1) says that the step was left out."""
        # One pass over memory, and one that reads `bad` by itself: plain SGD with the weights for gradients, upwards,
        # and a decay of 1 is this very formula.
        torch._fused_sgd_(
            list(self.averages.values()),
            [tensor.detach() for tensor in self._local.values()],
            [],
            lr=self.share(before, after),
            weight_decay=1.0,
            maximize=True,
            momentum=0.0,
            dampening=0.0,
            nesterov=False,
            is_first_step=False,
            found_inf=bad,
        )

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint. Raises KeyError where it lacks a weight."""
        for name, average in self.averages.items():
            average.copy_(averages[name])

    def taken(self, changed: Callable[[], None]) -> None:
        """From here on the network has the averages as its weights; `changed` as in :meth:`worn`."""
        self._write(self.averages, changed)

    @contextmanager
    def worn(self, changed: Callable[[], None]) -> Iterator[None]:
        """The network with the averages as its weights, for as long as this lasts.

        changed: to be told of weights that were written (`Engine.changed`).
        """
        kept = {name: tensor.detach().clone() for name, tensor in self._local.items()}
        self._write(self.averages, changed)
        try:
            yield
        finally:
            self._write(kept, changed)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor], changed: Callable[[], None]) -> None:
        for name, tensor in self._local.items():
            tensor.copy_(values[name])
        changed()


def averages(section: Training, local: Mapping[str, Tensor]) -> dict[str, Ema]:
    """All averages that a recipe asks for, by name."""
    shares: dict[str, Share] = {}
    if section.ema_decay is not None:
        shares[MAIN] = _constant(section.ema_decay, section.ema_rampup)
    shares |= {decay_name(decay): _constant(decay, section.ema_rampup) for decay in section.ema_decays}
    shares |= {sigma_name(sigma): _power(sigma) for sigma in section.ema_sigmas}
    return {name: Ema(local, share) for name, share in shares.items()}


def decay_name(decay: float) -> str:
    """Of the average in checkpoints, and of its file in the artifact without `.safetensors`."""
    return f"{MAIN}-decay-{decay:g}"


def sigma_name(sigma_rel: float) -> str:
    return f"{MAIN}-sigma-{sigma_rel:g}"


def _constant(decay: float, rampup: float | None) -> Share:
    if rampup is None:
        return lambda before, after: 1 - decay

    def share(before: int, after: int) -> float:
        halflife = max(rampup * before, 1e-8)  # in images; before the first step there is nothing to remember
        return 1 - min(decay, 0.5 ** ((after - before) / halflife))

    return share


def _power(sigma_rel: float) -> Share:
    gamma = exponent(sigma_rel)
    return lambda before, after: new_share(gamma, before, after)
