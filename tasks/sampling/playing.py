"""Pictures of a trained model under many settings, and how an image forms on the way.

What a picture shows depends on its recipe and settings alone: `latentforge sample` draws the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs import Recipe, UserError
from configs.load import assign, read_recorded, validate
from configs.sampling import Sample
from infra.artifacts import Artifact
from infra.device import computing, default_device
from infra.inventory import Entry
from tasks.data.pixels import Pixels
from tasks.drawing import pictures
from tasks.networks import DiffusionNetwork, ready, trained_dit
from tasks.sampling.sampler import Decoder, Sampler

_MOMENTS = 24
_SPREAD = 2.5
"""Standard deviations of a latent from black to white."""


class Stopped(Exception):
    """Raised by who looks on, to end a picture that nobody waits for any more."""


@dataclass(frozen=True)
class Moment:
    """What a model expects on the way, of all images of the picture."""

    times: dict[str, float]
    """Of each channel group, 0 (noise) to 1 (data)."""
    texture: Pixels
    """Decoded, tiled as the picture will be."""
    semantics: Pixels | None
    """The first three semantic channels as red, green and blue; None where there are none."""


def for_picture(sample: Sample, classes: Sequence[int], seed: int, rows: int) -> tuple[str, ...]:
    """Overrides that make a recipe's sample `rows` images of each class, in this process."""
    return (
        f"sample.labels={list(classes)}",
        f"sample.seed={seed}",
        f"sample.batch={min(rows * len(classes), sample.batch)}",
        f"compute.actors.cpus_per_actor={os.cpu_count() or 1}",
    )


def drawn(sampler: Sampler, count: int, columns: int) -> Pixels:
    """The first `count` images of a sample, tiled."""
    batch = sampler.recipe.sample.batch
    made = [sampler.images(np.arange(start, start + batch))[1] for start in range(0, count, batch)]
    return pictures.grid(np.concatenate(made)[:count], columns=columns)


class Player:
    """The networks of one `train_dit` artifact, loaded when they are first needed."""

    def __init__(self, model: Artifact, tokenizer: Artifact) -> None:
        self.model, self._tokenizer, self._device = model, tokenizer, default_device()
        self._networks: tuple[tuple[Any, ...], DiffusionNetwork, Decoder] | None = None

    def recipe(self, settings: Sequence[str] = ()) -> Recipe:
        """The model's own under `sample.…=value`. Raises UserError on what cannot be."""
        return laid_upon(self.model, settings)

    def draw(
        self,
        classes: Sequence[int],
        rows: int,
        seed: int,
        settings: Sequence[str] = (),
        tell: Callable[[Moment], None] | None = None,
    ) -> Pixels:
        """`rows` images of each class, one class per column: uint8 (H, W, 3).

        tell: is shown moments on the way, few of many steps, and may raise :class:`Stopped`.
        """
        own = self.recipe(settings)
        recipe = self.recipe([*settings, *for_picture(own.sample, classes, seed, rows)])
        if self._device.type == "cpu":
            torch.set_num_threads(recipe.compute.actors.cpus_per_actor)
        network, decoder = self._loaded(recipe)
        sampler = Sampler(recipe, network, decoder, self._device)
        if tell is not None:
            sampler.integrator.watch = Watcher(sampler, rows * len(classes), len(classes), tell)
        return drawn(sampler, rows * len(classes), len(classes))

    def _loaded(self, recipe: Recipe) -> tuple[DiffusionNetwork, Decoder]:
        sample, compiled = recipe.sample, recipe.compute.actors.compile
        asked = sample.ema, sample.ema_sigma, sample.precision, compiled
        if self._networks is None or self._networks[0] != asked:
            network = trained_dit(self.model, sample.ema, sample.ema_sigma).to(self._device)
            decoder = Decoder.of(self._tokenizer, self.model, self._device, compiled)
            self._networks = asked, ready(network, compiled, sample.precision), decoder
        return self._networks[1], self._networks[2]


class Watcher:
    """Shows few of the moments that an integrator comes through: the first, and one for each step
    of the time."""

    def __init__(self, sampler: Sampler, count: int, columns: int, tell: Callable[[Moment], None]) -> None:
        self._sampler, self._count, self._columns, self._tell = sampler, count, columns, tell
        self._due = 0.0

    def __call__(self, data_BCHW: Tensor, times: tuple[float, ...]) -> None:
        at = sum(times) / len(times)
        if at < self._due - 1.5 / _MOMENTS:  # the next resolution or batch begins
            self._due = 0.0
        if at < self._due:
            return
        self._due = at + 1.0 / _MOMENTS
        sampler, groups = self._sampler, self._sampler.integrator.groups
        shown = data_BCHW[: self._count].float()
        with computing("fp32", data_BCHW.device):
            pixels = sampler.decoder(shown[:, sampler.texture]).cpu().numpy()
        semantics = None
        if "semantic" in groups.names:
            levels = as_colours(shown[:, groups.slice_of("semantic")])
            semantics = pictures.grid(levels, columns=self._columns)
        named = dict(zip(groups.names, times, strict=True))
        self._tell(Moment(named, pictures.grid(pixels, columns=self._columns), semantics))


def as_colours(latents_BChw: Tensor) -> Pixels:
    """The first three channels of normalised latents as red, green and blue, uint8 (B, h, w, 3); of
    fewer, the last one again."""
    channels = latents_BChw.shape[1]
    first = latents_BChw[:, [min(number, channels - 1) for number in range(3)]]
    levels = ((first / _SPREAD + 1.0) * 127.5).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def laid_upon(artifact: Artifact, settings: Sequence[str]) -> Recipe:
    """The recipe that a `train_dit` artifact was made by, with overrides. Raises UserError on what
    cannot be."""
    values = read_recorded(artifact.manifest.recipe, f"the recipe of {artifact.uri}").model_dump(mode="json")
    values["tune_fewstep"] = None  # a flow map that the same run made is another artifact
    for setting in settings:
        assign(values, setting)
    return validate(values, "these settings")


def tokenizer_of(model: Artifact, samples: Sequence[Entry] = ()) -> Artifact:
    """The tokenizer whose latents a model makes: that of what it was trained on, or that a sample
    of it was made with.

    Raises:
        UserError: neither says so.
    """
    latents = model.manifest.inputs.get("encode")
    found = None if latents is None else Artifact(model.root, "encode", latents).manifest.inputs.get("train_vavae")
    for each in samples:
        if found is None and each.manifest is not None and each.manifest.inputs.get("train_dit") == model.fingerprint:
            found = each.manifest.inputs.get("train_vavae")
    if found is None:
        raise UserError(f"{model.uri} does not say whose latents it makes: run its stage sample once")
    return Artifact(model.root, "train_vavae", found)
