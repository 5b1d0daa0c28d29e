"""The rules that hold between the sections of a recipe.

Each is a function that raises ValueError with the fields, what was found and what would be right. A rule is told
which sections it is about and does not look where a recipe leaves one of them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from configs.autoencoders import AutoencoderModel
from configs.diffusion import DiffusionModel, DitModel, SemanticFirstClock, StatisticsFiles, UnetModel
from configs.sampling import AutoGuidance
from configs.sampling_rules import sampled

if TYPE_CHECKING:
    from configs.recipe import Recipe


Rules = Mapping[Callable[["Recipe"], None], tuple[str, ...]]


def check(recipe: Recipe, rules: Rules) -> None:
    """Raises ValueError with all in which sections do not fit each other."""
    faults: list[str] = []
    for rule, sections in rules.items():
        if any(recipe.lacks(section) for section in sections):
            continue
        try:
            rule(recipe)
        except ValueError as fault:
            faults.append(str(fault))
        if faults and not recipe.latent_size:  # no cell is left, and nothing more to be said of grids
            break
    if faults:
        raise ValueError("; ".join(faults))


def _sizes(recipe: Recipe) -> None:
    downscale = recipe.train_vavae.model.downscale
    if recipe.image.size % downscale:
        model = recipe.train_vavae.model
        ours = isinstance(model, AutoencoderModel)
        levels = f" ({len(model.channel_multipliers)} levels)" if isinstance(model, AutoencoderModel) else ""
        raise ValueError(
            f"image.size {recipe.image.size} is not a multiple of {downscale}, the tokenizer's downscale{levels}: use "
            f"{max(1, recipe.image.size // downscale) * downscale}{' or another number of levels' if ours else ''}"
        )


def _patches(recipe: Recipe) -> None:
    for field, model in models_of(recipe):
        if not isinstance(model, DitModel):
            continue
        if recipe.latent_size % model.patch_size:
            raise ValueError(
                f"{field}.patch_size {model.patch_size} does not divide the latent side {recipe.latent_size} "
                f"(image.size {recipe.image.size} / {recipe.train_vavae.model.downscale}): use a divisor"
            )
        routed = recipe.train_dit.routing is not None
        if model.head is not None and (recipe.train_semvae or recipe.train_dit.cascade or routed):
            raise ValueError(
                f"{field}.head has one clock, one resolution and all tokens: leave train_semvae, train_dit.cascade and "
                "train_dit.routing out"
            )
        if model.positions_of is not None and recipe.train_dit.cascade is not None:
            raise ValueError(
                f"{field}.positions_of is {model.positions_of} but train_dit.cascade has sides of its own, whose "
                "positions are the finest one's: leave positions_of out"
            )
        for side in recipe.sides:
            if side % model.patch_size:
                raise ValueError(
                    f"{field}.patch_size {model.patch_size} does not divide {side}, one of train_dit.cascade.sides: "
                    "use a divisor, or other sides"
                )


def models_of(recipe: Recipe) -> list[tuple[str, DiffusionModel]]:
    """The network that is trained and those that guide it, with their fields' names."""
    guides = ((field, section.guidance) for field, section in sampled(recipe))
    return [
        ("train_dit.model", recipe.train_dit.model),
        *((f"{field}.guidance.model", each.model) for field, each in guides if isinstance(each, AutoGuidance)),
    ]


def _cascade(recipe: Recipe) -> None:
    cascade = recipe.train_dit.cascade
    if cascade is None:
        return
    whole = recipe.latent_size
    for side in cascade.sides:
        factor, rest = divmod(whole, side)
        if rest or factor & (factor - 1):
            raise ValueError(
                f"train_dit.cascade.sides names {side}, but only halvings of the latents' side {whole} (image.size "
                f"{recipe.image.size} / {recipe.train_vavae.model.downscale}) have statistics: use "
                f"{', '.join(str(whole >> halving) for halving in range(whole.bit_length()) if not whole % 2**halving)}"
            )
    if cascade.sides[-1] != whole:
        raise ValueError(
            f"train_dit.cascade.sides ends at {cascade.sides[-1]}: it must end at the latents' side {whole}"
        )


def _pixels(recipe: Recipe) -> None:
    model, identity = recipe.train_dit.model, recipe.train_vavae.model.identity
    for field, each in models_of(recipe):
        if isinstance(each, UnetModel) != identity:
            raise ValueError(
                f"{field}.kind is {each.kind} but train_vavae.model.identity is {str(identity).lower()}: a UNet "
                "denoises pixels (identity: true), a LightningDiT latents"
            )
    if not isinstance(model, UnetModel):
        return
    if recipe.train_semvae is not None or recipe.train_dit.clock.kind != "synchronous":
        raise ValueError(
            "train_semvae and train_dit.clock have no place beside a UNet: pixels have no semantic channels"
        )
    if recipe.train_dit.cascade is None:
        raise ValueError(
            f"train_dit.cascade is not set: name the sides of the UNet, or one for none, sides: [{recipe.latent_size}]"
        )
    for stage in () if recipe.lacks("sample") else recipe.sampled_resolutions:
        own = recipe.sample.at(stage)
        bent = own.shift or own.off_by_one or own.times
        if own.solver in ("dopri5", "sde") or bent or own.steps < 2:
            raise ValueError(
                f"sample at side {stage.side} asks for solver {own.solver}, {own.steps} steps, shift {own.shift:g}, "
                f"off_by_one {str(own.off_by_one).lower()}, times {own.times}: a UNet is sampled by heun, euler, "
                "dpmpp_2m or unipc in at least 2 steps over the noise levels of its own section, without shift, "
                "off_by_one and times"
            )


def _stored(recipe: Recipe) -> None:
    reencode = recipe.shard.reencode
    if reencode is not None and reencode.size < recipe.image.size:
        raise ValueError(
            f"shard.reencode.size {reencode.size} is below image.size {recipe.image.size}, so encode would enlarge "
            f"what shard has shrunk: use {recipe.image.size} or more"
        )


def _nothing_to_train_on(recipe: Recipe) -> None:
    if recipe.shard.test_share < 1.0:
        return
    for name in ("train_vavae", "train_semvae", "train_dit"):
        section = getattr(recipe, name)
        if section is not None and section.images:
            raise ValueError(f"shard.test_share is 1, which leaves {name} no image to train on: lower it")


def _moments(recipe: Recipe) -> None:
    if recipe.encode.posterior == "moments" and recipe.train_dit.images:
        raise ValueError(
            "encode.posterior is moments but train_dit takes latents as they are stored and would train on means: "
            "use sample, or train_dit.images: 0 with train_dit.pretrained to store moments for another trainer"
        )


def _online_latents(recipe: Recipe) -> None:
    if not recipe.online_latents:
        return
    section = recipe.encode
    if recipe.ready_latents:
        raise ValueError(
            "encode.latents is online but data.source.kind is latents, which brings no images to make them of: use "
            "stored"
        )
    if section.align_features:
        raise ValueError(
            "encode.latents is online but encode.align_features is true, which stores more than latents are: set it "
            "to false, and train_dit.objective.align: online where features are aligned with"
        )
    if section.posterior == "moments":
        raise ValueError(
            "encode.latents is online but encode.posterior is moments, which are stored for other trainers: use sample "
            "or mean"
        )


def _semantics(recipe: Recipe) -> None:
    if recipe.train_semvae is not None and recipe.foundation is None:
        raise ValueError("train_semvae needs foundation: name the network whose features it compresses")
    resize = None if recipe.train_semvae is None else recipe.train_semvae.resize
    if resize is not None and recipe.foundation is not None and resize < recipe.foundation.input_size:
        raise ValueError(
            f"train_semvae.resize is {resize}, too little to cut foundation.input_size {recipe.foundation.input_size} "
            "pixels from: the published values are 256 and 224"
        )


def _semantic_channels(recipe: Recipe) -> None:
    semantic = recipe.train_semvae is not None
    if isinstance(recipe.train_dit.clock, SemanticFirstClock) and not semantic:
        raise ValueError(
            "train_dit.clock.kind is semantic_first but train_semvae is not set, so there are no semantic "
            "channels: add train_semvae or use kind: synchronous"
        )
    delta = None if recipe.lacks("sample") else recipe.sample.delta
    if delta is not None and not isinstance(recipe.train_dit.clock, SemanticFirstClock):
        raise ValueError(
            f"sample.delta is {delta:g} but train_dit.clock.kind is {recipe.train_dit.clock.kind}, whose groups run "
            "together: leave it out"
        )
    if recipe.train_dit.objective.semantic_weight != 1.0 and not semantic:
        raise ValueError(
            f"train_dit.objective.semantic_weight is {recipe.train_dit.objective.semantic_weight} but train_semvae "
            "is not set, so there are no semantic channels: add train_semvae or leave the weight at 1"
        )


def _statistics(recipe: Recipe) -> None:
    given = recipe.train_dit.statistics
    if not isinstance(given, StatisticsFiles):
        return
    semantic = recipe.train_semvae is not None
    if semantic and given.semantic is None:
        raise ValueError(
            "train_dit.statistics.semantic is not set but train_semvae is, so there are semantic channels: name the "
            "file of their statistics (latents_sv_stats.pt) beside texture's"
        )
    if not semantic and given.semantic is not None:
        raise ValueError(
            "train_dit.statistics.semantic is set but train_semvae is not, so there are no semantic "
            "channels: leave it out"
        )


def _ready_latents(recipe: Recipe) -> None:
    """What needs pixels has no place beside a source that has none."""
    if not recipe.ready_latents:
        return
    where = "data.source.kind is latents, which brings no images"
    for name in ("train_vavae", "train_semvae"):
        section = getattr(recipe, name)
        if section is not None and section.images:
            raise ValueError(
                f"{name}.images is {section.images} but {where} to train on: set it to 0 and name the weights that the "
                f"latents were made with in {name}.pretrained"
            )
    if recipe.encode.posterior != "sample":
        raise ValueError(f"encode.posterior is {recipe.encode.posterior} but {where}: use sample, which is published")
    if recipe.compute.train.preview_scored:
        raise ValueError(f"compute.train.preview_scored is set but {where} to compare with: leave it out")
    if not recipe.lacks("train_dit") and recipe.train_dit.online and recipe.train_dit.images:
        raise ValueError(
            f"train_dit.objective.align is online but {where} to make targets of: set it to stored, and "
            "encode.align_features: true where the latents come with features (feats_dino)"
        )
    if not recipe.lacks("train_dit") and recipe.train_dit.validation is not None:
        raise ValueError(f"train_dit.validation is set but {where} and no test split: leave it out")
    if not recipe.lacks("evaluate") and recipe.evaluate.needs_images:
        raise ValueError(
            f"evaluate.reference is {recipe.evaluate.reference} and evaluate.classifier is "
            f"{'set' if recipe.evaluate.classifier else 'not set'} but {where}: name an .npz of reference images, and "
            "no classifier"
        )


def _tokenizer_alignment(recipe: Recipe) -> None:
    weight = max(each.align_weight for _, each in recipe.train_vavae.objectives)
    _aligned_with_something(recipe, "train_vavae.objective.align_weight", weight)


def _aligned_with_something(recipe: Recipe, field: str, weight: float) -> None:
    if weight > 0 and recipe.foundation is None:
        raise ValueError(f"{field} is {weight} but foundation is not set: name the network to align with")


def _alignment(recipe: Recipe) -> None:
    weight = recipe.train_dit.objective.align_weight
    _aligned_with_something(recipe, "train_dit.objective.align_weight", weight)
    stored = weight > 0 and not recipe.train_dit.online
    if stored and recipe.train_dit.images and not recipe.encode.align_features:
        raise ValueError(
            "train_dit.objective.align_weight is above 0 but encode.align_features is false: set it to true so that "
            "the alignment targets are stored, or train_dit.objective.align: online to make them in training"
        )
    if recipe.train_dit.align_depth is not None and recipe.foundation is None:
        raise ValueError("train_dit.model.align_depth is set but foundation is not: name the network to align with")


def _batches(recipe: Recipe) -> None:
    compute = recipe.compute.train
    for field in ("train_vavae", "train_semvae", "train_dit", "tune_fewstep"):
        section = getattr(recipe, field)
        if section is None or section.images == 0:
            continue
        step = compute.workers * (compute.micro_batch or 1)
        if section.batch % step:
            raise ValueError(
                f"{field}.batch {section.batch} does not divide over compute.train.workers {compute.workers}"
                + (f" × micro_batch {compute.micro_batch}" if compute.micro_batch else "")
                + f": use a multiple of {step}"
            )


RULES: dict[Callable[[Recipe], None], tuple[str, ...]] = {
    _sizes: (),
    _patches: ("train_dit",),
    _pixels: ("train_dit",),
    _cascade: ("train_dit",),
    _stored: (),
    _nothing_to_train_on: (),
    _moments: ("train_dit",),
    _online_latents: (),
    _semantics: (),
    _semantic_channels: ("train_dit",),
    _statistics: ("train_dit",),
    _ready_latents: (),
    _tokenizer_alignment: (),
    _alignment: ("train_dit",),
    _batches: (),
}
"""Each rule with the sections that it cannot do without."""
