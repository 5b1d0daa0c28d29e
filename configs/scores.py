"""Sections of evaluation and of the report."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from configs.data import Foundation
from configs.section import Added, Positive, Precision, Section, Seed, Share

SPLITS = ("test", "train")
"""Images of the recipe's source, as `evaluate.reference` may name them."""


class Classifier(Section):
    """The judge of class consistency, trained on the train split."""

    epochs: Positive = 3
    batch: Positive = 128
    width: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 4e-3
    min_accuracy: Share = 0.9
    """The stage fails when the judge itself is worse than this on the test split."""
    seed: Seed = 0


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
    seed: Seed = 0
    """Of subsets and resampling."""
    precision: Annotated[Precision, Added(before="fp32")] = "fp32"
    """Of all networks that look at images; scores that are compared with published ones are made in `fp32`."""
    classifier: Classifier | None = None
    classifier_frechet: Annotated[bool, Added(before=False)] = False
    """A second Fréchet distance, on what the classifier sees: no stage trains on its features, so a perceptual term on
    those of `features` cannot please it."""

    @property
    def needs_images(self) -> bool:
        """Whether it compares with images of the recipe's source, or trains a judge on them."""
        return self.reference in SPLITS or self.classifier is not None

    @model_validator(mode="after")
    def _enough_replicates(self) -> Evaluate:
        if self.bootstrap == 1:
            raise ValueError("bootstrap is 1, which has no spread: use 0 for no intervals, or 40 and more")
        if self.classifier_frechet and self.classifier is None:
            raise ValueError("classifier_frechet is true but classifier is not set: describe one, or leave it out")
        return self


class Report(Section):
    title: str = "latentforge"
    columns: Positive = 10
    rows: Positive = 6
