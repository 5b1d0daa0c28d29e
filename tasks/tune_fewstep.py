"""Stage `tune_fewstep`: a flow map of a trained network, for samples of a few passes
(`models/flow_map.py`).

It reads no images and no latents: the trained network's samples are what it learns from, so that
given weights are tuned as trained ones are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from configs import Recipe
from configs.fewstep import TuneFewstep
from infra.device import autocast
from infra.weights import check_pretrained, identities, load_pretrained
from models.flow_map import TrainableFlowMap
from models.solvers import sample as solve
from models.solvers import time_grid
from tasks.loading.loader import Batch
from tasks.networks import build_clock, build_flow_map, channel_groups, trained_dit
from tasks.randomness import ImageNumbers
from tasks.sampling.integrator import build_guidance
from tasks.stage import Context, Outcome
from tasks.training.launch import train
from tasks.training.stage import TrainedStage
from tasks.training.trainee import Trainee


def section(recipe: Recipe) -> TuneFewstep:
    assert recipe.tune_fewstep is not None  # the DAG has the stage where the recipe has the section
    return recipe.tune_fewstep


def run(context: Context) -> Outcome:
    """Tune the map on the teacher's samples, or take that of `tune_fewstep.pretrained`."""
    return train(context, section(context.recipe))


class Labels:
    """Endless, restartable batches of numbers and labels, as `Loader` gives them of images."""

    def __init__(self, classes: int, batch: int, seed: int) -> None:
        self.classes, self.batch = classes, batch
        self._draw = ImageNumbers(seed, "label")

    def stream(self, cursor: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Slice `rank` of `world` of every batch from this many images on."""
        share = self.batch // world
        while True:
            positions = np.arange(cursor + rank * share, cursor + (rank + 1) * share)
            labels = (self._draw.uniform(positions).double() * self.classes).long().numpy()
            cursor += self.batch
            yield Batch(cursor, positions, [], labels, {})

    def keys_at(self, cursor: int) -> list[str]:
        """What the images of the batch at this cursor are called."""
        return [f"noise {number}" for number in range(cursor, cursor + self.batch)]


class FlowMap(Trainee):
    """The trainee: the network of `train_dit` as a map, that network as its teacher."""

    def __init__(self, context: Context) -> None:
        recipe, given = context.recipe, context.input("train_dit")
        self.section = section(recipe)
        self.groups, self.clock = channel_groups(recipe), build_clock(recipe)
        self.teacher: nn.Module = trained_dit(given, ema=True)
        self.network: nn.Module = build_flow_map(recipe)
        known = self.network.state_dict().keys()
        own = {name: value for name, value in self.teacher.state_dict().items() if name in known}
        self.network.load_state_dict(own, strict=False)
        if self.section.pretrained is not None:
            load_pretrained(self.network, self.section.pretrained)
        self.module: nn.Module = TrainableFlowMap(self.network, self.groups)
        self.facts = {name: fact for name, fact in given.manifest.facts.items() if name.startswith("statistics")}
        self.loader: Any = Labels(recipe.data.classes, self.section.batch or 1, self.section.seed)
        self.shape = (self.groups.channels, recipe.latent_size, recipe.latent_size)
        self.noise = ImageNumbers(self.section.seed, "noise")
        self.steps = {n: ImageNumbers(self.section.seed, f"step of {n}") for n in self.section.evaluations}
        self.guide = build_guidance(self.section.guidance, self.groups, recipe.data.classes)

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        labels_B = torch.from_numpy(batch.labels).to(device)
        points = self._points(self.noise.normal(batch.positions, self.shape).to(device), labels_B)
        times_SG = self.clock.at(time_grid(self.section.steps, self.clock.span))[0]
        found: dict[str, list[Tensor]] = {name: [] for name in ("x_BCHW", "t_BG", "until_BG", "end_BCHW")}
        rows = torch.arange(len(labels_B))
        for evaluations, draw in self.steps.items():
            length = self.section.steps // evaluations
            start_B = (draw.uniform(batch.positions).double() * evaluations).long() * length
            for end, names in ((start_B, ("x_BCHW", "t_BG")), (start_B + length, ("end_BCHW", "until_BG"))):
                found[names[0]].append(points[end.to(device), rows.to(device)])
                found[names[1]].append(times_SG[end].to(device))
        return {name: torch.cat(each) for name, each in found.items()} | {
            "y_B": labels_B.repeat(len(self.section.evaluations))
        }

    @torch.no_grad()
    def _points(self, noise_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        """The teacher's way, (steps + 1, B, C, H, W) in float32, noise first."""
        points = [noise_BCHW]
        teacher = self.guide(self.teacher.to(noise_BCHW.device))
        with autocast(self.section.teacher_precision, noise_BCHW.device):
            solve(
                teacher,
                noise_BCHW,
                labels_B,
                clock=self.clock,
                groups=self.groups,
                solver=self.section.solver,
                steps=self.section.steps,
                seen=points.append,
            )
        return torch.stack(points).float()


def external(recipe: Recipe) -> dict[str, str] | None:
    """Which file of a map it takes or goes on from, where one is given."""
    return identities(pretrained=section(recipe).pretrained) or None


def check(recipe: Recipe) -> None:
    """Raises UserError where a given map does not fit the recipe."""
    check_pretrained(lambda: build_flow_map(recipe), section(recipe).pretrained, "tune_fewstep.pretrained")


STAGE = TrainedStage(
    name="tune_fewstep",
    version=1,
    sections=("tune_fewstep",),
    inputs=("train_dit",),
    run=run,
    external=external,
    check=check,
    present=lambda recipe: recipe.tune_fewstep is not None,
    section=section,
    trainee=FlowMap,
)
