"""Stage `train_vavae`: the tokenizer, aligned with a vision foundation model (papers.md 1.2, 1.3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs import Recipe, UserError
from configs.schema import TrainVavae
from infra.weights import load_pretrained
from models.tokenizer_losses import TrainableTokenizer
from tasks.loader import IMAGE, Batch, Loader
from tasks.networks import build_autoencoder, load_foundation
from tasks.readout import images
from tasks.stage import Context, Outcome, Stage
from tasks.training.launch import train
from tasks.training.randomness import ImageNumbers

_SCORED_IMAGES = 10_000


def section(recipe: Recipe) -> TrainVavae:
    return recipe.train_vavae


def run(context: Context) -> Outcome:
    """Train the tokenizer, or take the weights that `train_vavae.pretrained` names.

    Raises:
        UserError: a term of the objective that cannot be trained yet.
    """
    objective = context.recipe.train_vavae.objective
    if context.recipe.train_vavae.images:
        for field, weight in (("perceptual_weight", objective.perceptual_weight), ("gan_weight", objective.gan_weight)):
            if weight > 0:
                raise UserError(
                    f"train_vavae.objective.{field} is {weight}, but this version trains reconstruction, KL and "
                    "alignment only: set it to 0, or take a published tokenizer with images: 0 and pretrained"
                )
    return train(context, context.recipe.train_vavae)


def to_float(images_BHWC: Any, device: torch.device) -> Tensor:
    """uint8 numpy (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1] on the device."""
    pixels = torch.from_numpy(images_BHWC).to(device, non_blocking=True)
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def mean_of_workers(gradient: Tensor) -> Tensor:
    """The mean over all training workers; the tensor itself where there is one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return gradient
    mean = gradient.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


class Tokenizer:
    """The trainee: autoencoder and objective over decoded images."""

    def __init__(self, context: Context) -> None:
        recipe = context.recipe
        self.section = recipe.train_vavae
        objective = self.section.objective
        self.network: nn.Module = build_autoencoder(self.section.model)
        if self.section.pretrained is not None:
            load_pretrained(self.network, self.section.pretrained)
        aligned = objective.align_weight > 0 and recipe.foundation is not None
        self.module: nn.Module = TrainableTokenizer(
            self.network,  # type: ignore[arg-type]
            feature_dim=recipe.foundation.feature_dim if aligned and recipe.foundation else None,
            reconstruction=objective.reconstruction,
            kl_weight=objective.kl_weight,
            align_weight=objective.align_weight,
            cosine_margin=objective.cos_margin,
            distance_margin=objective.distance_margin,
            adaptive=objective.adaptive,
            average=mean_of_workers,
            one_decoder_backward=recipe.compute.train.zero_stage < 3,  # which holds parameters in parts
        )
        self.foundation = load_foundation(recipe.foundation) if aligned and recipe.foundation else None
        self.shards, self.size = context.input("shard"), recipe.image.size
        self.latent = (self.section.model.z_channels, recipe.latent_size, recipe.latent_size)
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
        pixels = to_float(batch.arrays[IMAGE], device)
        given = {"images_B3HW": pixels, "noise_BCHW": self.noise.normal(batch.positions, self.latent).to(device)}
        if self.foundation is not None:
            given["features_BDhw"] = self.foundation.to(device)(pixels)
        return given

    def scores(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        """PSNR in dB of reconstructed posterior means as uint8, averaged over images of the test split."""
        total, count = 0.0, 0
        for _, shown in images(self.shards, "test", self.size, _SCORED_IMAGES):
            real = torch.from_numpy(shown).to(device).permute(0, 3, 1, 2).float()
            recon = network(to_float(shown, device))[0]
            error = (real - (127.5 * recon + 128).clamp(0, 255).floor()).square().flatten(1).mean(dim=1)
            total += float((10 * torch.log10(255.0**2 / error.clamp_min(1e-10))).sum())
            count += len(real)
        return {"psnr": total / count} if count else {}


def trainee(context: Context) -> Tokenizer:
    return Tokenizer(context)


STAGE = Stage("train_vavae", 1, ("image", "foundation", "train_vavae"), ("shard",), run)
