"""Everything that goes on when training is resumed, between the engine that holds it and a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from configs.errors import UserError
from infra.storage import Storage
from tasks.training.checkpoints import FOLDER, Checkpoint
from tasks.training.ema import MAIN, Ema
from tasks.training.engine import MOMENTS, Engine
from tasks.training.guard import Guard
from tasks.training.metrics import Metrics
from tasks.training.trainee import Trainee

WEIGHTS = "weights"
ADVERSARY = "rival-"
"""What the parts of an adversary begin with in a checkpoint; the word is older than the name."""


@dataclass(frozen=True)
class Best:
    """The lowest validation score so far, and where it was."""

    score: float
    images_seen: int


@dataclass
class State:
    """Of one training, as its workers hold it together."""

    trainee: Trainee
    engine: Engine
    emas: Mapping[str, Ema]
    guard: Guard
    metrics: Metrics
    best: Best | None = None
    adversary: Engine | None = None

    @property
    def best_at(self) -> int | None:
        return None if self.best is None else self.best.images_seen

    def averaged(self) -> AbstractContextManager[None]:
        """The network with averaged weights, where there is an average, for as long as this lasts."""
        return self.emas[MAIN].worn(self.engine.changed) if MAIN in self.emas else nullcontext()

    def take_average(self) -> None:
        """From here on the network is trained from the average of its weights so far."""
        self.emas[MAIN].taken(self.engine.changed)
        self.engine.refresh()

    def average(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(parameter, whole tensor) of an average; all workers must iterate together."""
        for parameter, shard in self.emas[name].averages.items():
            yield parameter, self.engine.gather(parameter, shard)

    def gather(self, images_seen: int, moments: bool = True) -> Checkpoint | None:
        """Copied to rank 0's memory so that training need not wait for storage; None in other workers."""
        kept: dict[str, dict[str, Tensor]] = {WEIGHTS: {}}

        def keep(part: str, name: str, whole: Tensor) -> None:
            if dist.get_rank() == 0:
                kept.setdefault(part, {})[name] = whole.detach().to("cpu", copy=True).contiguous()

        for prefix, engine in self._engines():
            for name, local in engine.local().items():
                keep(prefix + WEIGHTS, name, engine.gather(name, local.detach()))
            for moment, name, whole in engine.moments() if moments else ():
                keep(prefix + moment, name, whole)
        for ema in self.emas:
            for name, whole in self.average(ema):
                keep(ema, name, whole)
        if dist.get_rank() != 0:
            return None
        stored = self.trainee.module.state_dict().keys()  # tables that a network makes anew are not in it
        for name, buffer in self.trainee.module.named_buffers():
            if name in stored:
                keep(WEIGHTS, name, buffer)
        values = {
            "facts": self.trainee.facts,
            "curves": {name: list(points) for name, points in self.metrics.curves.items()},
            "left_out": sorted(self.guard.left_out),
            "best": None if self.best is None else asdict(self.best),
        } | {f"{prefix}optimizer": engine.optimizer.kept() for prefix, engine in self._engines()}
        return Checkpoint(images_seen, kept, values)

    def restore(self, found: Checkpoint) -> None:
        """All but the weights, which the module had before the engine took it."""
        for prefix, engine in self._engines():
            engine.load_moments({moment: found.tensors[prefix + moment] for moment in MOMENTS})
            engine.optimizer.load_kept(found.values[f"{prefix}optimizer"])
        for name, ema in self.emas.items():
            ema.load({each: self.engine.shard(each, whole) for each, whole in found.tensors[name].items()})
        self.guard.resume(found.values["left_out"])
        self.metrics.resume(found.images_seen, found.values["curves"])
        self.best = None if found.values["best"] is None else Best(**found.values["best"])

    def _engines(self) -> list[tuple[str, Engine]]:
        """With what their parts begin with."""
        return [("", self.engine)] + ([(ADVERSARY, self.adversary)] if self.adversary is not None else [])


def check(found: Checkpoint, facts: Mapping[str, Any], out: Storage) -> None:
    """Raises UserError where a checkpoint was made for other data."""
    if found.values["facts"] != facts:
        raise UserError(
            f"the checkpoint in {out.url} was trained on other data ({found.values['facts']}, now {facts}): "
            f"delete {out.url}/{FOLDER} to begin anew"
        )
