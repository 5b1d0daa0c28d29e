"""What all trained stages share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.section import NOTHING, Added, LeftOut, Positive, Section, Seed, Share, SigmaRel, Weight


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
    batch: LeftOut[Positive] = NOTHING
    """Global batch, over all workers and accumulation steps. With `images: 0` this and the rate may be left out."""
    learning_rate: LeftOut[Annotated[float, Field(gt=0)]] = NOTHING
    optimizer: Annotated[Literal["adamw", "muon"], Added(before="adamw")] = "adamw"
    """`muon` takes the matrices of a transformer's blocks at the rate of AdamW, which takes the rest
    (`tasks/training/muon.py`). It needs whole gradients: no ZeRO stage."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Weight = 0.0
    warmup_images: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up. `cosine` decays to `final_lr_share` over the last `decay_share` of the images."""
    decay_share: Share = 1.0
    final_lr_share: Share = 0.0
    clip_norm: Weight | None = None
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Of the network's arithmetic; weights, averages and moments are float32. `tf32` rounds what tensor cores multiply
    (on a CPU it is `fp32`), `fp16` scales losses dynamically."""
    ema_decay: Share | None = None
    """Of the average that is used where averaged weights are asked for; None keeps none."""
    ema_rampup: Annotated[Share | None, Added(before=None)] = None
    """Half-life of averages with a decay, at most this share of the images seen so far: the early weights are soon
    forgotten (EDM, Karras et al. 2022: 0.05). None has the whole half-life from the start."""
    keep_averages_at: Annotated[tuple[Positive, ...], Added(before=())] = ()
    """Images at which the average of `ema_decay` is stored by itself, as `averages/{images, 14 digits}.safetensors` in
    the artifact: weak guides, or points of a curve."""
    start_from_average_at: Annotated[tuple[Positive, ...], Added(before=())] = ()
    """Images at which the weights become the average of `ema_decay`, and training goes on from there (Switch EMA,
    arXiv 2402.09240, after each epoch). At which images, and that moments and rate stay, is our choice. A shorter
    training does not come to all of them."""
    ema_decays: tuple[Share, ...] = ()
    """Decays of further averages, each a file of the artifact."""
    ema_sigmas: tuple[SigmaRel, ...] = ()
    """Further averages with a power profile of these widths."""
    snapshot_every: Positive | None = None
    """Images between stored snapshots of the `ema_sigmas`, from which any other width is had after training."""
    validation: Validation | None = None
    guard: Guard = Guard()
    seed: Seed = 0
    pretrained: str | None = None
    """Path, fsspec URL or hub name of weights: with `images: 0` used as they are, else trained further."""

    @property
    def weightless(self) -> bool:
        """Whether there is nothing to train or to load."""
        return False

    @property
    def furnished(self) -> bool:
        """Whether the network comes with weights, so that `pretrained` names none."""
        return False

    @property
    def precisions(self) -> tuple[str, ...]:
        """Of the networks that a training runs: its own, and a frozen one that it learns from."""
        return (self.precision,)

    @model_validator(mode="after")
    def _something_to_do(self) -> Training:
        if self.images == 0 and self.pretrained is None and not (self.weightless or self.furnished):
            raise ValueError("images is 0 and pretrained is not set: train some images or name weights to use")
        missing = [name for name in ("batch", "learning_rate") if getattr(self, name) is None]
        if self.images and missing:
            raise ValueError(
                f"images is {self.images} but {' and '.join(missing)} {'are' if missing[1:] else 'is'} not set: "
                "training needs both; only a network that is used as it is (images: 0) does without"
            )
        for name in ("keep_averages_at", "start_from_average_at"):
            points = getattr(self, name)
            if points and self.ema_decay is None:
                raise ValueError(f"{name} names images but ema_decay is not set, so there is no average: set it")
            if odd := [point for point in points if self.images and point % self.batch]:
                raise ValueError(f"{name} names {odd[0]}: expected multiples of batch {self.batch}")
        if self.images and (late := [point for point in self.keep_averages_at if point > self.images]):
            raise ValueError(f"keep_averages_at names {late[0]}, but images is {self.images}: name none beyond")
        if self.snapshot_every is not None and len(self.ema_sigmas) < 2:
            raise ValueError(
                f"snapshot_every is set but ema_sigmas has {len(self.ema_sigmas)} entries: name two widths, e.g. "
                "[0.05, 0.1]"
            )
        return self
