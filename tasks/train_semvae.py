"""Stage `train_semvae`: the Semantic VAE on foundation features, of streamed images or stored (papers.md 2.2)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import Recipe, UserError
from configs.tokenizers import TrainSemvae
from infra import logs
from infra.artifacts import Artifact
from infra.device import autocast
from infra.weights import check_pretrained, identities, load_pretrained
from models.tokenizer_losses import TrainableSemanticVAE
from tasks.data.crops import Crop
from tasks.data.images import images
from tasks.data.pixels import to_tensor
from tasks.foreign.foundations import look
from tasks.loading.loader import IMAGE, Batch, Loader
from tasks.networks import build_semantic_vae, load_foundation
from tasks.randomness import ImageNumbers
from tasks.stage import Context, Outcome
from tasks.training.launch import train
from tasks.training.stage import TrainedStage
from tasks.training.trainee import Trainee

_SCORED_IMAGES = 2_000
_STREAMED = "images"
_FEATURES = "f"


def section(recipe: Recipe) -> TrainSemvae:
    assert recipe.train_semvae is not None  # the stage is present only where the section is
    return recipe.train_semvae


def run(context: Context) -> Outcome:
    """Train the Semantic VAE, or take the weights that `train_semvae.pretrained` names."""
    if section(context.recipe).images and context.recipe.foundation is not None:
        logs.say(look(context.recipe.foundation, context.recipe.image.size))
    return train(context, section(context.recipe), scored=True)


def stored(recipe: Recipe) -> Artifact | None:
    """The `encode` artifact whose features are trained on; None where they are streamed from images.

    Raises:
        UserError: there is no such artifact, or it holds no features or others than the recipe's foundation model's.
    """
    location = section(recipe).features
    if location == _STREAMED:
        return None
    parts = location.rstrip("/").rsplit("/", 2)
    if len(parts) < 3 or parts[1] != "encode":
        raise UserError(
            f"train_semvae.features {location}: expected `images`, or the folder or URL of an `encode` artifact with "
            "stored features, as …/encode/1a2b3c"
        )
    artifact = Artifact(*parts)
    shape = artifact.manifest.facts.get("shapes", {}).get(_FEATURES)
    assert recipe.foundation is not None  # the recipe's rules
    made = artifact.manifest.recipe.get("foundation") or {}
    if shape is None or shape[0] != recipe.foundation.feature_dim or made.get("name") != recipe.foundation.name:
        raise UserError(
            f"train_semvae.features {location}: expected stored features of {recipe.foundation.name} with "
            f"{recipe.foundation.feature_dim} channels, found {made.get('name')} {shape}: encode with "
            "encode.align_features: true and this recipe's foundation"
        )
    return artifact


def external(recipe: Recipe) -> dict[str, str]:
    """Which stored features and files of weights, where some are."""
    artifact = stored(recipe)
    features = {} if artifact is None else {"features": artifact.fingerprint}
    foundation = recipe.foundation.weights if recipe.foundation else None
    return features | identities(foundation=foundation, pretrained=section(recipe).pretrained)


def _crop(recipe: Recipe) -> Crop:
    """Of images whose features are compressed."""
    resize = section(recipe).resize
    if resize is None or recipe.foundation is None:
        return Crop(recipe.image.size)
    return Crop(recipe.foundation.input_size, "bicubic", shorter=resize)


class Semantics(Trainee):
    """The trainee: features of images through the frozen foundation model, or as stored, compressed and restored."""

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
        self.shards, self.crop = context.input("shard"), _crop(recipe)
        self.noise = ImageNumbers(self.section.seed, "posterior")
        self.facts: dict[str, Any] = {}
        store, compute = stored(recipe), recipe.compute.train
        self.streamed = store is None
        self.loader = Loader(
            store or self.shards,
            "train",
            [IMAGE] if self.streamed else [_FEATURES],
            self.section.batch,
            self.section.seed,
            flips=recipe.image.flips and self.section.resize is None,
            crop=self.crop,
            threads=compute.cpus_per_worker,
            keys=False,
            pin=torch.cuda.is_available(),
            cache_gib=compute.cache_gib,
        )

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        if self.streamed:
            features = self._features(batch.arrays[IMAGE], device)
        else:
            features = torch.as_tensor(batch.arrays[_FEATURES]).to(device, non_blocking=True).float()
        shape = (self.section.model.channels, *features.shape[-2:])
        return {"features_BDhw": features, "noise_BChw": self.noise.normal(batch.positions, shape).to(device)}

    def _features(self, images_BHWC: Any, device: torch.device) -> Tensor:
        with autocast(self.section.foundation_precision, device):
            features: Tensor = self.foundation.to(device)(to_tensor(images_BHWC, device).contiguous()).float()
        return features

    def scores(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        """On test images, from posterior means: cosine and error of restored features, spread of the latent."""
        sums, count = torch.zeros(4, dtype=torch.float64), 0
        for _, shown in images(self.shards, "test", self.crop, _SCORED_IMAGES):
            features = self._features(shown, device)
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


def check(recipe: Recipe) -> None:
    """Raises UserError where the weights that the recipe names do not fit it."""
    given, foundation = section(recipe), recipe.foundation
    assert foundation is not None  # the recipe's rules
    build = partial(build_semantic_vae, given.model, foundation.feature_dim)
    check_pretrained(build, given.pretrained, "train_semvae.pretrained")


STAGE = TrainedStage(
    name="train_semvae",
    version=2,
    sections=("image", "foundation", "train_semvae"),
    inputs=("shard",),
    on_first_set=True,
    run=run,
    external=external,
    check=check,
    present=lambda recipe: recipe.train_semvae is not None,
    section=section,
    trainee=Semantics,
)
