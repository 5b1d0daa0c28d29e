"""From recipe sections and artifacts to networks: the one place where configs meet models."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Union

import torch
from safetensors.torch import load as load_safetensors
from torch import nn

from configs.autoencoders import DiffusersModel, PythonModel, Tokenizer
from configs.diffusion import DiffusionModel, DitModel, SemanticFirstClock, UnetModel
from configs.errors import UserError
from configs.load import read_recorded
from configs.recipe import Recipe
from configs.tokenizers import SemvaeModel, TrainVavae
from infra import logs
from infra.artifacts import Artifact
from infra.compiled import keep_compiled, once_a_machine
from infra.device import HALVES
from infra.diffusers_files import CONFIG, described, tensors
from infra.weights import load_pretrained
from models.autoencoder import AutoencoderKL, Identity
from models.cascade_dit import CascadeDiT
from models.clocks import Clock, SemanticFirst, Synchronous
from models.diffusers_config import Described, describe
from models.edm import DenoisingMatching, Preconditioning
from models.execution import halve, prepare
from models.flow_map import FlowMapDiT
from models.groups import ChannelGroups
from models.image_autoencoder import ImageAutoencoder
from models.kinds import Kind
from models.lightningdit import LightningDiT
from models.objectives import Objective, TimeDistribution, VelocityMatching
from models.semantic_vae import SemanticVAE
from models.sizes import SIZES
from models.wide_head_dit import WideHeadDiT
from tasks import snapshots
from tasks.foreign import own_code
from tasks.foreign.foundations import check_foundation as check_foundation
from tasks.foreign.foundations import check_grid as check_grid
from tasks.foreign.foundations import load_foundation as load_foundation

WEIGHTS = "model.safetensors"
EMA_WEIGHTS = "ema.safetensors"

Network = TypeVar("Network", bound=nn.Module)

if TYPE_CHECKING:
    from models.cascade_unet import CascadeUNet
    from models.diffusers_autoencoder import DiffusersAutoencoder
DiffusionNetwork: TypeAlias = Union[LightningDiT, "CascadeUNet"]


def build_autoencoder(section: Tokenizer) -> ImageAutoencoder:
    """The autoencoder that a recipe describes, with random weights.

    Raises:
        UserError: it is somebody else's, whose configuration cannot be had or is not what the recipe says.
    """
    if isinstance(section, DiffusersModel):
        return build_diffusers(described(section))
    if isinstance(section, PythonModel):
        return own_code.build(section)
    return Identity() if section.identity else AutoencoderKL(**section.model_dump(exclude={"identity", "kind"}))


def build_diffusers(found: Described) -> DiffusersAutoencoder:
    """Raises UserError where diffusers cannot build what a configuration describes."""
    from models.diffusers_autoencoder import DiffusersAutoencoder  # its library takes seconds to import

    try:
        return DiffusersAutoencoder(found)
    except ValueError as error:
        raise UserError(f"train_vavae.model: {error}") from None


def load_diffusers(network: ImageAutoencoder, section: DiffusersModel) -> None:
    """Load the weights at the section's location. Raises UserError where they do not fit."""
    from models.diffusers_autoencoder import DiffusersAutoencoder, fitted

    assert isinstance(network, DiffusersAutoencoder)
    try:
        network.network.load_state_dict(fitted(network, tensors(section)))
    except ValueError as error:
        raise UserError(f"train_vavae.model.location {section.location}: {error}") from None


def given_autoencoder(section: TrainVavae) -> ImageAutoencoder:
    """The autoencoder that a recipe describes with the weights that it names, frozen.

    Raises:
        UserError: they cannot be had or do not fit.
    """
    network = build_autoencoder(section.model)
    if isinstance(section.model, DiffusersModel):
        load_diffusers(network, section.model)
    elif isinstance(section.model, PythonModel):
        own_code.load(section.model, network)
    elif section.pretrained is not None:
        load_pretrained(network, section.pretrained)
    return network.requires_grad_(False).eval()


def check_diffusers(recipe: Recipe, section: DiffusersModel) -> None:
    """Refuse files that are not what the recipe says, without the memory that their network takes.

    Raises:
        UserError: naming the field, the file and what does not fit.
    """
    from models.diffusers_autoencoder import fitted

    found = described(section)
    if found.side not in (None, recipe.image.size):
        raise UserError(
            f"image.size is {recipe.image.size} but this {section.class_name} ({section.location}) makes images of "
            f"{found.side} × {found.side} only: set image.size: {found.side}"
        )
    with torch.device("meta"):
        network = build_diffusers(found)
    try:
        fitted(network, tensors(section))
    except ValueError as error:
        raise UserError(f"train_vavae.model.location {section.location}: {error}") from None


def build_semantic_vae(section: SemvaeModel, feature_dim: int) -> SemanticVAE:
    return SemanticVAE(**_semantic_vae_arguments(section, feature_dim))


def _semantic_vae_arguments(section: SemvaeModel, feature_dim: int) -> dict[str, Any]:
    return {
        "feature_dim": feature_dim,
        "width": section.width,
        "depth": section.depth,
        "num_heads": section.heads,
        "bottleneck": section.channels,
    }


def channel_groups(recipe: Recipe) -> ChannelGroups:
    groups = recipe.channel_groups
    return ChannelGroups(tuple(groups), tuple(groups.values()))


def build_clock(recipe: Recipe) -> Clock:
    clock = recipe.train_dit.clock
    if isinstance(clock, SemanticFirstClock):
        return SemanticFirst(clock.delta)
    return Synchronous(len(recipe.channel_groups))


def sampling_clock(recipe: Recipe) -> Clock:
    """The clock of a sample: training's, but for the lead that `sample.delta` may say."""
    delta = recipe.sample.delta
    return build_clock(recipe) if delta is None else SemanticFirst(delta)


def build_network(recipe: Recipe, section: DiffusionModel) -> DiffusionNetwork:
    """The diffusion network of a recipe; `section` is its own or a weak guide's."""
    return build_unet(recipe, section) if isinstance(section, UnetModel) else build_dit(recipe, section)


def build_unet(recipe: Recipe, section: UnetModel) -> CascadeUNet:
    from models.cascade_unet import CascadeUNet  # its library takes seconds to import

    return CascadeUNet(**_unet_arguments(recipe, section))


def _unet_arguments(recipe: Recipe, section: UnetModel) -> dict[str, Any]:
    return {
        "resolutions": recipe.sides,
        "num_classes": recipe.data.classes,
        "channels": section.channels,
        "multipliers": section.multipliers,
        "blocks": section.blocks,
        "norm_channels": section.norm_channels,
        "attention": section.attention,
        "dropout": section.dropout,
        "augmented": section.augment > 0,
        "preconditioning": Preconditioning(section.sigma_data),
    }


def build_objective(recipe: Recipe) -> Objective:
    """What the diffusion network is trained by."""
    section = recipe.train_dit
    if isinstance(section.model, UnetModel):
        return DenoisingMatching(section.model.sigma_data, section.model.sigma_mean, section.model.sigma_spread)
    groups, objective = channel_groups(recipe), section.objective
    weights = {"texture": 1.0, "semantic": objective.semantic_weight}
    return VelocityMatching(
        groups,
        build_clock(recipe),
        group_weights=tuple(weights[name] for name in groups.names),
        direction_weight=objective.direction_weight,
        direction_floor=objective.direction_floor,
        align_weight=objective.align_weight,
        align_mode=objective.align_mode,
        align_until=objective.align_until,
        contrastive_weight=objective.contrastive_weight,
        routed=(section.routing.first, section.routing.last) if section.routing else (1, 1),
        times=TimeDistribution(objective.times, objective.uniform_after, recipe.time_shift(objective.shift_base, 1.0)),
    )


def build_dit(recipe: Recipe, section: DitModel) -> LightningDiT:
    """The diffusion transformer that fits the recipe's latents and resolutions; `section` is its own or a weak
    guide's."""
    arguments = _dit_arguments(recipe, section)
    if "head_hidden" in arguments:
        return WideHeadDiT(**arguments)
    return CascadeDiT(**arguments) if "resolutions" in arguments else LightningDiT(**arguments)


def _dit_arguments(recipe: Recipe, section: DitModel) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "input_size": recipe.latent_size,
        "patch_size": section.patch_size,
        "positions_of": section.positions_of,
        "in_channels": recipe.latent_channels,
        "num_classes": recipe.data.classes,
        "groups": channel_groups(recipe),
        "qk_norm": section.qk_norm,
        "swiglu": section.swiglu,
        "rope": section.rope,
        "rmsnorm": section.rmsnorm,
        "shift": section.shift,
        "learn_sigma": section.learn_sigma,
        "align_depth": section.align_depth,
        "align_dim": recipe.foundation.feature_dim if recipe.foundation and section.align_depth else None,
        "align_hidden": section.align_hidden,
    }
    arguments |= SIZES[section.size] if section.size else section.dimensions
    arguments |= {"value_residual": True} if section.value_residual else {}
    if section.head is not None:
        without = ("learn_sigma", "align_depth", "align_dim", "align_hidden")
        arguments = {name: value for name, value in arguments.items() if name not in without}
        head = section.head
        return arguments | {"head_hidden": head.hidden_size, "head_depth": head.depth, "head_heads": head.heads}
    return arguments if recipe.train_dit.cascade is None else arguments | {"resolutions": recipe.sides}


def build_flow_map(recipe: Recipe) -> FlowMapDiT:
    """What `tune_fewstep` trains: the recipe's diffusion transformer as a map, without an alignment head."""
    return FlowMapDiT(**_flow_map_arguments(recipe))


def _flow_map_arguments(recipe: Recipe) -> dict[str, Any]:
    assert isinstance(recipe.train_dit.model, DitModel)  # the recipe's rules
    return _dit_arguments(recipe, recipe.train_dit.model) | {"align_depth": None, "align_dim": None}


def kind_and_arguments(recipe: Recipe, stage: str, model: DiffusionModel | None = None) -> tuple[Kind, dict[str, Any]]:
    """Kind and constructor arguments of the network that a stage trains, as `models.formats.build` takes them: plain
    JSON values.

    model: of a diffusion network, another than the recipe's own, such as a weak guide's.
    """
    kind: Kind
    if stage == "train_vavae":
        kind, arguments = "autoencoder", recipe.train_vavae.model.model_dump(exclude={"identity", "kind"})
    elif stage == "train_semvae":
        assert recipe.train_semvae is not None and recipe.foundation is not None  # the recipe has this stage
        found = _semantic_vae_arguments(recipe.train_semvae.model, recipe.foundation.feature_dim)
        kind, arguments = "semantic_vae", found
    elif stage == "tune_fewstep":
        kind, arguments = "lightningdit", _flow_map_arguments(recipe) | {"flow_map": True}
    else:
        section = model or recipe.train_dit.model
        if isinstance(section, UnetModel):
            kind, arguments = "cascade_unet", _unet_arguments(recipe, section)
        else:
            kind, arguments = "lightningdit", _dit_arguments(recipe, section)
    plain: dict[str, Any] = json.loads(json.dumps(arguments, default=asdict))
    return kind, plain


def trained_autoencoder(artifact: Artifact) -> ImageAutoencoder:
    """The tokenizer of a `train_vavae` artifact, frozen."""
    section = read_recorded(artifact.manifest.recipe).train_vavae.model
    if isinstance(section, DiffusersModel):
        network: ImageAutoencoder = build_diffusers(describe(json.loads(artifact.read(CONFIG)), section.class_name))
    elif isinstance(section, PythonModel):
        network = own_code.build(section, artifact.manifest.facts["tokenizer"]["sha256"])
    else:
        network = build_autoencoder(section)
    _frozen(network.kept, artifact, WEIGHTS)
    return network.eval()


def trained_semantic_vae(artifact: Artifact) -> SemanticVAE:
    """The Semantic VAE of a `train_semvae` artifact, frozen."""
    recipe = read_recorded(artifact.manifest.recipe)
    if recipe.train_semvae is None or recipe.foundation is None:
        raise UserError(f"{artifact.uri}: its recipe has no train_semvae or no foundation section")
    network = build_semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim)
    return _frozen(network, artifact, WEIGHTS)


def trained_dit(
    artifact: Artifact, ema: bool, sigma_rel: float | None = None, images_seen: int | None = None
) -> DiffusionNetwork:
    """The diffusion network of a `train_dit` artifact, or the map of a `tune_fewstep` one, frozen; averaged weights
    where `ema`.

    sigma_rel: of the average that is put together from the artifact's snapshots instead.
    images_seen: where that average ends; None is the end of training.

    Raises:
        UserError: `sigma_rel` without snapshots.
    """
    recipe = read_recorded(artifact.manifest.recipe)
    has_ema = bool(artifact.files(EMA_WEIGHTS))
    mapped = artifact.stage == "tune_fewstep"
    fresh = build_flow_map(recipe) if mapped else build_network(recipe, recipe.train_dit.model)
    network = _frozen(fresh, artifact, EMA_WEIGHTS if ema and has_ema else WEIGHTS)
    if sigma_rel is not None:
        network.load_state_dict(snapshots.average(artifact, sigma_rel, images_seen), strict=False)
    return network


def _frozen(network: Network, artifact: Artifact, name: str) -> Network:
    network.load_state_dict(load_safetensors(artifact.read(name)))
    return network.requires_grad_(False).eval()


def ready(network: Network, compiled: bool, precision: str = "fp32") -> Network:
    """The same frozen network, its blocks compiled in place (see `prepare`) where that is wanted, and where it will run
    in a half precision, with products' weights in that (see `halve`).
    """
    if precision in HALVES:
        halve(network, HALVES[precision])
    if compiled:
        keep_compiled()
        prepare(network, compile=True, tell=logs.say, turn=once_a_machine)
    return network
