"""Stage `train_semvae`: the Semantic VAE on foundation features, streamed from images (papers.md 2.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from configs import Recipe
from configs.tokenizers import TrainSemvae
from infra.weights import load_pretrained
from models.tokenizer_losses import TrainableSemanticVAE
from tasks.loader import IMAGE, Batch, Loader
from tasks.networks import build_semantic_vae, load_foundation
from tasks.readout import images
from tasks.stage import Context, Outcome, Stage
from tasks.train_vavae import to_float
from tasks.training.launch import train
from tasks.training.randomness import ImageNumbers

_SCORED_IMAGES = 2_000


def section(recipe: Recipe) -> TrainSemvae:
    assert recipe.train_semvae is not None  # the stage is present only where the section is
    return recipe.train_semvae


def run(context: Context) -> Outcome:
    """Train the Semantic VAE, or take the weights that `train_semvae.pretrained` names."""
    return train(context, section(context.recipe))


class Semantics:
    """The trainee: features of decoded images through the frozen foundation model, compressed and restored."""

    def __init__(self, context: Context) -> None:
        recipe = context.recipe
        assert recipe.foundation is not None  # the recipe's rules
        self.section = section(recipe)
        objective = self.section.objective
        self.network: nn.Module = build_semantic_vae(self.section.model, recipe.foundation.feature_dim)
        if self.section.pretrained is not None:
            load_pretrained(self.network, self.section.pretrained)
        self.module: nn.Module = TrainableSemanticVAE(
            self.network,  # type: ignore[arg-type]
            mse_weight=objective.mse_weight,
            cosine_weight=objective.cosine_weight,
            kl_weight=objective.kl_weight,
            cosine_axis=objective.cosine_axis,
        )
        self.foundation = load_foundation(recipe.foundation)
        self.shards, self.size = context.input("shard"), recipe.image.size
        self.noise = ImageNumbers(self.section.seed, "posterior")
        self.facts: dict[str, Any] = {}
        self.loader = Loader(
            self.shards,
            "train",
            [IMAGE],
            self.section.batch,
            self.section.seed,
            flips=recipe.image.flips,
            size=self.size,
            threads=recipe.compute.train.cpus_per_worker,
            keys=False,
            cache_gib=recipe.compute.train.cache_gib,
        )

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        features = self.foundation.to(device)(to_float(batch.arrays[IMAGE], device))
        shape = (self.section.model.channels, *features.shape[-2:])
        return {"features_BDhw": features, "noise_BChw": self.noise.normal(batch.positions, shape).to(device)}

    def scores(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        """On test images, from posterior means: cosine and error of restored features, spread of the latent."""
        sums, count = torch.zeros(4, dtype=torch.float64), 0
        for _, shown in images(self.shards, "test", self.size, _SCORED_IMAGES):
            features = self.foundation.to(device)(to_float(shown, device))
            restored, posterior, _ = network(features)
            figures = (
                F.cosine_similarity(features, restored, dim=1).mean(),
                F.mse_loss(restored, features),
                posterior.mean.mean(),
                posterior.mean.std(),
            )
            sums += torch.stack([figure.double().cpu() for figure in figures]) * len(features)
            count += len(features)
        names = ("feature_cosine", "feature_mse", "latent_mean", "latent_std")
        return dict(zip(names, (sums / count).tolist(), strict=True)) if count else {}


def trainee(context: Context) -> Semantics:
    return Semantics(context)


STAGE = Stage(
    "train_semvae",
    2,
    ("image", "foundation", "train_semvae"),
    ("shard",),
    run,
    present=lambda recipe: recipe.train_semvae is not None,
)
