"""Images of a trained model by their number: what sampling is, without files, actors or Ray.

The parts are apart so that one process can try many settings: a :class:`Decoder` belongs to the latents, a model to
its weights, and a :class:`Sampler` puts them together under one recipe's `sample` section.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs import Recipe
from infra import logs
from infra.artifacts import Artifact
from infra.device import computing, default_device, uploaded
from models.captured import Captured
from models.image_autoencoder import ImageAutoencoder
from tasks.data.pixels import Pixels, to_levels
from tasks.data.portions import DECODED_AT_ONCE, at_once
from tasks.data.statistics import LatentStatistics
from tasks.networks import DiffusionNetwork, ready, trained_autoencoder, trained_dit
from tasks.sampling.integrator import Integrator
from tasks.sampling.per_image import image_labels, image_noise
from tasks.stage import Context

_TEXTURE = ["z"]


@dataclass(frozen=True)
class Decoder:
    """From normalised latents to pixels."""

    tokenizer: ImageAutoencoder
    statistics: LatentStatistics

    @classmethod
    def of(cls, tokenizer: Artifact, model: Artifact, device: torch.device, compiled: bool = False) -> Decoder:
        """Of the artifacts of a tokenizer and of a diffusion network, which records its latents' statistics."""
        statistics = LatentStatistics.from_facts(model.manifest.facts, model.uri)
        return cls(ready(trained_autoencoder(tokenizer).to(device), compiled), statistics)

    def __call__(self, texture_BCHW: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) on the latents' device; decoded in equal pieces, so that a large batch takes no more
        memory there than a small one."""
        latents = self.statistics.denormalise(texture_BCHW, _TEXTURE)
        most = at_once(DECODED_AT_ONCE, latents.shape[-1] * self.tokenizer.downscale)
        pieces = latents.split(_at_once(len(latents), most))
        return torch.cat([to_levels(self.tokenizer.decode(piece)) for piece in pieces])


def _at_once(images: int, most: int) -> int:
    """The largest divisor that a decoder takes at once: equal pieces have one graph."""
    return next(count for count in range(min(images, most), 0, -1) if images % count == 0)


def model_of(context: Context) -> Artifact:
    """The artifact whose network is sampled: `train_dit`'s, or the map that `tune_fewstep` made of it."""
    return context.optional("tune_fewstep") or context.input("train_dit")


class Sampler:
    """Makes the images that a recipe's `sample` section describes, from given networks.

    recipe: of the sample; `train_dit` and the sizes must be those that the model was trained with.
    model: frozen, on `device`, made ready for the sample's precision (`compiling.ready`).
    """

    def __init__(self, recipe: Recipe, model: DiffusionNetwork, decoder: Decoder, device: torch.device) -> None:
        self.recipe, self.decoder, self.device = recipe, decoder, device
        self._decoding = "fp32" if recipe.sample.precision == "fp32" else "tf32"
        compute, precision = recipe.compute.actors, recipe.sample.precision
        captured = partial(Captured, tell=logs.say) if compute.cuda_graphs and device.type == "cuda" else None
        self.integrator = Integrator(recipe, model, lambda weak: ready(weak, compute.compile, precision), captured)
        self.texture = self.integrator.groups.slice_of("texture")
        """The channels of a latent that are decoded."""

    @classmethod
    def of(cls, context: Context) -> Sampler:
        """Of a `sample` job, with the networks of its input artifacts, on this process's device."""
        recipe, device = context.recipe, default_device()
        if device.type == "cpu":
            torch.set_num_threads(recipe.compute.actors.cpus_per_actor)
        compiled = recipe.compute.actors.compile
        trained = model_of(context)
        decoder = Decoder.of(context.input("train_vavae"), trained, device, compiled)
        model = trained_dit(trained, recipe.sample.ema, recipe.sample.ema_sigma).to(device)
        return cls(recipe, ready(model, compiled, recipe.sample.precision), decoder, device)

    def images(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], Pixels]:
        """Labels (B,) and pixels (B, H, W, 3) of these images; each depends on its index alone."""
        _, labels, pixels = next(self.stream([indices]))
        return labels, pixels

    @torch.inference_mode()
    def stream(
        self, batches: Iterable[NDArray[np.int64]]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Pixels]]:
        """Indices (B,), labels (B,) and pixels (B, H, W, 3) of one batch after the other.

        On an accelerator a batch is decoded and brought to the host on a stream of its own, while the next one is
        integrated.
        """
        waiting: tuple[NDArray[np.int64], NDArray[np.int64], _OnItsWay] | None = None
        for indices in batches:
            labels = self.labels(indices)
            latents = self.latents(indices, labels)[:, self.texture]
            with computing(self._decoding, self.device):
                decoded = _OnItsWay(self.decoder, latents)
            if waiting is not None:
                yield waiting[0], waiting[1], waiting[2].pixels()
            waiting = indices, labels, decoded
        if waiting is not None:
            yield waiting[0], waiting[1], waiting[2].pixels()

    def labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Labels (B,) of these images."""
        sample, classes = self.recipe.sample, self.recipe.data.classes
        return image_labels(sample.labels, indices, classes, sample.seed)

    def latents(self, indices: NDArray[np.int64], labels: NDArray[np.int64]) -> Tensor:
        """Normalised latents (B, C, h, w) of these images, all channel groups."""
        with computing(self.recipe.sample.precision, self.device):
            return self.integrated(indices, labels)

    def integrated(self, indices: NDArray[np.int64], labels: NDArray[np.int64]) -> Tensor:
        """:meth:`latents`, but in whatever precision is set."""

        def noise(shape: tuple[int, ...], draw: int) -> Tensor:
            values = image_noise(indices, shape, self.recipe.sample.seed, draw)
            return uploaded(torch.from_numpy(values), self.device)

        return self.integrator(uploaded(torch.from_numpy(labels), self.device), noise)


class _OnItsWay:
    """A batch that is being decoded and copied to the host."""

    def __init__(self, decoder: Decoder, texture_BCHW: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if texture_BCHW.device.type != "cuda":
            self._levels = decoder(texture_BCHW)
            return
        side = _side_stream(texture_BCHW.device)
        side.wait_stream(torch.cuda.current_stream(texture_BCHW.device))
        with torch.cuda.stream(side):
            texture_BCHW.record_stream(side)
            self._levels = decoder(texture_BCHW).to("cpu", non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(side)

    def pixels(self) -> Pixels:
        if self._done is not None:
            self._done.synchronize()
        return self._levels.numpy()


@lru_cache(maxsize=1)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
