"""What alignment, the Semantic VAE and both together buy: the experiment of docs/tokenizers.md.

    python -m benchmarks.tokenizers [--folder F] [--seeds 3] [--scale 1] [--write docs/tokenizers.md]

On Fashion-MNIST and on patches of scikit-image's photographs, all at 32 × 32, with equal budgets and several seeds:
the tokenizer with and without alignment; the Semantic VAE against PCA; and a small diffusion model on the latents of
each Fashion-MNIST tokenizer. Everything goes through the project's own training loop and scores, in this process and
without Ray. What is done is kept in the folder, so the same command goes on where it was stopped. --write puts the
tables over the part of a page between its two marks, and the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.tokenizers.data import SOURCES, photograph, put_shards
from benchmarks.tokenizers.kept import alone, kept, trained, write_between_marks
from benchmarks.tokenizers.tables import page
from benchmarks.tokenizers.trials import (
    DIFFUSION,
    VARIANTS,
    Memory,
    Trial,
    examiner_of,
    frechet,
    latent_scores,
    latents,
)
from infra.artifacts import Artifact
from models.tiling import seam_error, tiled_decode, tiled_encode
from tasks import train_dit, train_semvae, train_vavae
from tasks.networks import trained_autoencoder
from tasks.stage import Stage

Rows = list[dict[str, Any]]


class Experiment:
    """Trainings and scores, each made once and kept in the folder."""

    def __init__(self, folder: Path, seeds: int, scale: float) -> None:
        self.root, self.folder, self.seeds, self.scale = folder.as_uri(), folder, seeds, scale
        self.memory: dict[str, Memory] = {name: {} for name in SOURCES}

    def tokenizers(self) -> Rows:
        return [
            self._scores(data, variant, seed) | {"data": data, "variant": variant, "seed": seed}
            for seed in range(self.seeds)
            for data in SOURCES
            for variant in VARIANTS
        ]

    def diffusion(self) -> Rows:
        """Fréchet distances, and as the floor that of the reconstructions is left to `tokenizer-eval`."""
        rows = []
        for seed in range(self.seeds):
            for variant in VARIANTS:
                trial = Trial(self.root, "fashion", variant, seed, self.scale, DIFFUSION)
                tokenizer = self._trained(train_vavae.STAGE, trial)
                encoded = latents(trial, tokenizer)
                model = self._trained(train_dit.STAGE, trial, encode=encoded.fingerprint)

                def score(trial: Trial = trial, made: tuple[Artifact, ...] = (tokenizer, encoded, model)) -> Any:
                    return {"frechet": frechet(trial, examiner_of(trial), *made)}

                rows.append(
                    kept(self.folder, f"diffusion-{model.fingerprint}", score) | {"variant": variant, "seed": seed}
                )
        return rows

    def seam(self) -> dict[str, float]:
        """Of a photograph in tiles of 128 pixels that share 32, in levels of 255."""
        trial = Trial(self.root, "photographs", "plain", 0, self.scale)
        tokenizer = self._trained(train_vavae.STAGE, trial)

        @torch.inference_mode()
        def score() -> dict[str, float]:
            model = trained_autoencoder(tokenizer)
            image = torch.from_numpy(photograph("astronaut.png").copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            z = model.encode(image).mean
            whole, tiled = model.decode(z), tiled_decode(model, z, tile=16, overlap=4)
            gap = (tiled_encode(model, image, tile=128, overlap=32).mean - z).abs().mean() / z.std()
            return {
                "seam": 127.5 * seam_error(tiled, whole, tile=128, overlap=32),
                "seam_without_overlap": 127.5 * seam_error(tiled_decode(model, z, 16, 0), whole, tile=128, overlap=0),
                "mean_difference": 127.5 * float((tiled - whole).abs().mean()),
                "latent_difference": float(gap),
            }

        return kept(self.folder, f"seam-{tokenizer.fingerprint}", score)

    def _scores(self, data: str, variant: str, seed: int) -> dict[str, float]:
        trial = Trial(self.root, data, variant, seed, self.scale)
        tokenizer = self._trained(train_vavae.STAGE, trial)
        semantics = self._trained(train_semvae.STAGE, trial) if variant == "plain" else None

        def score() -> dict[str, float]:
            found = latent_scores(tokenizer, semantics, trial.recipe, self.memory[data])
            return {"psnr": tokenizer.manifest.scores["psnr"], **found}

        return kept(self.folder, f"latents-{tokenizer.fingerprint}", score)

    def _trained(self, stage: Stage, trial: Trial, **inputs: str) -> Artifact:
        return trained(stage, trial, self.memory[trial.data], **inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=".latentforge/tokenizers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="budget of every training, over the usual one")
    parser.add_argument("--without-diffusion", action="store_true", help="leave the diffusion models out")
    parser.add_argument("--write", type=Path, help="a page with marks to write the tables between")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    experiment = Experiment(Path(arguments.folder).absolute(), arguments.seeds, arguments.scale)
    with alone():
        for name, source in SOURCES.items():
            put_shards(experiment.root, name, source)
        found: dict[str, Any] = {"scale": arguments.scale, "tokenizers": experiment.tokenizers()}
        found |= {"seam": experiment.seam(), "diffusion": []}
        if not arguments.without_diffusion:
            found["diffusion"] = experiment.diffusion()
    text = page(found)
    print(text)
    if arguments.write is not None:
        write_between_marks(arguments.write, "benchmarks.tokenizers", text)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
