"""Stage `evaluate`: how close generated images come to real ones, beside the floor.

The floor is the same scores for as many other real images: what a perfect model would reach here.
What does not depend on the generated images is made once for all samples (`tasks/scoring/real_images.py`).
"""

from __future__ import annotations

from typing import Any

from configs.published import published_metrics, scores_of_pictures
from tasks.scoring import inception
from tasks.scoring import reference as references
from tasks.scoring.distances import FrechetFrom
from tasks.scoring.features import ImageFeatures, ImageSet, PerImageFeatures
from tasks.scoring.real_images import (
    RECONSTRUCTED,
    ScoringInputs,
    classifier_of,
    features_of,
    has_both,
    score_names,
    scored,
    trusted,
    with_statistics,
)
from tasks.scoring.reference import Reference
from tasks.scoring.score import Scores
from tasks.stage import Context, Outcome, Stage


def run(context: Context) -> Outcome:
    """Score the sample, and where the recipe's images are read, the floor and the tokenizer.

    Raises:
        UserError: a set is too small to score.
    """
    section = context.recipe.evaluate
    reference = references.resolve(context.recipe)
    given = ScoringInputs.of(context)
    found = classifier_of(given)
    judge = trusted(found, context.recipe)
    sample = ImageSet(context.input("sample"), "part-", section.images)
    sets = features_of(given, reference, judge, {"made": sample})[0]
    made, real = sets["made"], with_statistics(sets["reference"], reference)
    scores = scored(real, made, context.recipe)
    values, floor = dict(scores.values), None
    if "floor" in sets:
        floor = sets["floor"].first(min(made.images, sets["floor"].images))
        base = scored(real, floor, context.recipe, intervals=False)
        values |= {f"floor_{name}": value for name, value in base.values.items()}
    if RECONSTRUCTED in sets:
        values |= _reconstruction(context, sets, reference)
    if found is not None:
        values |= found.manifest.scores  # also of one that is too weak to score by: its accuracy says so
    context.tracker.metrics(published_metrics(scores_of_pictures(context.recipe)))
    return Outcome(files=[], rows=made.images, facts=_facts(context, made, real, floor, scores), scores=values)


STAGE = Stage(
    name="evaluate",
    version=2,
    sections=("image", "evaluate"),
    inputs=("shard", "train_vavae", "sample"),
    run=run,
    external=references.external,
)


def _reconstruction(context: Context, sets: dict[str, ImageFeatures], reference: Reference) -> dict[str, float]:
    """The tokenizer's scores on the test split, which is the reference or else the floor."""
    again = sets[RECONSTRUCTED]
    test = sets["reference" if reference.split == "test" else "floor"].first(again.images)
    distances = {
        names("frechet"): FrechetFrom(test.gaussians[vectors]).of_rows(getattr(again.findings, vectors))
        for vectors, names in score_names(context.recipe.evaluate).items()
        if has_both(vectors, test, again)
    }
    assert again.findings.psnr is not None, "reconstructions have a PSNR"
    return {
        "reconstruction_psnr": float(again.findings.psnr.mean()),
        **{f"reconstruction_{name}": distance for name, distance in distances.items()},
    }


def _facts(
    context: Context, made: ImageFeatures, real: ImageFeatures, floor: ImageFeatures | None, scores: Scores
) -> dict[str, Any]:
    section = context.recipe.evaluate
    published = None if section.inception is None else inception.Identity.at(section.inception.weights)
    return {
        "network": section.features.label,
        "inception": None if published is None else {"sha256": published.sha256, "genuine": published.genuine},
        "reference": section.reference,
        "images": {"generated": made.images, "test": real.images, "floor": floor.images if floor else 0},
        "intervals": {name: list(bounds) for name, bounds in scores.intervals.items()},
        "spread": scores.spread,
        "consistency_by_label": _by_label(made.findings, context.recipe.data.classes),
    }


def _by_label(found: PerImageFeatures, classes: int) -> list[float | None]:
    """Share of images of each label that the judge gives this label; None where there are none."""
    if found.predictions is None:
        return []
    right = found.predictions == found.labels
    return [
        float(right[found.labels == label].mean()) if (found.labels == label).any() else None
        for label in range(classes)
    ]
