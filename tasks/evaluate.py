"""Stage `evaluate`: how close generated images come to real ones, beside the floor.

The floor is the same scores for as many other real images: what a perfect model would reach here.
What does not depend on the generated images is an artifact of its own, made once for all samples to come: the
`judge`, what is found out about real images (`reference`, `floor`) and about the tokenizer's reconstructions
(`reconstruction`).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from configs import UserError
from configs.scores import Evaluate
from configs.section import fingerprinted
from infra.artifacts import Artifact, fingerprint
from tasks.scoring import classifier, inception
from tasks.scoring import reference as references
from tasks.scoring.adm_file import write_statistics
from tasks.scoring.distances import FrechetFrom, score_name
from tasks.scoring.features import VECTORS, FeatureNetworks, ImageFeatures, ImageSet, PerImageFeatures, extract_features
from tasks.scoring.gaussian import Gaussian
from tasks.scoring.reference import Reference
from tasks.scoring.score import Scores, compare
from tasks.stage import Context, Job, Outcome, Stage, perform

_FOUND, _GAUSSIANS, _STATISTICS = "found.npz", "gaussians.npz", "statistics.npz"


def run(context: Context) -> Outcome:
    """Score the sample, the floor and the tokenizer.

    Raises:
        UserError: the judge is worse than the recipe allows, or a set is too small to score.
    """
    section = context.recipe.evaluate
    reference = references.resolve(context.recipe)
    judge = _judge(context)
    try:
        sample = ImageSet(context.input("sample"), "part-", section.images)
        sets = _examined(context, reference, judge, {"made": sample})[0]
        made, real = sets["made"], with_statistics(sets["reference"], reference)
        floor = sets["floor"].first(min(made.images, sets["floor"].images))
        names, classes = score_names(section), context.recipe.data.classes
        scores = compare(real, made, section, names, classes)
        base = compare(real, floor, section, names, classes, intervals=False)
        values = {**scores.values, **{f"floor_{name}": value for name, value in base.values.items()}}
        if "again" in sets:
            values |= _reconstruction(context, sets, reference)
    except ValueError as error:
        raise UserError(f"the sets cannot be scored: {error}; see sample.images and evaluate.images") from None
    if judge is not None:
        values |= judge.manifest.scores
    return Outcome(files=[], rows=made.images, facts=_facts(context, made, real, floor, scores), scores=values)


STAGE = Stage(
    name="evaluate",
    version=2,
    sections=("image", "evaluate"),
    inputs=("shard", "train_vavae", "sample"),
    run=run,
    external=references.external,
)


# ------------------------------------------------------------------------------------------------ side artifacts


@dataclass(frozen=True)
class RealImages:
    """What samples of one recipe are scored by, whichever model makes them."""

    reference: Artifact
    judge: Artifact | None
    floor: dict[str, float]
    """Scores of real images, as many as the recipe samples."""


def real_images(context: Context) -> RealImages:
    """What :func:`run` finds out about real images, on its own; it needs the input `shard` alone.

    Raises as :func:`run` does.
    """
    section = context.recipe.evaluate
    reference, judge = references.resolve(context.recipe), _judge(context)
    sets, made = _examined(context, reference, judge, {})
    floor = sets["floor"].first(min(context.recipe.sample.images, sets["floor"].images))
    real, classes = with_statistics(sets["reference"], reference), context.recipe.data.classes
    try:
        base = compare(real, floor, section, score_names(section), classes, intervals=False)
    except ValueError as error:
        raise UserError(f"the sets cannot be scored: {error}; see sample.images and evaluate.images") from None
    return RealImages(reference.artifact or made["reference"], judge, base.values)


def _judge(context: Context) -> Artifact | None:
    """The judge, trained unless there is one; refused when it is worse than the recipe allows."""
    section = context.recipe.evaluate.classifier
    if section is None:
        return None
    learning = {name: value for name, value in fingerprinted(section).items() if name != "min_accuracy"}
    sections = {"image": context.recipe.section("image"), "classifier": learning}
    job = _aside(context, "judge", 1, sections, {"shard": context.input("shard")})
    artifact = perform(Stage("judge", 1, (), (), classifier.run), job)
    accuracy = artifact.manifest.scores["judge_accuracy"]
    if accuracy < section.min_accuracy:
        raise UserError(
            f"the judge labels only {accuracy:.3f} of the test split right, expected at least {section.min_accuracy} "
            "(evaluate.classifier.min_accuracy), so class consistency would mean little: raise "
            "evaluate.classifier.epochs or width, or set evaluate.classifier to null"
        )
    return artifact


def _examined(
    context: Context, reference: Reference, judge: Artifact | None, wanted: dict[str, ImageSet]
) -> tuple[dict[str, ImageFeatures], dict[str, Artifact]]:
    """The sets `wanted`, `reference`, `floor` and `again`; what is on record already is not looked at again.

    With them the artifacts of those that are on record now.
    """
    section, shards = context.recipe.evaluate, context.input("shard")
    tokenizer = context.input("train_vavae") if "train_vavae" in context.job.inputs else None
    looked, limit = references.looked_at(context.recipe), section.images
    wanted, jobs = dict(wanted), dict[str, Job]()

    def look_at(name: str, artifact: str, images: ImageSet, sections: dict[str, Any], **inputs: Artifact) -> None:
        jobs[name] = _aside(context, artifact, 2, {**looked, **sections}, inputs)
        if not Context(jobs[name]).artifact.is_complete():
            wanted[name] = images

    if reference.artifact is None:
        source, prefix, most = _source(context, reference)
        counts = {"reference": reference.split or reference.identity, "images": limit, "statistics_images": most}
        inputs = {"shard": shards} if source is shards else {}
        look_at("reference", "reference", ImageSet(source, prefix, most, keep=limit), counts, **inputs)
    split = reference.floor_split
    judged = {} if judge is None else {"judge": judge}
    floor = ImageSet(shards, f"{split}/", limit)
    look_at("floor", "floor", floor, {"split": split, "images": limit}, shard=shards, **judged)
    if tokenizer is not None:
        again = ImageSet(shards, "test/", limit, reconstruct=True)
        look_at("again", "reconstruction", again, {"images": limit}, shard=shards, train_vavae=tokenizer)

    published = None if section.inception is None else section.inception.weights
    networks = FeatureNetworks(context.recipe.image.size, section.features, judge, tokenizer, published)
    found = extract_features("evaluate", wanted, networks, context.recipe.compute.actors)
    kept: dict[str, Artifact] = {}
    for name, job in jobs.items():
        keep = partial(_kept, found.get(name), judged=name == "floor", network=looked["inception"])
        kept[name] = perform(Stage(job.stage, 2, (), (), keep), job)
        found[name] = on_record(kept[name])
    if reference.artifact is not None:
        found["reference"] = on_record(reference.artifact)
    return found, kept


def _source(context: Context, reference: Reference) -> tuple[Artifact, str, int]:
    """Where a reference's images are: artifact, prefix of its files, and how many at most count."""
    section = context.recipe.evaluate
    most = section.reference_images or section.images
    if reference.split is not None:
        return context.input("shard"), f"{reference.split}/", most
    job = _aside(context, "reference_images", 1, {"file": reference.identity}, {})
    unpacked = perform(Stage("reference_images", 1, (), (), references.unpack), job)
    return unpacked, "part-", most if section.reference_images else unpacked.manifest.rows


def _aside(context: Context, name: str, version: int, sections: dict[str, Any], inputs: dict[str, Artifact]) -> Job:
    """The job of an artifact that this stage needs and others of its kind can share."""
    prints = {stage: artifact.fingerprint for stage, artifact in inputs.items()}
    found = fingerprint(name, version, sections, prints)
    return Job(name, found, context.job.root, context.job.recipe, prints, sections)


def _kept(found: ImageFeatures | None, aside: Context, judged: bool, network: str | None) -> Outcome:
    """Write what was found out about a set, and its Inception statistics in the layout of ADM's evaluator."""
    assert found is not None, "only a set that was looked at is written"
    findings = found.findings if judged else replace(found.findings, predictions=None)
    columns = {name: values for name, values in vars(findings).items() if values is not None}
    gaussians: dict[str, Any] = {"images": found.images}
    for name, gaussian in found.gaussians.items():
        gaussians |= {f"{name}_mean": gaussian.mean, f"{name}_covariance": gaussian.covariance}
    files = {_FOUND: _packed(columns), _GAUSSIANS: _packed(gaussians)}
    if network is not None:
        published = {name: found.gaussians[name] for name in ("pool", "spatial")}
        files[_STATISTICS] = write_statistics(published, network)
    return Outcome([aside.out.write_bytes(name, data) for name, data in files.items()], rows=found.images)


def on_record(artifact: Artifact) -> ImageFeatures:
    """What a `reference`, `floor` or `reconstruction` artifact says of its images."""
    with np.load(io.BytesIO(artifact.read(_FOUND)), allow_pickle=False) as columns:
        findings = PerImageFeatures(**{name: columns[name] for name in columns.files})
    with np.load(io.BytesIO(artifact.read(_GAUSSIANS)), allow_pickle=False) as found:
        gaussians = {
            name: Gaussian(found[f"{name}_mean"], found[f"{name}_covariance"])
            for name in VECTORS
            if f"{name}_mean" in found.files
        }
        return ImageFeatures(findings, gaussians, int(found["images"]))


def _packed(arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------------- scores


def with_statistics(real: ImageFeatures, reference: Reference) -> ImageFeatures:
    """The reference with the means and covariances that its file brings, where it brings some."""
    if reference.statistics is None or "pool" not in real.gaussians:
        return real
    own = {name: value for name, value in real.gaussians.items() if name == "features"}
    brought = reference.statistics.gaussians
    return replace(real, gaussians=own | brought) if brought else real


def score_names(section: Evaluate) -> dict[str, Callable[[str], str]]:
    """What scores on each network's vectors are called."""
    names: dict[str, Callable[[str], str]] = {
        "features": lambda score: score_name(score, section.features.name),
    }
    if section.inception is not None:
        names["pool"] = inception.Identity.at(section.inception.weights).name
    return names


def _reconstruction(context: Context, sets: dict[str, ImageFeatures], reference: Reference) -> dict[str, float]:
    """The tokenizer's scores on the test split, which is the reference or else the floor."""
    again = sets["again"]
    test = sets["reference" if reference.split == "test" else "floor"].first(again.images)
    distances = {
        names("frechet"): FrechetFrom(test.gaussians[vectors]).of_rows(getattr(again.findings, vectors))
        for vectors, names in score_names(context.recipe.evaluate).items()
    }
    assert again.findings.psnr is not None, "reconstructions have a PSNR"
    return {
        "reconstruction_psnr": float(again.findings.psnr.mean()),
        **{f"reconstruction_{name}": distance for name, distance in distances.items()},
    }


def _facts(
    context: Context, made: ImageFeatures, real: ImageFeatures, floor: ImageFeatures, scores: Scores
) -> dict[str, Any]:
    section = context.recipe.evaluate
    published = None if section.inception is None else inception.Identity.at(section.inception.weights)
    return {
        "network": section.features.name,
        "inception": None if published is None else {"sha256": published.sha256, "genuine": published.genuine},
        "reference": section.reference,
        "images": {"generated": made.images, "test": real.images, "floor": floor.images},
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
