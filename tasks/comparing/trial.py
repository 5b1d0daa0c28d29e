"""Stage `trial`: a trained model at one moment of its training, sampled under one `sample` section and scored at once.

Images go straight to features and none is stored but a small sheet. An actor keeps what trials that follow one
another share: the decoder, the model, the networks of the scores and the reference. So a race of many models and a
sweep of many settings over one model are each one job.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from configs import Recipe
from infra.artifacts import Artifact
from infra.device import default_device
from tasks import train_dit
from tasks.data.pixels import Pixels
from tasks.data.portions import SCORING_BATCH
from tasks.drawing import pictures
from tasks.networks import DiffusionNetwork, ready, trained_dit
from tasks.sample import check_statistics, external
from tasks.sampling.per_image import shown_per_class
from tasks.sampling.sampler import Decoder, Sampler, model_of
from tasks.scoring import reference as references
from tasks.scoring.features import FeatureExtractor, FeatureNetworks, ImageFeatures, PerImageFeatures
from tasks.scoring.real_images import RealImages, on_record, scored, with_statistics
from tasks.stage import Context, Job, Outcome, Stage, perform, side_job
from tasks.training.launch import train

T = TypeVar("T")

SHEET = "sheet.png"
_VERSION = 1
_COLUMNS, _ROWS = 10, 4
_INPUTS = ("train_vavae", "encode", "train_dit", "tune_fewstep")


@dataclass(frozen=True)
class Snapshot:
    """Which weights: of the average of relative width `sigma_rel` that ends at `images_seen`."""

    images_seen: int
    sigma_rel: float


def trial_job(recipe: Recipe, root: str, inputs: Mapping[str, Artifact], real: RealImages, at: Snapshot | None) -> Job:
    """The job of one trial.

    recipe: `sample` and `evaluate` say what is made and how it is scored; no intervals where `evaluate.bootstrap` is 0.
    inputs: the artifacts of `train_vavae`, `encode` (where latents were made), `train_dit` and `tune_fewstep` (where
        there is one).
    at: None takes the weights that `sample.ema` says, at the end of training.
    """
    sections = {name: recipe.section(name) for name in ("image", "sample", "evaluate")}
    sections["external"] = external(recipe)
    sections["trial"] = None if at is None else vars(at)
    prints = {name: inputs[name].fingerprint for name in _INPUTS if name in inputs}
    prints["reference"] = real.reference.fingerprint
    if real.judge is not None:
        prints["judge"] = real.judge.fingerprint
    return side_job("trial", _VERSION, recipe, root, sections, prints)


class TrialActor:
    """An actor that performs one trial per call and gives back its number of images."""

    def __call__(self, job: Mapping[str, Any]) -> int:
        return perform(STAGE, Job(**job)).manifest.rows


class TrainingActor:
    """An actor that performs one `train_dit` job per call, as its only worker, and gives back the images seen."""

    def __call__(self, job: Mapping[str, Any]) -> int:
        return perform(_ALONE, Job(**job)).manifest.rows


def _train_alone(context: Context) -> Outcome:
    return train(context, context.recipe.train_dit, alone=True)


_ALONE = replace(train_dit.STAGE, run=_train_alone)


def run(context: Context) -> Outcome:
    """Make the images, look at them and score them.

    Raises:
        UserError: the model was trained on latents with other statistics, or the set is too small to score.
    """
    recipe, device = context.recipe, default_device()
    threads = recipe.compute.actors.cpus_per_actor
    if device.type == "cpu":
        torch.set_num_threads(threads)
    check_statistics(context)
    trained = model_of(context)
    decoder = _decoder(context.input("train_vavae"), trained, recipe.compute.actors.compile)
    at = None if context.job.sections["trial"] is None else Snapshot(**context.job.sections["trial"])
    model = _model(trained, recipe.sample.ema, at, recipe.compute.actors.compile, recipe.sample.precision)
    sampler = Sampler(recipe, model, decoder, device)
    section = recipe.evaluate
    published = None if section.inception is None else section.inception.weights
    judge = context.input("judge") if "judge" in context.job.inputs else None
    size, precision = recipe.image.size, section.precision
    compiled = recipe.compute.actors.compile
    judged = section.classifier_frechet
    networks = FeatureNetworks(size, section.features, judge, judged, None, published, precision, compiled=compiled)
    examiner = _examiner(networks, threads)

    shown: list[tuple[NDArray[np.int64], Pixels]] = []
    found: list[PerImageFeatures] = []
    clock = _Stopwatch()
    for labels, pixels in _batched(clock.timed(_images(sampler)), SCORING_BATCH):
        if sum(len(each) for each, _ in shown) < recipe.data.classes * _ROWS:
            shown.append((labels, pixels))
        found.append(examiner.look(labels, pixels))
    made = ImageFeatures.of(PerImageFeatures.joined(found))
    real = with_statistics(_real(context.input("reference"), judge), references.resolve(recipe))
    scores = scored(real, made, recipe)
    return Outcome(
        files=[context.out.write_bytes(SHEET, pictures.png(_sheet(shown)))],
        rows=made.images,
        facts={
            "intervals": {name: list(bounds) for name, bounds in scores.intervals.items()},
            **sampler.integrator.evaluations(),
            "sampling_seconds": clock.seconds,
        },
        scores=scores.values,
    )


STAGE = Stage("trial", _VERSION, (), (), run)


# ---------------------------------------------------------------------------------------------------------- parts


class _Stopwatch:
    """How long an iterator took, without what is done with what it gives."""

    seconds = 0.0

    def timed(self, items: Iterator[T]) -> Iterator[T]:
        while True:
            begun = time.perf_counter()
            item = next(items, None)
            self.seconds += time.perf_counter() - begun
            if item is None:
                return
            yield item


def _images(sampler: Sampler) -> Iterator[tuple[NDArray[np.int64], Pixels]]:
    """Labels and pixels of all images of the sample, in its static batches; the last one is cut."""
    images, batch = sampler.recipe.sample.images, sampler.recipe.sample.batch
    for indices, labels, pixels in sampler.stream(np.arange(start, start + batch) for start in range(0, images, batch)):
        wanted = indices < images
        yield labels[wanted], pixels[wanted]


def _batched(
    pieces: Iterable[tuple[NDArray[np.int64], Pixels]], size: int
) -> Iterator[tuple[NDArray[np.int64], Pixels]]:
    """The same rows, `size` at a time."""
    waiting: list[tuple[NDArray[np.int64], Pixels]] = []
    for piece in pieces:
        waiting.append(piece)
        labels, pixels = (np.concatenate(column) for column in zip(*waiting, strict=True))
        whole = len(labels) // size * size
        for start in range(0, whole, size):
            yield labels[start : start + size], pixels[start : start + size]
        waiting = [(labels[whole:], pixels[whole:])]
    if waiting and len(waiting[0][0]):
        yield waiting[0]


def _sheet(shown: list[tuple[NDArray[np.int64], Pixels]]) -> Pixels:
    labels, pixels = (np.concatenate(column) for column in zip(*shown, strict=True))
    rows = shown_per_class(labels, _COLUMNS, _ROWS)
    return pictures.grid(pixels[[index for row in rows for index in row]], columns=len(rows[0]))


@lru_cache(maxsize=1)
def _decoder(tokenizer: Artifact, model: Artifact, compiled: bool) -> Decoder:
    return Decoder.of(tokenizer, model, default_device(), compiled)


@lru_cache(maxsize=1)
def _model(artifact: Artifact, ema: bool, at: Snapshot | None, compiled: bool, precision: str) -> DiffusionNetwork:
    sigma, images = (None, None) if at is None else (at.sigma_rel, at.images_seen)
    return ready(trained_dit(artifact, ema, sigma, images).to(default_device()), compiled, precision)


@lru_cache(maxsize=1)
def _examiner(networks: FeatureNetworks, threads: int) -> FeatureExtractor:
    return FeatureExtractor(networks, threads)


@lru_cache(maxsize=1)
def _real(reference: Artifact, judge: Artifact | None) -> ImageFeatures:
    return on_record(reference, judge)
