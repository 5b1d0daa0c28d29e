"""Stage `evaluate`: how close generated images come to real ones of the test split, beside the floor.

The floor is the same scores for as many real images of the train split: what a perfect model would reach here.
What does not depend on the generated images is an artifact of its own, made once for all samples to come: the
`judge`, the features of real images (`reference`) and of the tokenizer's reconstructions (`reconstruction`).
"""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import numpy as np

from configs import UserError
from infra.artifacts import Artifact, fingerprint
from tasks import judge as judges
from tasks.examine import Findings, ImageSet, Networks, examine
from tasks.scores import Gaussian, frechet_distance, precision_recall, score_name
from tasks.stage import Context, Job, Outcome, Stage, perform


def run(context: Context) -> Outcome:
    """Score the sample, the floor and the tokenizer.

    Raises:
        UserError: the judge is worse than the recipe allows, or a set is too small to score.
    """
    network = context.recipe.evaluate.features.name
    judge = _judge(context)
    made, test, train, again = _findings(context, judge)
    floor = train.first(len(made.labels))
    try:
        scores = {**_scores(context, test, made), **_scores(context, test, floor, "floor_")}
        if again is not None and again.psnr is not None:
            distance = frechet_distance(Gaussian.of(test.features), Gaussian.of(again.features))
            scores |= {"reconstruction_psnr": float(again.psnr.mean())}
            scores |= {score_name("reconstruction_frechet", network): distance}
    except ValueError as error:
        raise UserError(f"the sets cannot be scored: {error}; see sample.images and evaluate.images") from None
    if judge is not None:
        scores |= judge.manifest.scores
    facts = {
        "network": network,
        "images": {"generated": len(made.labels), "test": len(test.labels), "floor": len(floor.labels)},
        "consistency_by_label": _by_label(made, context.recipe.data.classes),
    }
    return Outcome(files=[], rows=len(made.labels), facts=facts, scores=scores)


STAGE = Stage(
    name="evaluate",
    version=1,
    sections=("image", "evaluate"),
    inputs=("shard", "train_vavae", "sample"),
    run=run,
)


# ------------------------------------------------------------------------------------------------ side artifacts


def _judge(context: Context) -> Artifact | None:
    """The judge, trained unless there is one; refused when it is worse than the recipe allows."""
    section = context.recipe.evaluate.classifier
    if section is None:
        return None
    sections = {
        "image": context.recipe.section("image"),
        "classifier": section.model_dump(exclude={"min_accuracy"}),
    }
    job = _aside(context, "judge", sections, {"shard": context.input("shard")})
    artifact = perform(Stage("judge", 1, (), (), judges.run), job)
    accuracy = artifact.manifest.scores["judge_accuracy"]
    if accuracy < section.min_accuracy:
        raise UserError(
            f"the judge labels only {accuracy:.3f} of the test split right, expected at least {section.min_accuracy} "
            "(evaluate.classifier.min_accuracy), so class consistency would mean little: raise "
            "evaluate.classifier.epochs or width, or set evaluate.classifier to null"
        )
    return artifact


def _findings(context: Context, judge: Artifact | None) -> tuple[Findings, Findings, Findings, Findings | None]:
    """Findings of generated, test, train and reconstructed images; what is on record already is not made again."""
    recipe, limit = context.recipe, context.recipe.evaluate.images
    shards = context.input("shard")
    tokenizer = context.input("train_vavae") if "train_vavae" in context.job.inputs else None
    judged = {} if judge is None else {"judge": judge}
    jobs = {"reference": _aside(context, "reference", _looked_at(context), {"shard": shards, **judged})}
    sets = {"reference": {split: ImageSet(shards, f"{split}/", limit) for split in ("test", "train")}}
    if tokenizer is not None:
        inputs = {"shard": shards, "train_vavae": tokenizer}
        jobs["reconstruction"] = _aside(context, "reconstruction", _looked_at(context), inputs)
        sets["reconstruction"] = {"again": ImageSet(shards, "test/", limit, reconstruct=True)}

    wanted = {"made": ImageSet(context.input("sample"), "part-", limit)}
    for name, job in jobs.items():
        if not Context(job).artifact.is_complete():
            wanted |= sets[name]
    networks = Networks(recipe.image.size, recipe.evaluate.features, judge, tokenizer)
    found = examine("evaluate", wanted, networks, recipe.compute.actors)
    for name, job in jobs.items():
        keep = partial(_kept, {each: found[each] for each in sets[name] if each in found})
        kept = perform(Stage(name, 1, (), (), keep), job)
        found |= {each: _read(kept, each) for each in sets[name]}
    return found["made"], found["test"], found["train"], found.get("again")


def _looked_at(context: Context) -> dict[str, Any]:
    """What determines features of given images."""
    section = context.recipe.section("evaluate")
    return {
        "image": context.recipe.section("image"),
        **{name: section[name] for name in ("features", "images")},
    }


def _aside(context: Context, name: str, sections: dict[str, Any], inputs: dict[str, Artifact]) -> Job:
    """The job of an artifact that this stage needs and others of its kind can share."""
    prints = {stage: artifact.fingerprint for stage, artifact in inputs.items()}
    return Job(name, fingerprint(name, 1, sections, prints), context.job.root, context.job.recipe, prints, sections)


def _kept(found: dict[str, Findings], aside: Context) -> Outcome:
    """Write findings, one file per set."""
    files = []
    for name, findings in found.items():
        buffer = io.BytesIO()
        np.savez(buffer, **{key: values for key, values in vars(findings).items() if values is not None})
        files.append(aside.out.write_bytes(f"{name}.npz", buffer.getvalue(), rows=len(findings.labels)))
    return Outcome(files=files, rows=sum(entry.rows or 0 for entry in files))


def _read(artifact: Artifact, name: str) -> Findings:
    with np.load(io.BytesIO(artifact.read(f"{name}.npz"))) as columns:
        return Findings(**{key: columns[key] for key in columns.files})


# -------------------------------------------------------------------------------------------------------- scores


def _scores(context: Context, test: Findings, found: Findings, prefix: str = "") -> dict[str, float]:
    """Scores of a set of images against the test split."""
    section = context.recipe.evaluate
    precision, recall = precision_recall(test.features, found.features, section.neighbours)
    distance = frechet_distance(Gaussian.of(test.features), Gaussian.of(found.features))
    values = {"frechet": distance, "precision": precision, "recall": recall}
    scores = {prefix + score_name(name, section.features.name): value for name, value in values.items()}
    if found.consistency is not None:
        scores[f"{prefix}class_consistency"] = found.consistency
    return scores


def _by_label(found: Findings, classes: int) -> list[float | None]:
    """Share of images of each label that the judge gives this label; None where there are none."""
    if found.predictions is None:
        return []
    right = found.predictions == found.labels
    return [
        float(right[found.labels == label].mean()) if (found.labels == label).any() else None
        for label in range(classes)
    ]
