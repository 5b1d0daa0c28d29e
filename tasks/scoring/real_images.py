"""What samples are scored by: features of real images and a judge, each an artifact made once for all samples.

Artifacts: `judge`, the classifier of class consistency; `reference` and `floor`, features of two sets of
real images; `reconstruction`, features of what the tokenizer makes of the test split.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from configs import Recipe, UserError
from configs.scores import Evaluate
from configs.section import fingerprinted
from infra.artifacts import Artifact
from infra.logs import say
from tasks.scoring import classifier, inception
from tasks.scoring import reference as references
from tasks.scoring.adm_file import write_statistics
from tasks.scoring.distances import score_name
from tasks.scoring.features import VECTORS, FeatureNetworks, ImageFeatures, ImageSet, PerImageFeatures, extract_features
from tasks.scoring.gaussian import Gaussian
from tasks.scoring.reference import Reference
from tasks.scoring.score import JUDGED, Scores, compare
from tasks.stage import Context, Job, Outcome, Stage, perform, side_job

RECONSTRUCTED = "reconstructed"
"""Name of the set of reconstructions."""
_FEATURES, _GAUSSIANS, _STATISTICS = "found.npz", "gaussians.npz", "statistics.npz"
_VERSION = 2


@dataclass(frozen=True)
class RealImages:
    """What samples of one recipe are scored by, whichever model makes them."""

    reference: Artifact
    judge: Artifact | None
    floor: dict[str, float]
    """Scores of real images, as many as the recipe samples; empty where the run reads none."""


@dataclass(frozen=True)
class ScoringInputs:
    """What real images are scored with: a recipe, where artifacts lie, and the artifacts to look at."""

    recipe: Recipe
    root: str
    shards: Artifact | None
    """None where the run reads no images of its own: then it has no judge and no floor."""
    tokenizer: Artifact | None = None

    @classmethod
    def of(cls, context: Context) -> ScoringInputs:
        """Those of a run of stage `evaluate`."""
        return cls(context.recipe, context.job.root, context.optional("shard"), context.optional("train_vavae"))

    def side_job(self, name: str, version: int, sections: dict[str, Any], inputs: dict[str, Artifact]) -> Job:
        """The job of an artifact that all samples of the recipe share."""
        prints = {stage: artifact.fingerprint for stage, artifact in inputs.items()}
        return side_job(name, version, self.recipe, self.root, sections, prints)


@dataclass(frozen=True)
class _KeptSet:
    """A set of images whose features become an artifact."""

    images: ImageSet
    job: Job

    @property
    def artifact(self) -> Artifact:
        return Context(self.job).artifact


def real_images(given: ScoringInputs) -> RealImages:
    """All that stage `evaluate` knows of real images; it needs no tokenizer.

    Raises:
        UserError: a set is too small to score.
    """
    reference, judge = references.resolve(given.recipe), trusted(classifier_of(given), given.recipe)
    sets, artifacts = features_of(given, reference, judge, {})
    base: dict[str, float] = {}
    if "floor" in sets:
        floor = sets["floor"].first(min(given.recipe.sample.images, sets["floor"].images))
        base = scored(with_statistics(sets["reference"], reference), floor, given.recipe, intervals=False).values
    return RealImages(reference.artifact or artifacts["reference"], judge, base)


def classifier_of(given: ScoringInputs) -> Artifact | None:
    """The judge of class consistency, trained unless there is one; None where the recipe has none."""
    section = given.recipe.evaluate.classifier
    if section is None:
        return None
    assert given.shards is not None  # a recipe with a judge reads images
    learning = {name: value for name, value in fingerprinted(section).items() if name != "min_accuracy"}
    sections = {"image": given.recipe.section("image"), "classifier": learning}
    job = given.side_job("judge", 1, sections, {"shard": given.shards})
    artifact = perform(Stage("judge", 1, (), (), classifier.run), job)
    return artifact


def trusted(judge: Artifact | None, recipe: Recipe) -> Artifact | None:
    """The judge where it is good enough to score by; None, and a warning that says why, where it is not."""
    section = recipe.evaluate.classifier
    if judge is None or section is None:
        return None
    accuracy = judge.manifest.scores["judge_accuracy"]
    if accuracy >= section.min_accuracy:
        return judge
    say(
        f"class consistency is left out: its judge labels only {accuracy:.3f} of the test split right, and "
        f"evaluate.classifier.min_accuracy asks for {section.min_accuracy}; more images, or more of "
        "evaluate.classifier.epochs or width, make a better one",
        "warning",
    )
    return None


def features_of(
    given: ScoringInputs, reference: Reference, judge: Artifact | None, samples: Mapping[str, ImageSet]
) -> tuple[dict[str, ImageFeatures], dict[str, Artifact]]:
    """Features of the `samples` and of the sets `reference`, `floor` and RECONSTRUCTED (with a tokenizer), the last
    two where images of the recipe's source are read.

    All that has no artifact yet is looked at by the same actors. With the features come the artifacts, by set.
    """
    section = given.recipe.evaluate
    kept = _kept_sets(given, reference, judge)
    missing = {name: each.images for name, each in kept.items() if not each.artifact.is_complete()}
    published = None if section.inception is None else section.inception.weights
    size, precision = given.recipe.image.size, section.precision
    compute, tokenizer = given.recipe.compute.actors, given.tokenizer
    networks = FeatureNetworks(
        size,
        section.features,
        judge,
        section.classifier_frechet,
        tokenizer,
        published,
        precision,
        compiled=compute.compile,
    )
    weights_hash = references.looked_at(given.recipe)["inception"]
    features = extract_features("evaluate", {**samples, **missing}, networks, compute)
    artifacts = {
        name: _stored(each, features.get(name), judged=name == "floor", network=weights_hash)
        for name, each in kept.items()
    }
    if reference.artifact is not None:
        artifacts["reference"] = reference.artifact
    known = {name: on_record(artifact, judge) for name, artifact in artifacts.items()}
    return features | known, artifacts


def _kept_sets(given: ScoringInputs, reference: Reference, judge: Artifact | None) -> dict[str, _KeptSet]:
    """The sets of real images, and of reconstructions of them; a reference that is given is none of ours.

    Floor and reconstructions are of the recipe's own images: a run that reads none has neither.
    """
    shards, limit = given.shards, given.recipe.evaluate.images
    networks: dict[str, Any] = references.looked_at(given.recipe)
    seen = {} if judge is None or not given.recipe.evaluate.classifier_frechet else {"judge": judge}
    if seen:
        networks |= {"judged": True}

    def kept(stage: str, images: ImageSet, sections: dict[str, Any], inputs: dict[str, Artifact]) -> _KeptSet:
        inputs |= seen
        return _KeptSet(images, given.side_job(stage, _VERSION, {**networks, **sections}, inputs))

    sets: dict[str, _KeptSet] = {}
    if reference.artifact is None:
        source, prefix, most = _source(given, reference)
        images = ImageSet(source, prefix, most, keep=limit)
        identity = reference.split or reference.identity
        sections = {"reference": identity, "images": limit, "statistics_images": most}
        inputs = {"shard": source} if source == shards else {}
        sets["reference"] = kept("reference", images, sections, inputs)
    if shards is None:  # nothing but the reference is compared with
        return sets
    split = reference.floor_split
    inputs = {"shard": shards} | ({} if judge is None else {"judge": judge})
    if shards.files(f"{split}/"):  # a source of which all is trained on holds nothing out
        sets["floor"] = kept("floor", ImageSet(shards, f"{split}/", limit), {"split": split, "images": limit}, inputs)
    if given.tokenizer is not None and shards.files("test/"):
        images = ImageSet(shards, "test/", limit, reconstruct=True)
        inputs = {"shard": shards, "train_vavae": given.tokenizer}
        sets[RECONSTRUCTED] = kept("reconstruction", images, {"images": limit}, inputs)
    return sets


def _source(given: ScoringInputs, reference: Reference) -> tuple[Artifact, str, int]:
    """Where a reference's images are: artifact, prefix of its files, and how many at most count."""
    section = given.recipe.evaluate
    most = section.reference_images or section.images
    if reference.split is not None:
        assert given.shards is not None  # a recipe that compares with a split reads images
        return given.shards, f"{reference.split}/", most
    job = given.side_job("reference_images", 1, {"file": reference.identity}, {})
    unpacked = perform(Stage("reference_images", 1, (), (), references.unpack), job)
    return unpacked, "part-", most if section.reference_images else unpacked.manifest.rows


def _stored(kept: _KeptSet, features: ImageFeatures | None, judged: bool, network: str | None) -> Artifact:
    """The artifact of a set, written unless it is there."""
    write = partial(_written, features, judged=judged, network=network)
    return perform(Stage(kept.job.stage, _VERSION, (), (), write), kept.job)


def _written(found: ImageFeatures | None, aside: Context, judged: bool, network: str | None) -> Outcome:
    """Write what was found out about a set, and its Inception statistics in the layout of ADM's evaluator."""
    assert found is not None, "only a set that was looked at is written"
    findings = found.findings if judged else replace(found.findings, predictions=None)
    columns = {name: values for name, values in vars(findings).items() if values is not None}
    gaussians: dict[str, Any] = {"images": found.images}
    for name, gaussian in found.gaussians.items():
        gaussians |= {f"{name}_mean": gaussian.mean, f"{name}_covariance": gaussian.covariance}
    files = {_FEATURES: _packed(columns), _GAUSSIANS: _packed(gaussians)}
    if network is not None:
        published = {name: found.gaussians[name] for name in ("pool", "spatial")}
        files[_STATISTICS] = write_statistics(published, network)
    return Outcome([aside.out.write_bytes(name, data) for name, data in files.items()], rows=found.images)


def on_record(artifact: Artifact, judge: Artifact | None) -> ImageFeatures:
    """What a `reference`, `floor` or `reconstruction` artifact says of its images.

    judge: whose features are compared. What another one saw, of a reference that is given, is left
        out: distances between features of two networks say nothing.
    """
    same = judge is not None and artifact.manifest.inputs.get("judge") == judge.fingerprint
    hidden = set[str]() if same else {JUDGED}
    with np.load(io.BytesIO(artifact.read(_FEATURES)), allow_pickle=False) as columns:
        findings = PerImageFeatures(**{name: columns[name] for name in columns.files if name not in hidden})
    with np.load(io.BytesIO(artifact.read(_GAUSSIANS)), allow_pickle=False) as found:
        gaussians = {
            name: Gaussian(found[f"{name}_mean"], found[f"{name}_covariance"])
            for name in VECTORS
            if f"{name}_mean" in found.files and name not in hidden
        }
        return ImageFeatures(findings, gaussians, int(found["images"]))


def _packed(arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def with_statistics(real: ImageFeatures, reference: Reference) -> ImageFeatures:
    """The reference with the means and covariances that its file brings, where it brings some."""
    if reference.statistics is None or "pool" not in real.gaussians:
        return real
    own = {name: value for name, value in real.gaussians.items() if name in ("features", JUDGED)}
    brought = reference.statistics.gaussians
    return replace(real, gaussians=own | brought) if brought else real


def score_names(section: Evaluate) -> dict[str, Callable[[str], str]]:
    """What scores on each network's vectors are called."""
    names: dict[str, Callable[[str], str]] = {
        "features": lambda score: score_name(score, section.features.label),
    }
    if section.inception is not None:
        names["pool"] = inception.Identity.at(section.inception.weights).name
    if section.classifier_frechet:
        names[JUDGED] = lambda score: score_name(score, "classifier")
    return names


def has_both(vectors: str, *sets: ImageFeatures) -> bool:
    """Whether these sets can be compared: the judge's features are missing where it is too weak, and
    in a reference that it never saw."""
    return vectors != JUDGED or all(vectors in each.gaussians for each in sets)


def scored(real: ImageFeatures, other: ImageFeatures, recipe: Recipe, intervals: bool = True) -> Scores:
    """Scores of a set against real images. Raises UserError where a set is too small to have them."""
    section = recipe.evaluate
    try:
        known = {vectors: name for vectors, name in score_names(section).items() if has_both(vectors, real, other)}
        return compare(real, other, section, known, recipe.data.classes, intervals=intervals)
    except ValueError as error:
        raise UserError(f"the sets cannot be scored: {error}; see sample.images and evaluate.images") from None
