"""One recipe on one data set: its trainings and scores, in this process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.tokenizers.data import SIDE, TEST
from configs import Recipe, load_recipe
from infra.artifacts import Artifact
from tasks import encode
from tasks.data.images import Images, images
from tasks.data.receipts import Receipt
from tasks.encoder import Encoder
from tasks.sampling.sampler import Sampler
from tasks.scoring.distances import frechet_distance
from tasks.scoring.features import FeatureExtractor, FeatureNetworks
from tasks.scoring.gaussian import Gaussian
from tasks.scoring.latent_scores import CellSums
from tasks.scoring.latents import Fitted, LatentFeatureExtractor, Latents, Subjects, fit, joined, scored
from tasks.stage import Context, Job, Outcome, Stage, perform
from tasks.training.launch import RESULT, build, export
from tasks.training.loop import Setting
from tasks.training.loop import fit as train_here
from tasks.training.metrics import Metrics
from tasks.training.stage import trained_stage

PROBED = 2_000
"""Training images that probes, lines and components are fitted to."""
POINTS = 500
Memory = dict[bytes, Tensor]
BASE = (
    "train_vavae.warmup_images=320",
    "train_vavae.model={base_channels: 8, channel_multipliers: [1, 2, 4, 4], z_channels: 8, patch_size: 1}",
    "train_vavae.model.linear_path=false",
    "train_vavae.objective.latent_noise=0.0",
    "train_vavae.stages=[]",
    "train_vavae.objective.align_weight=0.0",
    "train_semvae.warmup_images=320",
    "encode.align_features=false",
    "train_dit.model.align_depth=null",
    "train_dit.objective.align_weight=0.0",
    "compute.train={workers: 1, engine: plain, checkpoint_every: 3200, log_every: 1600}",
    "compute.actors.actors=1",
)
ALIGNED = (  # the first stage of the published three: w 0.5, no margins (papers.md 1.3)
    "train_vavae.objective.align_weight=0.5",
    "train_vavae.objective.cos_margin=0.0",
    "train_vavae.objective.distance_margin=0.0",
)
DIFFUSION = (
    "train_semvae=null",
    "train_dit.clock={kind: synchronous}",
    "train_dit.learning_rate=1.0e-3",
    "train_dit.decay_share=0.3",
    "train_dit.warmup_images=640",
    "train_dit.model={hidden_size: 128, depth: 4, heads: 4, align_depth: null, qk_norm: true}",
    "train_dit.objective={semantic_weight: 1.0, align_weight: 0.0}",
    "sample={images: 1000, guidance: {method: none}, solver: euler, steps: 20, batch: 100}",
)
IMAGES = {"train_vavae": 8_000, "train_semvae": 64_000, "train_dit": 16_000}
VARIANTS = {"plain": (), "aligned": ALIGNED}
DATA = ("fashion", "photographs")


@dataclass(frozen=True)
class Trial:
    """One recipe on one data set."""

    root: str
    data: str
    variant: str
    seed: int
    scale: float
    further: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        budgets = [f"{section}.images={round(images * self.scale / 64) * 64}" for section, images in IMAGES.items()]
        seeds = [f"{section}.seed={self.seed}" for section in IMAGES]
        return load_recipe("demo", [*BASE, *VARIANTS[self.variant], *budgets, *seeds, *self.further])

    def job(self, stage: Stage, **inputs: str) -> Job:
        prints = {"shard": self.data} | inputs
        prints = {name: value for name, value in prints.items() if name in stage.inputs}
        return stage.job(self.recipe, self.root, prints)

    def train(self, stage: Stage, memory: Memory | None, **inputs: str) -> Artifact:
        """The stage's artifact, trained in this process unless it is there.

        memory: what the foundation model has seen; None lets it look as often as it is asked, as a run does.
        """
        context = Context(self.job(stage, **inputs))
        if not context.artifact.is_complete() and not context.out.exists(RESULT):
            section, compute = trained_stage(stage.name).section(context.recipe), context.recipe.compute
            device = torch.device("cpu")
            metrics = Metrics(stage.name, section.images, compute.train.log_every, context.tracker, device)

            def trainee() -> Any:
                made = build(context)
                if memory is not None and getattr(made, "foundation", None) is not None:
                    made.foundation = Remembered(made.foundation, memory)  # type: ignore[attr-defined]
                return made

            train_here(trainee, Setting(context.out, compute.train, device, metrics, partial(export, context)))
        return perform(stage, context.job)


class Remembered:
    """A foundation model that looks at every image once."""

    def __init__(self, model: Any, memory: Memory) -> None:
        self._model, self._memory = model, memory

    def to(self, device: torch.device) -> Remembered:
        return self

    def __call__(self, images_B3HW: Tensor) -> Tensor:
        keys = [image.numpy().tobytes() for image in images_B3HW]
        fresh = [place for place, key in enumerate(keys) if key not in self._memory]
        if fresh:
            found = self._model(images_B3HW[fresh])
            self._memory |= {keys[place]: features for place, features in zip(fresh, found, strict=True)}
        return torch.stack([self._memory[key] for key in keys])


def latents(trial: Trial, tokenizer: Artifact) -> Artifact:
    """What stage `encode` makes, in this process."""
    job = trial.job(encode.STAGE, train_vavae=tokenizer.fingerprint)

    def run(context: Context) -> Outcome:
        encoder, shards = Encoder(job), context.input("shard")
        found: list[Receipt] = []
        for entry in shards.files(suffix=".parquet"):
            part = pa.table({"part": [entry.path], "made_from": [entry.sha256]})
            row = encode.decode_part(part, shards, SIDE)
            found.append(encoder.write_part({name: row[name][0] for name in row.column_names}))
        facts = shards.manifest.facts
        return encode._outcome(context.recipe, found, facts["classes"], facts["splits"])

    return perform(Stage("encode", encode.STAGE.version, (), (), run), job)


def latent_scores(tokenizer: Artifact, semantics: Artifact | None, recipe: Recipe, memory: Memory) -> dict[str, float]:
    """What `evaluate_tokenizer` says of latents, in this process."""
    examiner = LatentFeatureExtractor(Subjects(SIDE, tokenizer, recipe.foundation, semantics))
    examiner.foundation = Remembered(examiner.foundation, memory)  # type: ignore[assignment]
    shards = Artifact(tokenizer.root, "shard", tokenizer.manifest.inputs["shard"])

    def passed(split: str, limit: int, fitted: Fitted | None) -> tuple[Latents, CellSums | None]:
        looked = (examiner.look(*batch, fitted) for batch in images(shards, split, SIDE, limit))
        return joined([(number, *each) for number, each in enumerate(looked)])

    train, sums = passed("train", PROBED, None)
    assert sums is not None  # there is a foundation model
    fitted = fit(sums, 0 if train.semantic is None else train.semantic.shape[1])
    test, _ = passed("test", TEST, fitted)
    return scored(train, test, fitted, POINTS, seed=0)[0]


def generated(trial: Trial, tokenizer: Artifact, encoded: Artifact, model: Artifact) -> list[Images]:
    """The recipe's sample, in batches that scores take."""
    prints = {each.stage: each.fingerprint for each in (tokenizer, encoded, model)}
    sampler = Sampler.of(Context(Job("sample", "", trial.root, trial.recipe.model_dump(mode="json"), prints, {})))
    count, batch = trial.recipe.sample.images, trial.recipe.sample.batch
    made = [sampler.images(np.arange(start, start + batch)) for start in range(0, count, batch)]
    return [piece for labels, pixels in made for piece in _small(labels, pixels)]


def frechet(trial: Trial, examiner: FeatureExtractor, *made: Artifact) -> float:
    """Distance of generated images from the test split, by the features of `evaluate`. made: as of `generated`."""
    shards = Artifact(trial.root, "shard", trial.data)
    return frechet_distance(
        _gaussian(examiner, images(shards, "test", SIDE)),
        _gaussian(examiner, generated(trial, *made)),
    )


def _small(labels: Any, pixels: Any) -> list[Images]:
    return [(labels[start : start + 50], pixels[start : start + 50]) for start in range(0, len(labels), 50)]


def _gaussian(examiner: FeatureExtractor, batches: Any) -> Gaussian:
    return Gaussian.of(np.concatenate([examiner.look(*batch).features for batch in batches]))


def examiner_of(trial: Trial) -> FeatureExtractor:
    return FeatureExtractor(FeatureNetworks(SIDE, trial.recipe.evaluate.features))
