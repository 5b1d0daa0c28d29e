"""Does any score of a tokenizer rank tokenizers as diffusion models that are trained on their latents do?

    python -m benchmarks.tokenizers.ranking [--folder F] [--seeds 3] [--tokenizers 8] [--write docs/tokenizers.md]

On Fashion-MNIST at 32 × 32: tokenizers that differ in channels, alignment and KL, with one budget; of each what
`tokenizer-eval` says of it, and small diffusion models with several seeds. Everything goes through the project's own
training loop and scores, in this process and without Ray, one tokenizer after the other; the same command goes on where
it was stopped. --write puts the tables between their marks in a page, and the picture beside it.
"""

from __future__ import annotations

import argparse
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tokenizers.correlations import page, picture
from benchmarks.tokenizers.data import SIDE, SOURCES, put_shards
from benchmarks.tokenizers.kept import alone, kept, trained, write_between_marks
from benchmarks.tokenizers.trials import ALIGNED, DIFFUSION, Memory, Trial, generated, latent_scores, latents
from configs.scores import Classifier
from infra.artifacts import Artifact
from tasks import train_dit, train_vavae
from tasks.data.images import Images, images
from tasks.data.pixels import to_pixels, to_tensor
from tasks.scoring.classifier import ImageClassifier
from tasks.scoring.classifier import train as train_judge
from tasks.scoring.distances import FrechetFrom
from tasks.scoring.features import FeatureExtractor, FeatureNetworks, PerImageFeatures
from tasks.scoring.gaussian import Gaussian
from tasks.scoring.interpolation import midpoints

DATA, PICTURE = "fashion", "ranking.png"
INTERPOLATED = 1_000
"""Training images whose latents are interpolated, among themselves."""
BUDGET = (
    "train_vavae.seed=0",
    "train_vavae.images=4800",
    "train_dit.images=16000",
    "train_dit.batch=32",
    "train_dit.learning_rate=2.0e-3",
    "train_dit.model={hidden_size: 64, depth: 3, heads: 4, align_depth: null, qk_norm: true}",
    "sample.steps=10",
)
TOKENIZERS = {
    "4 channels": ("train_vavae.model.z_channels=4",),
    "8 channels": ("train_vavae.model.z_channels=8",),
    "32 channels": ("train_vavae.model.z_channels=32",),
    "8, aligned": ("train_vavae.model.z_channels=8", *ALIGNED),
    "32, aligned": ("train_vavae.model.z_channels=32", *ALIGNED),
    "8, strong KL": ("train_vavae.model.z_channels=8", "train_vavae.objective.kl_weight=0.1"),
    "16 channels": ("train_vavae.model.z_channels=16",),
    "32, strong KL": ("train_vavae.model.z_channels=32", "train_vavae.objective.kl_weight=0.1"),
}


class Ranking:
    """Tokenizers, their scores, and diffusion models on their latents; each made once."""

    def __init__(self, folder: Path, seeds: int) -> None:
        self.root, self.folder, self.seeds = folder.as_uri(), folder, seeds
        self.memory: Memory = {}
        self.shards = put_shards(self.root, DATA, SOURCES[DATA])

    def row(self, name: str) -> dict[str, Any]:
        """Of one tokenizer: its scores, and lists of the diffusion models' by seed."""
        trial = self._trial(name, 0)
        tokenizer = trained(train_vavae.STAGE, trial, self.memory)
        scores = kept(self.folder, f"tokenizer-{tokenizer.fingerprint}", lambda: self._scores(trial, tokenizer))
        runs = [self._diffusion(self._trial(name, seed), tokenizer) for seed in range(self.seeds)]
        return {"name": name, **scores, **{score: [run[score] for run in runs] for score in runs[0]}}

    def _trial(self, name: str, seed: int) -> Trial:
        return Trial(self.root, DATA, "plain", seed, 1.0, (*DIFFUSION, *BUDGET, *TOKENIZERS[name]))

    def _scores(self, trial: Trial, tokenizer: Artifact) -> dict[str, float]:
        examiner = self._examiner(tokenizer)
        again = _findings(examiner, images(self.shards, "test", SIDE), reconstruct=True)
        assert again.psnr is not None  # of reconstructions
        return {
            "psnr": float(again.psnr.mean()),
            "reconstruction_frechet": self._from_test.of_rows(again.features),
            "interpolation_frechet": self._interpolation(examiner),
            **latent_scores(tokenizer, None, trial.recipe, self.memory),
        }

    @torch.inference_mode()
    def _interpolation(self, examiner: FeatureExtractor) -> float:
        """As `evaluate_tokenizer` computes it."""
        assert examiner.tokenizer is not None
        batches = [pixels for _, pixels in images(self.shards, "train", SIDE, INTERPOLATED)]
        means = np.concatenate([examiner.tokenizer.encode(to_tensor(pixels)).mean.numpy() for pixels in batches])
        halves = torch.from_numpy(midpoints(means)).split(50)
        decoded = [to_pixels(examiner.tokenizer.decode(each)) for each in halves]
        found = _findings(examiner, [(np.zeros(len(pixels), np.int64), pixels) for pixels in decoded])
        return self._from_training.of_rows(found.features)

    def _diffusion(self, trial: Trial, tokenizer: Artifact) -> dict[str, float]:
        encoded = latents(trial, tokenizer)
        model = trained(train_dit.STAGE, trial, self.memory, encode=encoded.fingerprint)

        def score() -> dict[str, float]:
            examiner = self._examiner()
            examiner.judge = self._judge
            found = _findings(examiner, generated(trial, tokenizer, encoded, model))
            assert found.consistency is not None  # there is a judge
            return {"frechet": self._from_test.of_rows(found.features), "consistency": found.consistency}

        return kept(self.folder, f"diffusion-{model.fingerprint}", score)

    def _examiner(self, tokenizer: Artifact | None = None) -> FeatureExtractor:
        features = self._trial("8 channels", 0).recipe.evaluate.features
        return FeatureExtractor(FeatureNetworks(SIDE, features, tokenizer=tokenizer))

    @cached_property
    def _from_test(self) -> FrechetFrom:
        return self._from("test", None)

    @cached_property
    def _from_training(self) -> FrechetFrom:
        return self._from("train", INTERPOLATED)

    def _from(self, split: str, limit: int | None) -> FrechetFrom:
        found = _findings(self._examiner(), images(self.shards, split, SIDE, limit))
        return FrechetFrom(Gaussian.of(found.features))

    @cached_property
    def _judge(self) -> ImageClassifier:
        section = Classifier(epochs=5)
        torch.manual_seed(section.seed)
        judge = ImageClassifier(SIDE, 10, section.width).to(memory_format=torch.channels_last)
        for _ in train_judge(judge, self.shards, SIDE, section):
            pass
        return judge.requires_grad_(False).eval()


def _findings(examiner: FeatureExtractor, batches: Any, reconstruct: bool = False) -> PerImageFeatures:
    found: list[Images] = list(batches)
    return PerImageFeatures.joined([examiner.look(labels, pixels, reconstruct) for labels, pixels in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=".latentforge/ranking")
    parser.add_argument("--seeds", type=int, default=3, help="of diffusion models")
    parser.add_argument("--tokenizers", type=int, default=len(TOKENIZERS), help="so many of them, the first ones")
    parser.add_argument("--write", type=Path, help="a page with marks to write between; the picture comes beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with alone():
        ranking = Ranking(Path(arguments.folder).absolute(), arguments.seeds)
        rows = [ranking.row(name) for name in list(TOKENIZERS)[: arguments.tokenizers]]
    print(json.dumps(rows))
    print(page(rows))
    if arguments.write is not None:
        write_between_marks(arguments.write, "benchmarks.tokenizers.ranking", page(rows))
        (arguments.write.parent / PICTURE).write_bytes(picture(rows))


if __name__ == "__main__":
    main()
