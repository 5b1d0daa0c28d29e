"""What people see of a diffusion transformer in training: pictures of the same noise and labels, and a first score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs import Recipe
from configs.sampling import AutoGuidance, NoGuidance
from infra.artifacts import Artifact
from infra.device import autocast, default_device
from tasks.data.images import images
from tasks.data.pixels import Pixels, to_tensor
from tasks.data.statistics import LatentStatistics
from tasks.drawing import pictures
from tasks.foreign.foundations import vectors
from tasks.networks import DiffusionNetwork, load_foundation, trained_autoencoder
from tasks.sampling.per_image import shown_per_class
from tasks.sampling.sampler import Decoder, Sampler
from tasks.scoring.distances import FrechetFrom, score_name
from tasks.scoring.gaussian import Gaussian
from tasks.stage import Context

COLUMNS, ROWS = 10, 4
_MOST_STEPS = 50
Indices = NDArray[np.int64]


class DiffusionPreview:
    """A :class:`Preview` of the network that a `train_dit` job trains.

    Images are those that `sample` would make of the recipe with these weights, but for two things:
    a solver that chooses its own steps or takes many gives way to Euler with at most 50 (workers
    must stay together, and training wait no longer than it must), and autoguidance, whose weak
    network may not be trained yet, to no guidance. Our choice. Every worker makes its share; the
    network is used as it is: in parts where ZeRO holds it so, neither compiled nor captured, in the
    precision of its training.
    """

    def __init__(self, context: Context, network: DiffusionNetwork, statistics: LatentStatistics) -> None:
        recipe = simplified(context.recipe)
        latents = context.input("encode")
        made_from = latents.manifest.inputs
        tokenizer = Artifact(context.job.root, "train_vavae", made_from["train_vavae"])
        self._device, self._recipe, self._network = default_device(), recipe, network
        decoder = Decoder(trained_autoencoder(tokenizer).to(self._device), statistics)
        self._sampler = Sampler(recipe, network, decoder, self._device)
        self._scored = recipe.compute.train.preview_scored
        if self._scored:
            self._features = load_foundation(recipe.evaluate.features).to(self._device)
            self._real = Artifact(context.job.root, "shard", made_from["shard"])
            self._reference: FrechetFrom | None = None

    @torch.no_grad()
    def __call__(self) -> tuple[bytes, dict[str, float]]:
        self._network.eval()
        try:
            rows = self._shown()
            shown = [index for row in rows for index in row]
            sheet = _gathered(self._made(shown), len(shown))
            figures = {}
            if self._scored:
                found = _gathered(self._features_of(self._made(range(self._scored))), self._scored)
                name = score_name("frechet", self._recipe.evaluate.features.label)
                figures = {f"{name}_{self._scored}": self._distance().of_rows(found)}
        finally:
            self._network.train()
        return pictures.png(pictures.grid(sheet, columns=len(rows[0]))), figures

    def _shown(self) -> list[list[int]]:
        """Numbers of the images in the picture, one class per column."""
        labels = self._sampler.labels(np.arange(self._recipe.data.classes * ROWS))
        return shown_per_class(labels, COLUMNS, ROWS)

    def _made(self, indices: Sequence[int]) -> Pixels:
        """This worker's share of these images, (b, H, W, 3): every so-many-th, the last shares filled up so that all
        workers run the network equally often."""
        own = _share(np.asarray(indices))
        batch = min(self._recipe.sample.batch, len(own))
        return np.concatenate([self._images(own[start : start + batch]) for start in range(0, len(own), batch)])

    def _images(self, indices: Indices) -> Pixels:
        # The training's precision, of which the process has set what is no autocast.
        with autocast(self._recipe.train_dit.precision, self._device):
            latents = self._sampler.integrated(indices, self._sampler.labels(indices))
        return self._sampler.decoder(latents[:, self._sampler.texture]).cpu().numpy()

    def _features_of(self, pixels_BHW3: Pixels) -> NDArray[np.float32]:
        section = self._recipe.evaluate.features
        found = [
            vectors(section, self._features, to_tensor(piece).to(self._device)).float().cpu().numpy()
            for piece in np.array_split(pixels_BHW3, -(-len(pixels_BHW3) // self._recipe.sample.batch))
        ]
        return np.concatenate(found)

    def _distance(self) -> FrechetFrom:
        """From as many images of the test split, looked at once."""
        if self._reference is None:
            own: list[NDArray[np.float32]] = []
            real = images(self._real, "test", self._recipe.image.size, self._scored)
            for number, (_, pixels) in enumerate(real):
                if number % dist.get_world_size() == dist.get_rank():
                    own.append(self._features_of(pixels))
            width = self._recipe.evaluate.features.feature_dim
            everyone: list[NDArray[np.float32]] = [np.zeros((0, width), np.float32)] * dist.get_world_size()
            dist.all_gather_object(everyone, np.concatenate([everyone[0], *own]))
            self._reference = FrechetFrom(Gaussian.of(np.concatenate(everyone)))
        return self._reference


def simplified(recipe: Recipe) -> Recipe:
    """The recipe whose sample a preview shows."""
    sample = recipe.sample
    guided = [sample.guidance, *(stage.guidance for stage in sample.stages)]
    plain = {"guidance": NoGuidance()} if any(isinstance(asked, AutoGuidance) for asked in guided) else {}

    def fewer(steps: int | None) -> int | None:
        return None if steps is None else min(steps, _MOST_STEPS)

    stages = tuple(
        stage.model_copy(update={"solver": None, "steps": fewer(stage.steps), **plain}) for stage in sample.stages
    )
    changes = {"solver": "euler", "steps": fewer(sample.steps), "stages": stages, **plain}
    as_it_is = recipe.compute.actors.model_copy(update={"compile": False, "cuda_graphs": False})
    compute = recipe.compute.model_copy(update={"actors": as_it_is})
    return recipe.model_copy(update={"sample": sample.model_copy(update=changes), "compute": compute})


def _share(indices: Indices) -> Indices:
    """This worker's: every so-many-th, as many as any other worker has."""
    world = dist.get_world_size()
    return np.resize(indices, -(-len(indices) // world) * world)[dist.get_rank() :: world]


def _gathered(own: NDArray, count: int) -> NDArray:
    """What all workers made of their shares of `count` images, in the order of the images."""
    shares: list[NDArray] = [own] * dist.get_world_size()
    dist.all_gather_object(shares, own)
    return np.stack(shares, axis=1).reshape(-1, *own.shape[1:])[:count]
