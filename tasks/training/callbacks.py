"""What happens between steps beside training itself: scores, pictures, snapshots, and what people ask for.

Every worker has the same callbacks and calls them at the same images. None draws from training's random numbers and
none changes a weight, so that a training with them is the same in every bit as one without.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from configs.training import Validation as ValidationSection
from infra import logs
from tasks.snapshots import kept_file, snapshot_file
from tasks.training.checkpoints import Checkpoints
from tasks.training.ema import MAIN, sigma_name
from tasks.training.profiling import Profiler
from tasks.training.requests import LEAVE, PROFILE, SAVE, Requests
from tasks.training.state import Best, State
from tasks.training.trainee import Preview
from tasks.training.validation import Validation


class StepSpan:
    """Between two steps: what is behind, and what callbacks want next."""

    def __init__(self, before: int, images_seen: int, total: int) -> None:
        self.before, self.images_seen, self.last = before, images_seen, images_seen >= total
        self.save = self.leave = self.stop = False
        """Write a checkpoint; leave after it; end the training here, as if it were done."""

    def passed(self, every: int | None) -> bool:
        """Whether a multiple of `every` images was just passed, or the end; None is passed at every look."""
        return every is None or self.last or self.images_seen // every > self.before // every


class Callback(Protocol):
    every: int | None
    """Images between calls; None calls at every look."""

    def __call__(self, now: StepSpan, state: State) -> None: ...


class Asked:
    """Does what people and machines ask for while training runs."""

    every: int | None = None

    def __init__(self, requests: Requests, profiler: Profiler | None, profile_at: int | None) -> None:
        self._requests, self._profiler, self._profile_at = requests, profiler, profile_at

    def __call__(self, now: StepSpan, state: State) -> None:
        wishes = self._requests.look()
        now.save |= bool(wishes & {SAVE, LEAVE})
        now.leave |= LEAVE in wishes
        told = self._profile_at is not None and now.images_seen >= self._profile_at
        if told:
            self._profile_at = None
        if self._profiler is not None and (told or PROFILE in wishes):
            self._profiler.begin()


class Scores:
    """Validates; the best network so far is kept, and training stops when patience is at its end."""

    def __init__(self, validation: Validation, section: ValidationSection) -> None:
        self.every: int | None = section.every
        self._validation, self._patience = validation, section.patience

    def __call__(self, now: StepSpan, state: State) -> None:
        with state.averaged():
            found = self._validation(state.trainee)
        state.metrics.log({f"validation/{name}": value for name, value in found.items()}, now.images_seen)
        score = found["total"]
        if math.isfinite(score) and (state.best is None or score < state.best.score):
            state.best = Best(score, now.images_seen)
            now.save = True
        elif state.best and self._patience is not None and now.images_seen - state.best.images_seen >= self._patience:
            now.stop = True
            if dist.get_rank() == 0:
                logs.say(
                    f"stopping at {now.images_seen:,} images: no better validation score than {state.best.score:.6g} "
                    f"at {state.best.images_seen:,}"
                )


class Pictures:
    """Shows what the network in training makes, always of the same noise and labels."""

    def __init__(self, preview: Preview, every: int) -> None:
        self.every: int | None = every
        self._preview = preview

    def __call__(self, now: StepSpan, state: State) -> None:
        with state.averaged():
            picture, figures = self._preview()
        state.metrics.log({f"preview/{name}": value for name, value in figures.items()}, now.images_seen)
        if dist.get_rank() == 0:
            state.metrics.sender.file(f"preview/{now.images_seen:014d}.png", picture)


class Snapshots:
    """Stores averages with a power profile, from which others are had after training (`models/power_ema.py`)."""

    def __init__(self, checkpoints: Checkpoints, every: int, sigmas: tuple[float, ...]) -> None:
        self.every: int | None = every
        self._checkpoints, self._sigmas = checkpoints, sigmas

    def __call__(self, now: StepSpan, state: State) -> None:
        for sigma in self._sigmas:
            kept = _averaged_network(state, sigma_name(sigma))
            if dist.get_rank() == 0:
                self._checkpoints.snapshot(snapshot_file(now.images_seen, sigma), kept)


class KeptAverages:
    """Stores the average that is sampled from, at the images that the recipe names, as a network of its own."""

    def __init__(self, checkpoints: Checkpoints, at: tuple[int, ...]) -> None:
        self.every: int | None = math.gcd(*at)
        self._checkpoints, self._at = checkpoints, at

    def __call__(self, now: StepSpan, state: State) -> None:
        if now.images_seen not in self._at:
            return
        kept = _averaged_network(state, MAIN)
        if dist.get_rank() == 0:
            rest = state.trainee.network.state_dict()  # tables that are never trained
            kept |= {name: rest[name].to("cpu", copy=True).contiguous() for name in rest if name not in kept}
            self._checkpoints.snapshot(kept_file(now.images_seen), kept)


def _averaged_network(state: State, average: str) -> dict[str, Tensor]:
    """Trained weights of an average in rank 0's memory, under the names that the network has by itself: that is who
    reads them. All workers must call it together; others get nothing."""
    names = {id(parameter): name for name, parameter in state.trainee.network.named_parameters()}
    own = {name: names.get(id(parameter)) for name, parameter in state.trainee.module.named_parameters()}
    kept: dict[str, Tensor] = {}
    for name, whole in state.average(average):
        found = own[name]
        if dist.get_rank() == 0 and found is not None:
            kept[found] = whole.to("cpu", copy=True).contiguous()
    return kept
