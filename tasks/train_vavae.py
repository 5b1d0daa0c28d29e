"""Stage `train_vavae`: the tokenizer, aligned with a vision foundation model (papers.md 1.2, 1.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs import Recipe, UserError
from configs.autoencoders import DiffusersModel, PythonModel
from configs.tokenizers import Discriminator, TrainVavae, VavaeObjective
from infra import logs
from infra.device import autocast
from infra.diffusers_files import CONFIG, described, identity, to_json
from infra.trust import trust
from infra.weights import check_pretrained, identities, load_tensors
from models.diffusers_config import Described
from models.discriminator import PatchDiscriminator, TrainableDiscriminator
from models.foundation import FoundationModel
from models.perceptual import FeatureDistance
from models.tokenizer_losses import TokenizerWeights, TrainableTokenizer
from tasks.data.crops import Crop
from tasks.data.images import images
from tasks.data.pixels import peak_signal_to_noise, to_pixels, to_tensor
from tasks.data.portions import at_once
from tasks.foreign import own_code
from tasks.foreign.foundations import look
from tasks.loading.loader import IMAGE, Batch, Loader
from tasks.networks import build_autoencoder, check_diffusers, given_autoencoder, load_foundation
from tasks.randomness import ImageNumbers
from tasks.scoring.lpips import Lpips, check_weights
from tasks.stage import Context, Outcome
from tasks.training.launch import train
from tasks.training.stage import TrainedStage
from tasks.training.trainee import Trainee, is_held_out

_SCORED_IMAGES = 10_000
_NETWORK_IN_MODULE, _DISCRIMINATOR = "model.", "discriminator."


def section(recipe: Recipe) -> TrainVavae:
    return recipe.train_vavae


def run(context: Context) -> Outcome:
    """Train the tokenizer in its stages, or take the weights that `train_vavae.pretrained` names."""
    section, foundation = context.recipe.train_vavae, context.recipe.foundation
    if section.images and section.aligned and foundation is not None:
        logs.say(look(foundation, context.recipe.image.size))
    scored = not section.weightless and context.optional("shard") is not None
    return train(context, section, scored=scored)


def _weights(objective: VavaeObjective) -> TokenizerWeights:
    return TokenizerWeights(
        perceptual=objective.perceptual_weight,
        kl=objective.kl_weight,
        adversarial=objective.gan_weight,
        align=objective.align_weight,
        cosine_margin=objective.cos_margin,
        distance_margin=objective.distance_margin,
    )


def _perceptual(objective: VavaeObjective, foundation: FoundationModel | None) -> Callable[[Any, Tensor], Tensor]:
    """LPIPS, or what stands in its place."""
    if not objective.perceptual_layers:
        return Lpips(objective.lpips_weights)
    assert foundation is not None  # the recipe's rules
    try:
        return FeatureDistance(foundation, objective.perceptual_layers)
    except ValueError as error:
        raise UserError(f"train_vavae.objective.perceptual_layers: {error}") from None


def mean_of_workers(gradient: Tensor) -> Tensor:
    """The mean over all training workers; the tensor itself where there is one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return gradient
    mean = gradient.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def _crop(section: TrainVavae, size: int) -> Crop:
    """Of images that are trained on."""
    return Crop(size, "opencv", random=True) if section.crop == "random" else Crop(size)


class Critic:
    """The tokenizer's adversary: a discriminator of images and reconstructions (papers.md 1.2)."""

    def __init__(self, section: Discriminator) -> None:
        self.network = PatchDiscriminator(**section.model_dump())
        self.module: nn.Module = TrainableDiscriminator(self.network)

    def inputs(self, given: Mapping[str, Any], terms: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The batch and what the tokenizer made of it, once the tokenizer is trained against them."""
        if "discriminator" not in given:
            return None
        return {"real_BCHW": given["images_B3HW"], "fake_BCHW": terms["image"]}


class Tokenizer(Trainee):
    """The trainee: autoencoder and objective over decoded images, against a discriminator where one is asked for."""

    def __init__(self, context: Context) -> None:
        recipe = context.recipe
        self.section = recipe.train_vavae
        objective = self.section.objective
        self.objectives = self.section.objectives
        self.autoencoder = given_autoencoder(self.section).requires_grad_(True).train()
        self.network: nn.Module = self.autoencoder
        model = self.section.model
        self.described: Described | None = described(model) if isinstance(model, DiffusersModel) else None
        foundation = recipe.foundation if self.section.aligned else None
        trains = self.section.images > 0
        perceptual = trains and self.section.perceptual
        looks = trains and (self.section.aligned or (perceptual and objective.perceptual_layers))
        with torch.random.fork_rng(devices=[]):  # what is trained begins alike, whatever looks on
            network = load_foundation(recipe.foundation) if looks and recipe.foundation else None
        self.perceptual = _perceptual(objective, network) if perceptual else None
        self.module: nn.Module = TrainableTokenizer(
            self.autoencoder,
            feature_dim=foundation.feature_dim if foundation else None,
            reconstruction=objective.reconstruction,
            adaptive=objective.adaptive,
            perceptual=self.perceptual,
            average=mean_of_workers,
            one_decoder_backward=recipe.compute.train.zero_stage < 3,  # which holds parameters in parts
        )
        self.critic = Critic(objective.discriminator) if trains and self.section.adversarial else None
        self.adversary = self.critic
        if self.section.pretrained_objective is not None:
            self._go_on(self.section.pretrained_objective)
        self.foundation = network if foundation else None
        self.shards, self.size = context.optional("shard"), recipe.image.size
        self.latent = (self.section.model.z_channels, recipe.latent_size, recipe.latent_size)
        self.noise = ImageNumbers(self.section.seed, "posterior")
        self.disturbances = ImageNumbers(self.section.seed, "latent noise")
        self.shares = ImageNumbers(self.section.seed, "latent noise share")
        self.facts: dict[str, Any] = {}
        if self.described is not None:
            self.facts["tokenizer"] = {"class_name": self.described.class_name, "factors": self.described.factors}
        if isinstance(model, PythonModel):
            self.facts["tokenizer"] = {"class_name": model.class_name, "sha256": own_code.digest(model)}
        if self.shards is None or not trains:
            return  # given weights: there may be no images, or none but those that they are scored on
        self.loader = Loader(
            self.shards,
            "train",
            [IMAGE],
            self.section.batch,
            self.section.seed,
            flips=recipe.image.flips,
            crop=_crop(self.section, self.size),
            threads=recipe.compute.train.cpus_per_worker,
            keys=False,
            pin=torch.cuda.is_available(),
            cache_gib=recipe.compute.train.cache_gib,
        )

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        pixels = to_tensor(batch.arrays[IMAGE], device).contiguous()
        begin, objective = self._objective(batch)
        given = {
            "images_B3HW": pixels,
            "noise_BCHW": self.noise.normal(batch.positions, self.latent).to(device),
            "weights": _weights(objective),
        }
        if objective.latent_noise > 0 and not is_held_out(batch):
            shares = objective.latent_noise * self.shares.uniform(batch.positions)
            noise = self.disturbances.normal(batch.positions, self.latent)
            given["disturbance_BCHW"] = (shares[:, None, None, None] * noise).to(device)
        if self.foundation is not None and objective.align_weight > 0:
            with autocast(self.section.foundation_precision, device):
                given |= self._features(pixels, device)
        begun = batch.images_seen - self.section.batch >= begin + objective.gan_start
        if self.critic is not None and not is_held_out(batch) and objective.gan_weight > 0 and begun:
            given["discriminator"] = self.critic.network.frozen
        return given

    def _features(self, pixels: Tensor, device: torch.device) -> dict[str, Any]:
        """The foundation model's of images; where the perceptual term looks with it too, in one pass for both."""
        assert self.foundation is not None
        if isinstance(self.perceptual, FeatureDistance) and self.foundation.layer is not None:
            *seen, features = self.perceptual.look(pixels, self.foundation.layer)
            return {"features_BDhw": features.float(), "seen": seen}
        return {"features_BDhw": self.foundation.to(device)(pixels).float()}

    @property
    def kept(self) -> nn.Module:
        return self.autoencoder.kept

    def documents(self) -> dict[str, bytes]:
        return {} if self.described is None else {CONFIG: to_json(self.described)}

    def objective_tensors(self) -> dict[str, Tensor]:
        """The projection and the discriminator, by name: what a later run's objective can go on from."""
        own = {
            name: value for name, value in self.module.state_dict().items() if not name.startswith(_NETWORK_IN_MODULE)
        }
        critic = {} if self.critic is None else self.critic.network.state_dict()
        return own | {f"{_DISCRIMINATOR}{name}": value for name, value in critic.items()}

    def scores(self, network: nn.Module, device: torch.device) -> dict[str, float]:
        """PSNR in dB of reconstructed posterior means as uint8, averaged over images of the test split."""
        total, count = 0.0, 0
        if self.shards is None or not self.shards.files("test/"):
            return {}
        for _, shown in images(self.shards, "test", self.size, _SCORED_IMAGES):
            pieces = to_tensor(shown, device).contiguous().split(at_once(len(shown), self.size))
            again = to_pixels(torch.cat([network(piece)[0] for piece in pieces]))
            total += float(peak_signal_to_noise(shown, again).sum())
            count += len(shown)
        return {"psnr": total / count} if count else {}

    def _objective(self, batch: Batch) -> tuple[int, VavaeObjective]:
        """The stage of the batch, and where the stage begins. Held-out images are scored by the last stage's, so that
        scores can be compared throughout.
        """
        if is_held_out(batch):
            return self.objectives[-1]
        first = batch.images_seen - self.section.batch
        return next(stage for stage in reversed(self.objectives) if stage[0] <= first)

    def _go_on(self, location: str) -> None:
        """Load another run's projection and discriminator, every tensor of them or none.

        Raises:
            UserError: naming tensors that are missing, unknown or of another shape.
        """
        found, own = load_tensors(location, "the objective"), self.objective_tensors()
        problems = [f"{name} is missing" for name in own.keys() - found.keys()]
        problems += [f"{name} belongs to nothing here" for name in found.keys() - own.keys()]
        problems += [
            f"{name} has shape {tuple(found[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own.keys() & found.keys()
            if own[name].shape != found[name].shape
        ]
        if problems:
            raise UserError(
                f"train_vavae.pretrained_objective {location}: {'; '.join(sorted(problems)[:5])}: let the terms, "
                "foundation and discriminator be as they were in that run, or leave pretrained_objective out"
            )
        with torch.no_grad():
            for name, value in own.items():  # views of the parameters themselves
                value.copy_(found[name])


def external(recipe: Recipe) -> dict[str, str] | None:
    """Which files of weights, where some are; VGG's are one published file, and refused with a remedy of their own."""
    given = section(recipe)
    found = identities(
        foundation=recipe.foundation.weights if recipe.foundation else None,
        pretrained=given.pretrained,
        pretrained_objective=given.pretrained_objective,
    )
    if isinstance(given.model, DiffusersModel) and (content := identity(given.model)) is not None:
        found["tokenizer"] = content
    if isinstance(given.model, PythonModel):
        found |= {"code": own_code.digest(given.model), **identities(weights=given.model.weights)}
    return found or None


def check(recipe: Recipe) -> None:
    """Raises UserError where the weights that the recipe names do not fit it."""
    given = section(recipe)
    if isinstance(given.model, DiffusersModel):
        check_diffusers(recipe, given.model)
    if isinstance(given.model, PythonModel):
        trust(recipe.model_dump(mode="json"))
        own_code.check(given.model, recipe.image.size)
    if given.images and given.perceptual and not given.objective.perceptual_layers:
        check_weights(given.objective.lpips_weights)
    check_pretrained(lambda: build_autoencoder(given.model), given.pretrained, "train_vavae.pretrained")


STAGE = TrainedStage(
    name="train_vavae",
    version=2,
    sections=("image", "foundation", "train_vavae"),
    inputs=("shard",),
    on_first_set=True,
    run=run,
    external=external,
    check=check,
    section=section,
    trainee=Tokenizer,
)
