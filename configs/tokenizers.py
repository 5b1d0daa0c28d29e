"""Sections of the two tokenizers: how the autoencoder is trained (`configs/autoencoders.py` says which), and the
Semantic VAE."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.autoencoders import AutoencoderModel, Tokenizer
from configs.section import Added, Positive, Precision, Section, Seed, Weight
from configs.training import Training


class Discriminator(Section):
    """PatchGAN that the tokenizer is trained against (papers.md 1.2); the defaults are the published one."""

    width: Positive = 64
    layers: Positive = 3
    """Halvings of the side."""
    norm: Literal["batch", "group"] = "batch"
    """`batch` is published, and makes what it learns depend on how a global batch is cut; `group` does not."""


class VavaeObjective(Section):
    """Terms of the tokenizer's loss and their weights (papers.md 1.2); 0 switches a term off."""

    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual_weight: Weight = 0.0
    """Of LPIPS, which counts once for every pixel and channel as published; 1 is the published weight."""
    perceptual_layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Added(before=())] = ()
    """Layers of the recipe's foundation model, a timm network, that take LPIPS's place in the perceptual term: squared
    distances of unit features there, without LPIPS's calibration. None has LPIPS."""
    lpips_weights: str = "hub"
    """VGG16 of LPIPS: `hub` (torchvision's), `random` (for tests), or a path or URL of torchvision's file."""
    kl_weight: Weight = 1e-6
    latent_noise: Annotated[Weight, Added(before=0.0)] = 0.0
    """The decoder learns from latents with Gaussian noise, of a deviation that is drawn for each image between none and
    this share of its latent's own: what a diffusion model gets a little wrong then still looks like an image. After the
    noisy decoders of RAE (arXiv 2510.11690); that the share is uniform and relative is our choice."""
    gan_weight: Weight = 0.0
    """Of the adversarial term, times its adaptive weight; 0.5 is published, 0 trains no discriminator."""
    gan_start: Annotated[int, Field(ge=0)] = 640_000
    """Images, of the stage where there are stages, before the discriminator begins. Published as step 5,001 of a
    counter that two optimizers advance: 2,500 batches of 256."""
    discriminator: Discriminator = Discriminator()
    align_weight: Weight = 0.0
    """The published w_hyper: of both alignment terms, times their adaptive weight."""
    cos_margin: Weight = 0.5
    distance_margin: Weight = 0.25
    adaptive: bool = True
    """Scale alignment and adversarial term by ratios of gradient norms at the encoder's and the decoder's last layer
    (papers.md 1.2)."""


class VavaePhase(Section):
    """A stretch of the training with its own weights; what is left out is as in `objective`."""

    images: Positive
    perceptual_weight: Weight | None = None
    kl_weight: Weight | None = None
    gan_weight: Weight | None = None
    gan_start: Annotated[int, Field(ge=0)] | None = None
    align_weight: Weight | None = None
    cos_margin: Weight | None = None
    distance_margin: Weight | None = None


class TrainVavae(Training):
    betas: tuple[float, float] = (0.5, 0.9)
    model: Tokenizer = AutoencoderModel()
    objective: VavaeObjective = VavaeObjective()
    stages: tuple[VavaePhase, ...] = ()
    """One after the other in one run, with one optimizer; their images add up to `images`. None is one stage."""
    pretrained_objective: str | None = None
    """With `pretrained`: an earlier run's `objective.safetensors`, from which its projection and its discriminator go
    on; None begins them anew."""
    crop: Annotated[Literal["center", "random"], Added(before="center")] = "center"
    """Squares that are trained on: centre crops as everywhere, or, as published, squares anywhere in images whose
    shorter side is scaled to `image.size` (as OpenCV does it, without smoothing). One draw per image and epoch."""
    foundation_precision: Annotated[Precision, Added(before="tf32")] = "tf32"
    """Of the frozen foundation model; where `precision` is `fp32`, `tf32` is too: a process has one for both."""

    @property
    def precisions(self) -> tuple[str, ...]:
        return self.precision, self.foundation_precision

    @property
    def weightless(self) -> bool:
        return self.model.identity

    @property
    def furnished(self) -> bool:
        return not isinstance(self.model, AutoencoderModel)

    @property
    def objectives(self) -> tuple[tuple[int, VavaeObjective], ...]:
        """(images before it begins, objective with what the stage changes) of every stage, in order."""
        found, begin = [], 0
        for stage in self.stages or (VavaePhase(images=max(1, self.images)),):
            changes = stage.model_dump(exclude_none=True, exclude={"images"})
            found.append((begin, self.objective.model_copy(update=changes)))
            begin += stage.images
        return tuple(found)

    @property
    def aligned(self) -> bool:
        """Whether any stage has the alignment terms."""
        return any(objective.align_weight > 0 for _, objective in self.objectives)

    @property
    def adversarial(self) -> bool:
        """Whether any stage has the adversarial term."""
        return any(objective.gan_weight > 0 for _, objective in self.objectives)

    @property
    def perceptual(self) -> bool:
        """Whether any stage has the perceptual term."""
        return any(objective.perceptual_weight > 0 for _, objective in self.objectives)

    @model_validator(mode="after")
    def _stages_fit(self) -> TrainVavae:
        total = sum(stage.images for stage in self.stages)
        if self.stages and self.images and total != self.images:
            raise ValueError(
                f"images is {self.images} but stages have {total} images in all: make them equal, or set stages: [], "
                "one stage of all images"
            )
        for number, stage in enumerate(self.stages if self.images else ()):
            if stage.images % self.batch:
                raise ValueError(
                    f"stages.{number}.images {stage.images} is not a multiple of batch {self.batch}, so a batch would "
                    f"have two objectives: use {max(1, round(stage.images / self.batch)) * self.batch}"
                )
        if self.pretrained_objective is not None and self.pretrained is None and not self.furnished:
            raise ValueError("pretrained_objective goes with pretrained: name the same run's model.safetensors there")
        if self.pretrained is not None and self.furnished:
            raise ValueError(
                f"pretrained is set but model.kind {self.model.kind} brings weights of its own: leave pretrained out"
            )
        return self


class SemvaeModel(Section):
    """Semantic VAE (papers.md 2.2); the defaults are the published width."""

    width: Positive = 768
    depth: Positive = 4
    heads: Positive = 6
    channels: Positive = 16

    @model_validator(mode="after")
    def _heads_divide(self) -> SemvaeModel:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}: choose a divisor")
        return self


class SemvaeObjective(Section):
    mse_weight: Weight = 1.0
    cosine_weight: Weight = 1.0
    cosine_axis: Literal["feature", "token"] = "feature"
    """`feature` is the paper's, `token` what the released code does (papers.md 2.2)."""
    kl_weight: Weight = 1e-7


class TrainSemvae(Training):
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Weight = 0.01
    features: str = "images"
    """`images` streams images through the foundation model; else the folder or URL of a complete `encode` artifact
    with stored features (`encode.align_features`), which are read instead."""
    foundation_precision: Annotated[Precision, Added(before="tf32")] = "tf32"
    """Of the frozen foundation model; where `precision` is `fp32`, `tf32` is too: a process has one for both."""
    resize: Annotated[Positive | None, Added(before=None)] = None
    """Features of images as the authors made them: the shorter side scaled to this many pixels (bicubic),
    `foundation.input_size` cut from the centre, nothing mirrored. None takes what `encode` sees: centre crops of
    `image.size`, scaled to `foundation.input_size`, mirrored where the recipe's images are."""
    model: SemvaeModel = SemvaeModel()
    objective: SemvaeObjective = SemvaeObjective()

    @property
    def precisions(self) -> tuple[str, ...]:
        return self.precision, self.foundation_precision

    @model_validator(mode="after")
    def _resized_images(self) -> TrainSemvae:
        if self.resize is not None and self.features != "images":
            raise ValueError(
                f"resize is {self.resize} but features are read from {self.features}, where they are made: leave it out"
            )
        return self


class EvaluateTokenizer(Section):
    """Of the stage `evaluate_tokenizer`; the network of its Fréchet distance is `evaluate.features`."""

    images: Positive = 10_000
    """At most this many images of the test split."""
    lpips_weights: str | None = None
    """VGG16 of LPIPS, as in `train_vavae.objective.lpips_weights`; None leaves LPIPS out."""
    posterior: Annotated[Literal["mean", "sample"], Added(before="mean")] = "mean"
    """What is decoded. A sample belongs to its image's key: with the same `seed` the one that `encode` stores."""
    crop: Annotated[Literal["adm", "torchvision"], Added(before="adm")] = "adm"
    """Squares that are reconstructed: `adm` as everywhere; `torchvision`, as VA-VAE's authors score (Resize and
    CenterCrop of tensors, bilinear), whose values between levels reach tokenizer, SSIM and LPIPS as they are."""
    probe_images: Annotated[int, Field(ge=0)] = 10_000
    """At most this many training images to fit linear probes, lines and principal components to. 0 leaves out what is
    fitted or compared with features, and needs neither training images nor the foundation model."""
    interpolation_images: Annotated[int, Field(ge=0), Added(before=0)] = 0
    """At most this many training images whose latents are averaged with their nearest neighbours', decoded and compared
    with the images (after iFID, arXiv 2603.05630). 0 leaves the interpolation distance out."""
    density_points: Annotated[int, Field(ge=16)] = 1_000
    """Images of whose latents a cell each is a point of the density estimate."""
    seed: Seed = 0
    """Of posterior samples, of the cells drawn and of the embeddings."""
