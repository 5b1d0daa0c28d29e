"""What one stage trains: the part in which the trained stages differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from configs.training import Training
from tasks.loading.loader import Batch, Loader

if TYPE_CHECKING:
    from tasks.training.adversary import Adversary

HELD_OUT = "test"
HELD_OUT_NUMBERS = 1 << 62
"""First image number of held-out images; training never reaches it."""


class Trainee(Protocol):
    """Built alike in every worker, its initial weights from the seed alone. Subclass it for the defaults."""

    section: Training
    module: nn.Module
    """Called as `module(**inputs)`; gives named scalars, of which `total` is minimised. Vectors are not logged, but
    for `by_time/{name}`, (2, B): times in [0, 1] and an error at each."""
    network: nn.Module
    """The part of it that is kept."""
    loader: Loader
    facts: dict[str, Any]
    """Goes into checkpoints, where another value is refused, and into the manifest."""
    adversary: Adversary | None = None
    """A second network that is trained against the first."""

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """A worker's slice of a batch as arguments of `module`, on the device. Depends on the batch alone: a thread may
        call it ahead of the step (`device_feed.py`), validation meanwhile from another."""
        ...

    def held_out(self) -> Loader:
        """Batches of the test split, of the columns that are trained on. Raises UserError where there is none."""
        loader = self.loader
        return Loader(
            loader.reader.artifact,
            HELD_OUT,
            loader.columns,
            loader.batch,
            seed=0,
            crop=loader.crop and loader.crop.centred,
            ahead=1,
            keys=False,
            pin=loader.pin,
        )

    def scores(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        """Figures of the finished network for people; none by default."""
        return {}

    @property
    def kept(self) -> nn.Module:
        """Whose tensors, by their published names, the artifact keeps: the network, or what it is a cover of."""
        return self.network

    def documents(self) -> dict[str, bytes]:
        """Files beside the network, by name, that say how it is built where the recipe does not; none by default."""
        return {}

    def objective_tensors(self) -> dict[str, Tensor]:
        """Tensors of the objective that another training can go on from; they become the artifact's
        `objective.safetensors`. None by default."""
        return {}


class Preview(Protocol):
    """What people see of a network in training; all workers call it together."""

    def __call__(self) -> tuple[bytes, dict[str, float]]:
        """A picture as PNG and figures, for rank 0 to log. Leaves weights and random numbers as they are."""
        ...


def is_held_out(batch: Batch) -> bool:
    """Whether validation asks, and not training."""
    return bool(batch.positions[0] >= HELD_OUT_NUMBERS)


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """A worker's slice of a batch in stretches of `size` rows."""
    for start in range(0, len(batch.positions), size):
        rows = slice(start, start + size)
        arrays = {name: values[rows] for name, values in batch.arrays.items()}
        yield replace(
            batch,
            positions=batch.positions[rows],
            keys=batch.keys[rows],
            labels=batch.labels[rows],
            arrays=arrays,
        )
