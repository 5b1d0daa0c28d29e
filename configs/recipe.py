"""A recipe: all sections together. The rules that hold between them are in `rules.py` and `fits.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationInfo, model_validator

from configs.compute import Compute, Tracking
from configs.data import Data, Encode, Foundation, Image, ReadyLatents, Shard
from configs.diffusion import TrainDit
from configs.errors import UserError
from configs.fewstep import TuneFewstep
from configs.fits import RULES as FITS
from configs.published import Published
from configs.rules import RULES, check
from configs.sampling import Sample, SampleResolution
from configs.sampling_rules import RULES as SAMPLING
from configs.scores import Evaluate, Report
from configs.section import NOTHING, LeftOut, Section, fingerprinted
from configs.tokenizers import EvaluateTokenizer, TrainSemvae, TrainVavae

LEFT_OUT = ("train_dit", "sample", "evaluate")
"""Sections that a recipe may do without where its flow does."""
WAS_RUN = "was_run"
"""Key of a validation's context under which the rules between sections are left out."""


class Recipe(Section):
    """One complete experiment. Sizes that follow from other sections are properties, never fields.

    Sections that a flow does not read may be left out: a tokenizer's recipe needs no `train_dit` and no `sample`.
    """

    name: str
    data: Data
    image: Image
    foundation: Foundation | None = None
    shard: Shard = Shard()
    train_vavae: TrainVavae
    train_semvae: TrainSemvae | None = None
    encode: Encode = Encode()
    train_dit: LeftOut[TrainDit] = NOTHING
    tune_fewstep: TuneFewstep | None = None
    sample: LeftOut[Sample] = NOTHING
    evaluate: LeftOut[Evaluate] = NOTHING
    evaluate_tokenizer: EvaluateTokenizer = EvaluateTokenizer()
    report: Report = Report()
    published: Published | None = None
    compute: Compute = Compute()
    tracking: Tracking = Tracking()

    @property
    def latent_size(self) -> int:
        """Side of the latent grid in cells."""
        return self.image.size // self.train_vavae.model.downscale

    @property
    def channel_groups(self) -> dict[str, int]:
        """Channels of each group of the diffused latent, in order: texture first, semantics last."""
        groups = {"texture": self.train_vavae.model.z_channels}
        if self.train_semvae is not None:
            groups["semantic"] = self.train_semvae.model.channels
        return groups

    @property
    def latent_channels(self) -> int:
        return sum(self.channel_groups.values())

    def time_shift(self, base: int | None, given: float) -> float:
        """The shift s of times (papers.md 1.7): as given, or by the latents' dimension over a base (papers.md 6.2)."""
        return given if base is None else math.sqrt(base / (self.latent_channels * self.latent_size**2))

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides in cells of the resolutions that the diffusion model knows, coarsest first."""
        cascade = self.train_dit.cascade
        return cascade.sides if cascade is not None else (self.latent_size,)

    @property
    def sampled_resolutions(self) -> tuple[SampleResolution, ...]:
        """The resolutions that `sample` goes through; one, the latents' own, where there is no cascade."""
        return self.sample.stages or tuple(SampleResolution(side=side) for side in self.sides)

    @property
    def needs_latents(self) -> bool:
        """Whether images have to become latents: not where nothing is trained on any, and the
        statistics of the weights are given."""
        if self.lacks("train_dit"):
            return True
        trained = self.train_vavae.images > 0 or self.train_dit.images > 0
        return trained or self.train_dit.statistics is None

    @property
    def ready_latents(self) -> bool:
        """Whether the source holds latents and no images."""
        return isinstance(self.data.source, ReadyLatents)

    @property
    def online_latents(self) -> bool:
        """Whether latents are made in training."""
        return self.encode.latents == "online"

    @property
    def needs_images(self) -> bool:
        """Whether labelled images have to be read at all."""
        if self.ready_latents:
            return False
        return self.needs_latents or self.lacks("evaluate") or self.evaluate.needs_images

    def section(self, name: str) -> Any:
        """The plain values of one section, as they enter fingerprints; None where the recipe has none."""
        self.require([name], f"stage {name}")
        section = getattr(self, name)
        return None if section is None else fingerprinted(section)

    def lacks(self, section: str) -> bool:
        """Whether a section is left out that stages cannot do without."""
        return section in LEFT_OUT and getattr(self, section) is None

    def require(self, sections: Iterable[str], reader: str) -> None:
        """Raises UserError where one of these sections is left out. reader: what reads them, for the message."""
        for section in filter(self.lacks, sections):
            raise UserError(
                f"recipe {self.name} has no section {section}, which {reader} reads: add it, or take a flow that does "
                "without (tokenizer-eval needs neither train_dit nor sample)"
            )

    @model_validator(mode="after")
    def _sections_agree(self, info: ValidationInfo) -> Recipe:
        if not (info.context or {}).get(WAS_RUN):
            check(self, {**RULES, **SAMPLING, **FITS})
        return self
