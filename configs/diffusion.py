"""Sections of the diffusion model: networks, clocks, objective, and the resolutions of a cascade."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from configs.section import Added, Positive, Precision, Section, Share, Weight
from configs.training import Training


class WideHead(Section):
    """A few wide blocks that see the noisy latent anew, told by the transformer what every token is: for latents of
    many channels (DiT-DH, arXiv 2510.11690); the defaults are the published ones."""

    hidden_size: Positive = 2_048
    depth: Positive = 2
    heads: Positive = 16

    @model_validator(mode="after")
    def _heads_divide(self) -> WideHead:
        if self.hidden_size % (4 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4 × heads {self.heads}: choose one")
        return self


class DitModel(Section):
    """LightningDiT (papers.md 1.4): a published size by name, or its three dimensions."""

    kind: Annotated[Literal["lightningdit"], Added(before="lightningdit")] = "lightningdit"
    size: Literal["S", "B", "L", "XL", "1p0B", "1p6B"] | None = None
    hidden_size: Positive | None = None
    depth: Positive | None = None
    heads: Positive | None = None
    patch_size: Positive = 1
    positions_of: Annotated[Positive | None, Added(before=None)] = None
    """Side in tokens of the grid whose steps count positions: that of the network whose weights this one goes on from,
    where its latents were smaller. Its tables are resized so (docs/training.md); None counts this grid's own tokens."""
    qk_norm: bool = False
    swiglu: bool = True
    rope: bool = True
    rmsnorm: bool = True
    shift: bool = True
    learn_sigma: bool = False
    value_residual: Annotated[bool, Added(before=False)] = False
    """Blocks look at the mean of their own values and the first block's (arXiv 2410.17897); no weight is added, but
    weights that were trained without are another network."""
    head: Annotated[WideHead | None, Added(before=None)] = None
    """None is LightningDiT's own single layer."""
    align_depth: Positive | None = None
    """Block (1-indexed) after which the alignment head reads image tokens; None has no head."""
    align_hidden: Positive = 2_048

    @property
    def dimensions(self) -> dict[str, int]:
        """The explicit dimensions, by the network's argument names; empty where `size` names them."""
        given = {"hidden_size": self.hidden_size, "depth": self.depth, "num_heads": self.heads}
        return {name: value for name, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _one_size(self) -> DitModel:
        if self.head is not None and self.value_residual:
            raise ValueError("head has no place for value_residual: leave one of them out")
        if self.head is not None and (self.align_depth is not None or self.learn_sigma):
            raise ValueError(
                f"head has no place for align_depth {self.align_depth} or learn_sigma {str(self.learn_sigma).lower()}: "
                "leave both out"
            )
        explicit = len(self.dimensions)
        if explicit != (0 if self.size else 3):
            raise ValueError("give either size, or all of hidden_size, depth and heads")
        if self.hidden_size and self.heads and self.hidden_size % (4 * self.heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} with {self.heads} heads: the head width must be a multiple of 4"
            )
        return self


class UnetModel(Section):
    """A UNet in pixel space with EDM's preconditioning (papers.md 3.3, Karras et al. 2022); one clock, no alignment."""

    kind: Literal["unet"]
    channels: Positive = 128
    multipliers: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2, 2, 2)
    """Width of each level over `channels`, full resolution first; each level halves the side."""
    blocks: Positive = 4
    """Residual blocks of each level."""
    attention: tuple[Positive, ...] = (16,)
    """Sides in pixels at which blocks attend."""
    dropout: Share = 0.0
    norm_channels: Annotated[Positive, Added(before=1)] = 4
    """At least so many channels share a norm, as in EDM's networks, and at most 32 norms a width. A block is told of
    noise and class by a shift of each channel; a norm of a single channel would take it away again."""
    augment: Annotated[Share, Added(before=0.0)] = 0.0
    """Probability of each of EDM's augmentations in training (flips, scale, rotation, squeeze, shift). The network is
    told which, and samples without any (`models/augmentation.py`); with 0 it has no input for them."""
    sigma_data: Annotated[float, Field(gt=0)] = 0.5
    """Standard deviation of pixels in [-1, 1]."""
    sigma_mean: float = -1.2
    """Mean and spread of the logarithm of training's noise levels."""
    sigma_spread: Annotated[float, Field(gt=0)] = 1.2
    sigma_min: Annotated[float, Field(gt=0)] = 0.002
    """Noise levels of sampling: from the highest to the lowest, spaced by the power `rho`, and then none."""
    sigma_max: Annotated[float, Field(gt=0)] = 80.0
    rho: Annotated[float, Field(gt=0)] = 7.0


def _model_kind(value: Any) -> str:
    kind = value.get("kind", "lightningdit") if isinstance(value, dict) else getattr(value, "kind", "lightningdit")
    return str(kind)


DiffusionModel = Annotated[
    Annotated[DitModel, Tag("lightningdit")] | Annotated[UnetModel, Tag("unet")], Discriminator(_model_kind)
]


class SynchronousClock(Section):
    kind: Literal["synchronous"] = "synchronous"


class SemanticFirstClock(Section):
    """Semantics run ahead of texture by `delta` (papers.md 2.5)."""

    kind: Literal["semantic_first"] = "semantic_first"
    delta: Share = 0.3


Clock = Annotated[SynchronousClock | SemanticFirstClock, Field(discriminator="kind")]


class DitObjective(Section):
    """Velocity matching (papers.md 1.5, 2.5)."""

    times: Literal["logit_normal", "uniform"] = "logit_normal"
    uniform_after: Positive | None = None
    """Images after which times are uniform (the long published runs), the batch that comes to them included, as in all
    schedules of the objective; None never."""
    semantic_weight: Weight = 1.0
    direction_weight: Weight = 1.0
    direction_floor: Annotated[float, Field(gt=0)] = 1.0
    """Shorter velocities count as this long in the direction loss; the published 1e-8 lets the first step explode."""
    align_weight: Weight = 0.0
    align_mode: Literal["cos", "mse", "cos_mse"] = "cos"
    align_until: Annotated[Positive | None, Added(before=None)] = None
    """Images after which nothing is aligned any more, the batch that comes to them included (HASTE, arXiv 2505.16792:
    early alignment helps, late alignment holds back); with online targets the foundation model is not run any more
    either. None aligns to the end."""
    contrastive_weight: Annotated[Weight, Added(before=0.0)] = 0.0
    """Of contrastive flow matching (arXiv 2506.05350, which uses 0.05): velocities are driven away from those of
    another image, the neighbour in the batch. Needs even batches on every worker and accumulation step."""
    align: Annotated[Literal["stored", "online"], Added(before="stored")] = "stored"
    """Where alignment targets come from: stored beside the latents (`encode.align_features`; 384 KiB an image and view
    of DINOv2-B), or made in training of the images themselves, which are decoded beside their latents."""
    shift_base: Annotated[Positive | None, Added(before=None)] = None
    """Times are shifted to noise by the root of the latents' dimension over this one (RAE: 4096): the more numbers an
    image has, the more noise it takes to hide it. None shifts none."""
    label_dropout: Share = 0.1


class Cascade(Section):
    """Several resolutions of the diffused latent, one network for all (LowDiff, papers.md 3)."""

    sides: tuple[Positive, ...]
    """Sides in cells, coarsest first; the last is the latents' own, the others average it."""
    probabilities: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] | None = None
    """Of a batch's resolution; None draws all alike."""
    weights: tuple[Weight, ...] | None = None
    """Of each resolution's loss; None weighs all alike."""
    upsample: Literal["bilinear", "nearest"] = "bilinear"
    """How a lower result becomes the condition of the next resolution."""
    augment: Share = 0.5
    """In training, up to this share of a condition is noise, drawn uniformly for each image and told the network."""
    condition_dropout: Share = 0.1
    """Share of images that a finer resolution is trained on without its condition; what lets it begin by itself."""

    @model_validator(mode="after")
    def _one_for_each_side(self) -> Cascade:
        if not self.sides or list(self.sides) != sorted(set(self.sides)):
            raise ValueError(f"sides {list(self.sides)} must rise: name each resolution once, coarsest first")
        for name in ("probabilities", "weights"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.sides):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.sides)} sides: give one for each")
        if self.probabilities is not None and abs(sum(self.probabilities) - 1.0) > 1e-6:
            raise ValueError(f"probabilities add up to {sum(self.probabilities):g}: make it 1")
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """Probability of each side."""
        return self.probabilities or (1.0 / len(self.sides),) * len(self.sides)


class Routing(Section):
    """Token routing in training (TREAD, arXiv 2501.04765): some tokens go around the middle blocks."""

    first: Positive = 3
    """Blocks, 1 the network's first and both included, through which only the kept tokens go."""
    last: Positive
    drop: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of an image's tokens that go around; drawn for each image anew."""
    dense_share: Share = 0.05
    """Share of the images, the last ones, on which all tokens go through all blocks (SPRINT, arXiv 2510.21986); from
    the batch on that comes to them, which is dense as a whole."""

    def dense_from(self, images: int) -> int:
        """Images seen from which nothing is routed, of so many in all."""
        return images - round(images * self.dense_share)

    @model_validator(mode="after")
    def _in_order(self) -> Routing:
        if self.first > self.last:
            raise ValueError(f"first {self.first} comes after last {self.last}: name blocks in their order")
        return self


class StatisticsFiles(Section):
    """Mean and deviation of latents by channel, as both authors keep them beside their weights: files
    with `mean` and `std` of shape (1, C, 1, 1), by path, fsspec URL or hub name."""

    texture: str
    """Of the tokenizer's channels, their `latents_stats.pt`."""
    semantic: str | None = None
    """Of the Semantic VAE's channels, their `latents_sv_stats.pt`."""


class TrainDit(Training):
    model: DiffusionModel
    clock: Clock = SynchronousClock()
    objective: DitObjective = DitObjective()
    routing: Annotated[Routing | None, Added(before=None)] = None
    """None has all tokens go through all blocks."""
    cascade: Annotated[Cascade | None, Added(before=None)] = None
    """None diffuses at the latents' own resolution only."""
    ema_decay: Share | None = 0.9999
    statistics: Annotated[StatisticsFiles | Literal["weights"] | None, Added(before=None)] = None
    """What latents are standardised by: files, or `weights` for those that travel in `pretrained` (our
    safetensors). None takes what travels there, if anything does, and else the latents' own."""
    foundation_precision: Annotated[Precision, Added(before="bf16")] = "bf16"
    """Of the frozen foundation model where `objective.align` is `online`; nothing where targets are stored."""

    @property
    def precisions(self) -> tuple[str, ...]:
        return self.precision, self.foundation_precision

    @property
    def online(self) -> bool:
        """Whether alignment targets are made in training."""
        return self.objective.align_weight > 0 and self.objective.align == "online"

    @property
    def align_depth(self) -> int | None:
        """Of the transformer; None where there is no alignment head."""
        return self.model.align_depth if isinstance(self.model, DitModel) else None

    @model_validator(mode="after")
    def _alignment_has_a_head(self) -> TrainDit:
        if self.objective.align_weight > 0 and self.align_depth is None:
            raise ValueError("objective.align_weight is above 0 but model.align_depth is not set: choose a block")
        if self.statistics == "weights" and self.pretrained is None:
            raise ValueError("statistics is weights but pretrained is not set: name the weights, or files")
        return self
