"""Stage `train_dit`: LightningDiT, SFD or LowDiff by velocity matching on latents that are stored or made of images
beside the step (papers.md 1.5, 2.5, 3.3).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from configs import Recipe, UserError
from configs.diffusion import DitModel, TrainDit, UnetModel
from infra.artifacts import Artifact
from infra.device import autocast
from infra.logs import say
from infra.weights import check_pretrained, identities, load_pretrained
from models.augmentation import DRAWS, Augmentation
from models.cascade import TrainableCascade
from models.objectives import TrainableVelocity
from models.routing import kept_tokens
from tasks.data.crops import Crop
from tasks.data.given_statistics import differences, given_statistics, tell_differences
from tasks.data.given_statistics import external as given_external
from tasks.data.pixels import to_tensor
from tasks.data.statistics import LatentStatistics
from tasks.encoder import LatentNetworks
from tasks.loading.loader import IMAGE, Batch, Loader
from tasks.networks import build_network, build_objective, check_grid, load_foundation
from tasks.randomness import ImageNumbers
from tasks.sampling.preview import DiffusionPreview
from tasks.stage import Context, Outcome
from tasks.training import checkpoints
from tasks.training.launch import train
from tasks.training.probe import probe, stored_latents
from tasks.training.resolutions import Resolutions
from tasks.training.stage import TrainedStage
from tasks.training.trainee import HELD_OUT, Trainee, is_held_out

_ALIGN = "f"
_PROBED = 16
"""Latents on which given weights are looked at before they are trained further: seconds, without a GPU too."""


def section(recipe: Recipe) -> TrainDit:
    return recipe.train_dit


def run(context: Context) -> Outcome:
    """Train the diffusion transformer, or take the weights that `train_dit.pretrained` names."""
    latents = context.optional("encode")
    if latents is not None and (given := given_statistics(context.recipe)) is not None:
        tell_differences(given[0], LatentStatistics.from_facts(latents.manifest.facts, latents.uri), given[1])
    if latents is not None:
        _tell_loss(context, latents)
    return train(context, context.recipe.train_dit)


def _tell_loss(context: Context, latents: Artifact) -> None:
    """Before given weights are trained further, say what their loss is on these latents."""
    section, begun = context.recipe.train_dit, context.out.names(checkpoints.FOLDER)
    plain = isinstance(section.model, DitModel) and section.cascade is None
    plain = plain and not context.recipe.online_latents
    if section.pretrained is None or not section.images or begun or not plain:
        return
    found = probe(context.recipe, stored_latents(latents, _PROBED))
    say(f"train_dit: before training, {found.verdict}", "info" if found.fits else "warning", loss=found.loss)


class Diffusion(Trainee):
    """The trainee: normalised latents, a clock per channel group, and the velocity objective."""

    def __init__(self, context: Context) -> None:
        recipe = context.recipe
        self.section = recipe.train_dit
        objective = self.section.objective
        network = build_network(recipe, self.section.model)
        if self.section.pretrained is not None:
            load_pretrained(network, self.section.pretrained)
        self.network: nn.Module = network
        self.null_label = network.null_label
        trainable = TrainableVelocity if self.section.cascade is None else TrainableCascade
        self.module: nn.Module = trainable(network, build_objective(recipe))
        latents = context.optional("encode")
        self.statistics, self.facts = standard(recipe, latents)
        self.resolutions: Resolutions | None = None
        self.aligned = objective.align_weight > 0
        self.noise = ImageNumbers(self.section.seed, "noise")
        self.times = ImageNumbers(self.section.seed, "time")
        self.drops = ImageNumbers(self.section.seed, "label dropout")
        augmented = self.section.model.augment if isinstance(self.section.model, UnetModel) else 0.0
        self.augmentation = Augmentation(augmented) if augmented else None
        self.draws = ImageNumbers(self.section.seed, "augmentation")
        self.routes = ImageNumbers(self.section.seed, "routing")
        self.foundation: Any = None
        self.encoder: LatentNetworks | None = None
        self.shards: Artifact | None = None
        if latents is None:
            return  # given weights of given statistics: nothing is trained
        if self.section.cascade is not None:
            self.resolutions = Resolutions(self.section.cascade, latents, self.section.seed, self.statistics)
            self.facts |= self.resolutions.facts
        self.latents = latents
        if self.section.images:
            self._load_frozen(recipe, latents)
        self.side, self.flips, compute = recipe.image.size, recipe.image.flips, recipe.compute.train
        self.threads, self.cache_gib = compute.cpus_per_worker, compute.cache_gib
        self.loader = self._loader("train", self.section.seed, self.flips)

    def _load_frozen(self, recipe: Recipe, latents: Artifact) -> None:
        """Networks that look at images beside the steps, and the shards of these."""
        if self.section.online:
            assert recipe.foundation is not None  # the recipe's rules
            self.foundation = load_foundation(recipe.foundation)
            check_grid(self.foundation, recipe)
            self.target_shape = (recipe.foundation.feature_dim, recipe.latent_size, recipe.latent_size)
            self.shards = _made_of(latents, "train_dit.objective.align", "shard")
        if recipe.online_latents:
            self.shards = _made_of(latents, "encode.latents", "shard")
            made = partial(_made_of, latents, "encode.latents")
            self.encoder = LatentNetworks(recipe, made, torch.device("cpu"), compiled=False)
            self.posteriors = ImageNumbers(self.section.seed, "posterior")

    def held_out(self) -> Loader:
        return self._loader(HELD_OUT, 0, False)

    def _loader(self, split: str, seed: int, flips: bool) -> Loader:
        columns = [] if self.encoder is not None else list(self.statistics.columns)
        columns += [_ALIGN] if self.aligned and not self.section.online else []
        options: dict[str, Any] = {"flips": flips, "threads": self.threads, "cache_gib": self.cache_gib}
        options |= {"keys": False, "pin": torch.cuda.is_available()}
        if self.shards is not None:
            columns, options = [*columns, IMAGE], options | {"shards": self.shards, "crop": Crop(self.side)}
            if self.encoder is None and split == "train":  # images are for the targets alone
                options["images_until"] = self.section.objective.align_until
        return Loader(self.latents, split, columns, self.section.batch, seed, **options)

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        latents = self._latents(batch, device)
        given: dict[str, Any] = {}
        if self.augmentation is not None and not is_held_out(batch):
            draws = self.draws.normal(batch.positions, (DRAWS,)).to(device)
            latents, given["augment_BA"] = self.augmentation(latents.float(), draws)
        if self.resolutions is None:
            x1 = self.statistics.normalise(latents)
        else:
            side = self.resolutions.side(batch.images_seen)
            x1 = self.resolutions.target(latents, side)
            condition, level = self.resolutions.condition(latents, batch.positions, side)
            given |= {"condition_BCHW": condition, "level_B": level, "weight": self.resolutions.weight(side)}
        labels = torch.from_numpy(batch.labels)
        dropped = self.drops.uniform(batch.positions) < self.section.objective.label_dropout
        given |= {
            "x1_BCHW": x1,
            "y_B": labels.masked_fill(dropped, self.null_label).to(device),
            "noise_BCHW": self.noise.normal(batch.positions, x1.shape[1:]).to(device),
            "u_B": self.times.uniform(batch.positions).to(device),
            "images_seen": batch.images_seen,
        }
        if (kept := self._kept(batch, x1.shape[-1])) is not None:
            given["kept_BK"] = kept.to(device)
        if self.aligned:
            features = self._targets(batch, device)
            if self.resolutions is not None:
                features = self.resolutions.cascade.lowered(features.float(), x1.shape[-1])
            given["align_target_BChw"] = features.float()
        return given

    def _latents(self, batch: Batch, device: torch.device) -> Tensor:
        """The batch's latents (B, C, h, w): as stored, in float16, or in float32 of its images, of which a posterior is
        drawn anew in every epoch."""
        if self.encoder is None:
            names = self.statistics.columns
            return torch.cat([torch.as_tensor(batch.arrays[n]).to(device, non_blocking=True) for n in names], dim=1)
        recipe = self.encoder.recipe
        with torch.no_grad(), autocast(recipe.encode.precision, device):
            posteriors, _ = self.encoder.to(device).posteriors(to_tensor(batch.arrays[IMAGE], device))
        means = torch.cat([posterior.mean for posterior in posteriors.values()], dim=1)
        if recipe.encode.posterior == "mean":
            return means
        deviations = torch.cat([posterior.std for posterior in posteriors.values()], dim=1)
        return means + deviations * self.posteriors.normal(batch.positions, means.shape[1:]).to(device)

    def _kept(self, batch: Batch, side: int) -> Tensor | None:
        """Tokens of each image that are not routed around the middle blocks; None where none are."""
        routing, model = self.section.routing, self.section.model
        if routing is None or isinstance(model, UnetModel) or is_held_out(batch):
            return None
        if batch.images_seen >= routing.dense_from(self.section.images):
            return None
        tokens = (side // model.patch_size) ** 2
        return kept_tokens(self.routes.normal(batch.positions, (tokens,)), routing.drop)

    def _targets(self, batch: Batch, device: torch.device) -> Tensor:
        """Features of the batch's images to align with, as stored or of the images themselves."""
        if self.foundation is None:
            return torch.as_tensor(batch.arrays[_ALIGN]).to(device, non_blocking=True)
        until = self.section.objective.align_until
        if until is not None and batch.images_seen >= until:  # whatever they are, they count no more
            return torch.zeros(len(batch.labels), *self.target_shape, device=device)
        with autocast(self.section.foundation_precision, device):
            features: Tensor = self.foundation.to(device)(to_tensor(batch.arrays[IMAGE], device).contiguous())
        return features


def _made_of(latents: Artifact, field: str, stage: str) -> Artifact:
    """What `stage` made for latents: images or a network. Raises UserError where they were not made of that."""
    made_of = latents.manifest.inputs.get(stage)
    if made_of is None:
        missing = "images" if stage == "shard" else f"what {stage} makes"
        raise UserError(
            f"{field} is online, but the latents in {latents.uri} come without {missing}: set it to stored, and take "
            "what is stored of them"
        )
    return Artifact(latents.root, stage, made_of)


def standard(recipe: Recipe, latents: Artifact | None) -> tuple[LatentStatistics, dict[str, Any]]:
    """What latents are standardised by, and what the artifact records of it."""
    given = given_statistics(recipe)
    if given is None:
        assert latents is not None  # the recipe's rules: without latents, statistics are given
        found, facts = LatentStatistics.from_facts(latents.manifest.facts, latents.uri), dict[str, Any]()
    else:
        found, facts = given[0], {"statistics_from": given[1]}
        if latents is not None:
            own = LatentStatistics.from_facts(latents.manifest.facts, latents.uri)
            facts["statistics_differences"] = differences(found, own)
    return found, {"statistics": dict(found.values), "statistics_hash": found.hash, **facts}


def preview(context: Context, trained: Diffusion) -> DiffusionPreview:
    return DiffusionPreview(context, trained.network, trained.statistics)  # type: ignore[arg-type]


def external(recipe: Recipe) -> dict[str, str] | None:
    """Which files of weights it starts from and aligns with, and which statistics, where some are given."""
    online = section(recipe).online and recipe.foundation is not None
    foundation = recipe.foundation.weights if online and recipe.foundation else None
    named = identities(pretrained=section(recipe).pretrained, foundation=foundation)
    return named | given_external(recipe) or None


def check(recipe: Recipe) -> None:
    """Raises UserError where the weights or the statistics that the recipe names do not fit it."""
    model = section(recipe).model
    check_pretrained(lambda: build_network(recipe, model), section(recipe).pretrained, "train_dit.pretrained")
    given_statistics(recipe)


STAGE = TrainedStage(
    name="train_dit",
    version=2,
    sections=("data", "image", "foundation", "train_dit"),
    inputs=("encode",),
    run=run,
    external=external,
    check=check,
    section=section,
    trainee=Diffusion,
    preview=preview,
)
