"""Which tokenizer of Fashion-MNIST learns most in so many processor seconds: the search behind the demo's.

    python -m benchmarks.tokenizers.search [--folder F] [--seconds 30] [--only NAME …]

Every candidate is the demo's recipe with some settings, trained on one thread for as many images as a short trial says
that the seconds are enough for, then scored by what it makes of test images: PSNR, the Fréchet distance on the features
of `evaluate`, that on the features of a classifier that no candidate is trained on, the first one again of what is
decoded of latents with some noise, and the share of reconstructions that the classifier gives their label. Seconds are
the process's own, so other work on the machine costs patience only. What is done is kept in the folder; the last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.tokenizers.data import SIDE, TEST, fashion, put_shards
from benchmarks.tokenizers.kept import alone, kept
from benchmarks.tokenizers.tables import table
from benchmarks.tokenizers.trials import Trial
from configs.scores import Classifier
from infra.artifacts import Artifact
from tasks import train_vavae
from tasks.data.images import images
from tasks.data.pixels import to_pixels, to_tensor
from tasks.scoring.classifier import ImageClassifier, build_classifier, train
from tasks.scoring.distances import FrechetFrom
from tasks.scoring.features import FeatureExtractor, FeatureNetworks, ImageFeatures, PerImageFeatures

TRIAL = 20
"""Steps whose time says how many a budget is enough for."""
BATCH = 16
SHAKEN = 0.3
"""Noise on latents that are decoded, in deviations of their channels: about as wrong as a small diffusion model's."""
SCORES = {
    "psnr": "PSNR, dB",
    "frechet": "Fréchet, EfficientNet-Lite0",
    "frechet_classifier": "Fréchet, classifier",
    "frechet_shaken": "Fréchet of shaken latents",
    "consistency": "class kept",
    "images": "images",
    "milliseconds": "ms a step",
}


def _model(channels: int, levels: str, patch: int, latents: int, path: bool = False) -> str:
    return (
        f"train_vavae.model={{base_channels: {channels}, channel_multipliers: {levels}, blocks_per_level: 1, "
        f"z_channels: {latents}, attention_levels: [], norm_groups: 1, patch_size: {patch}, "
        f"linear_path: {str(path).lower()}}}"
    )


def _seen(layers: str, weight: float) -> tuple[str, ...]:
    at = "train_vavae.objective.perceptual"
    return f"{at}_layers={layers}", f"{at}_weight={weight}"


_ALIGNED = "train_vavae.objective.align_weight=0.1"
_LEVELS = "[1, 2, 4, 4]"
_FAST = "train_vavae.learning_rate=5.0e-3"
_SQUARES = 16, "[1, 2, 4]", 2
_PATH = (_model(*_SQUARES, 16, path=True), _FAST, _ALIGNED)
_NOISE = "train_vavae.objective.latent_noise="
CANDIDATES: dict[str, tuple[str, ...]] = {
    "8 channels": (_model(8, _LEVELS, 1, 8), _FAST, _ALIGNED),
    "16 channels": (_model(8, _LEVELS, 1, 16), _FAST, _ALIGNED),
    "16 channels, linear path": (_model(8, _LEVELS, 1, 16, path=True), _FAST, _ALIGNED),
    "16 channels, linear path, squares of 2": _PATH,
    "the same, noise 0.3": (*_PATH, _NOISE + "0.3"),
    "the same, noise 0.5": (*_PATH, _NOISE + "0.5"),
    "the same, noise 0.8": (*_PATH, _NOISE + "0.8"),
    "the same, noise 0.5, layers 0 and 1": (*_PATH, _NOISE + "0.5", *_seen("[0, 1]", 0.03)),
}
"""Settings beyond those that all trials here share (:data:`benchmarks.tokenizers.trials.BASE`)."""


class Search:
    """Candidates on one folder's images, each trained and scored once."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self.root = folder.as_uri()
        self.shards = put_shards(self.root, "fashion", fashion)

    def row(self, name: str) -> dict[str, Any]:
        """The name and the scores of a candidate, by those of :data:`SCORES`."""
        file = f"{name.replace(' ', '-')}-{self.seconds:g}"
        return {"name": name, **kept(self.folder, file, lambda: self._trained_and_scored(name))}

    def _trained_and_scored(self, name: str) -> dict[str, float]:
        pace = _seconds(self._tokenizer(name, TRIAL)) / TRIAL
        steps = max(TRIAL, round(self.seconds / pace))
        tokenizer = self._tokenizer(name, steps)
        figures = {"images": steps * BATCH, "milliseconds": 1e3 * _seconds(tokenizer) / steps}
        return {**self._scores(tokenizer), **figures}

    def _tokenizer(self, name: str, steps: int) -> Artifact:
        length = f"train_vavae.images={steps * BATCH}", f"train_vavae.batch={BATCH}"
        logged = f"compute.train={{workers: 1, engine: plain, log_every: {steps * BATCH}, checkpoint_every: 1000000}}"
        return Trial(self.root, "fashion", "plain", 0, 1.0, (*CANDIDATES[name], *length, logged)).train(
            train_vavae.STAGE, None
        )

    def _scores(self, tokenizer: Artifact) -> dict[str, float]:
        examiner = FeatureExtractor(FeatureNetworks(SIDE, self._evaluate.features, judged=True, tokenizer=tokenizer))
        examiner.judge = self._judge
        real, made = (self._looked(examiner, reconstruct=again) for again in (False, True))
        distances = (
            FrechetFrom(real.gaussians[vectors])(made.gaussians[vectors]) for vectors in ("features", "judged")
        )
        psnr, consistency = made.findings.psnr, made.findings.consistency
        assert psnr is not None and consistency is not None  # of reconstructions that a judge saw
        return {
            "psnr": float(psnr.mean()),
            **dict(zip(("frechet", "frechet_classifier"), distances, strict=True)),
            "frechet_shaken": FrechetFrom(real.gaussians["features"])(self._shaken(examiner).gaussians["features"]),
            "consistency": consistency,
        }

    def _looked(self, examiner: FeatureExtractor, reconstruct: bool) -> ImageFeatures:
        shown = images(self.shards, "test", SIDE, TEST)
        return ImageFeatures.of(PerImageFeatures.joined([examiner.look(*each, reconstruct) for each in shown]))

    def _shaken(self, examiner: FeatureExtractor) -> ImageFeatures:
        assert examiner.tokenizer is not None
        shown = list(images(self.shards, "test", SIDE, TEST))
        with torch.inference_mode():
            latents = [examiner.tokenizer.encode(to_tensor(pixels).contiguous()).mean for _, pixels in shown]
            deviation = torch.cat(latents).std(dim=(0, 2, 3), keepdim=True)
            numbers = torch.Generator().manual_seed(0)
            found = []
            for (labels, _), z in zip(shown, latents, strict=True):
                noise = torch.randn(z.shape, generator=numbers)
                found.append(
                    examiner.look(labels, to_pixels(examiner.tokenizer.decode(z + SHAKEN * deviation * noise)))
                )
        return ImageFeatures.of(PerImageFeatures.joined(found))

    @cached_property
    def _evaluate(self) -> Any:
        return Trial(self.root, "fashion", "plain", 0, 1.0).recipe.evaluate

    @cached_property
    def _judge(self) -> ImageClassifier:
        """Trained once, on the training images, and kept with the rest."""
        file, section = self.folder / "judge.pt", Classifier(epochs=6, width=16)
        judge = build_classifier(Trial(self.root, "fashion", "plain", 0, 1.0).recipe, section)
        if not file.exists():
            torch.manual_seed(section.seed)
            for _ in train(judge, self.shards, SIDE, section):
                pass
            torch.save(judge.state_dict(), file)
        judge.load_state_dict(torch.load(file, weights_only=True))
        return judge.requires_grad_(False).eval()


def _seconds(tokenizer: Artifact) -> float:
    return float(tokenizer.manifest.scores["final/clock/processor_seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=".latentforge/tokenizer-search")
    parser.add_argument("--seconds", type=float, default=30.0, help="processor seconds of every training")
    parser.add_argument("--only", nargs="*", choices=[*CANDIDATES], default=[*CANDIDATES])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    search = Search(Path(arguments.folder).absolute(), arguments.seconds)
    rows = []
    with alone():
        for name in arguments.only:
            rows.append(search.row(name))
            print(json.dumps(rows[-1]), flush=True)
    print(table([["", *SCORES.values()], *([row["name"], *(f"{row[s]:.4g}" for s in SCORES)] for row in rows)]))
    print(json.dumps({"seconds": arguments.seconds, "candidates": rows}))


if __name__ == "__main__":
    main()
