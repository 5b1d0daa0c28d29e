"""Stage `sample`: pictures from a trained model, one seed per image, in parts that a killed run does not repeat."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from configs import Recipe
from configs.sampling import AutoGuidance as AutoGuidanceSection
from infra.progress import Bar
from infra.storage import FileEntry
from infra.weights import check_pretrained, fetch, file_hash
from tasks.data.actors import spread
from tasks.data.given_statistics import tell_differences
from tasks.data.images import image_table, pick_images
from tasks.data.pixels import Pixels
from tasks.data.portions import SAMPLE_GRID_COLUMNS, SAMPLE_GRID_ROWS, SAMPLE_ROWS_PER_PART
from tasks.data.receipts import Receipt, finished, write_receipt
from tasks.data.statistics import LatentStatistics
from tasks.drawing import pictures
from tasks.networks import build_network
from tasks.sampling.per_image import image_labels, shown_per_class
from tasks.sampling.sampler import Sampler, model_of
from tasks.stage import Context, Job, Outcome, Stage

GRID = "grid.png"


def run(context: Context) -> Outcome:
    """Sample every image of the recipe and draw a grid with one class per column.

    Raises:
        UserError: the model was trained on latents with other statistics than the encode artifact's, or the
            guide's weights do not fit.
    """
    recipe, out = context.recipe, context.out
    check_statistics(context)
    parts = _parts(recipe)
    made_from = context.job.fingerprint
    done = {each.entry.path: each for each in finished(out, [(part["name"], made_from) for part in parts])}
    missing = [part for part in parts if part["name"] not in done]
    started = time.monotonic()
    sampled = sum(part["count"] for part in missing)
    with Bar("sample", recipe.sample.images) as bar:
        bar.skip(recipe.sample.images - sampled)
        for receipt in spread(missing, PartSampler, (asdict(context.job),), recipe.compute.actors):
            done[receipt.entry.path] = receipt
            bar.advance(receipt.entry.rows or 0)
    seconds = time.monotonic() - started
    entries = [done[part["name"]].entry for part in parts]
    sheet = pictures.png(_grid(context, entries))
    context.tracker.file(GRID, sheet)
    return Outcome(
        files=[*entries, out.write_bytes(GRID, sheet)],
        rows=recipe.sample.images,
        facts={
            "shape": [recipe.image.size, recipe.image.size, 3],
            "guidance": recipe.section("sample")["guidance"],
        },
        scores=_scores(list(done.values()), sampled, seconds),
    )


def check_statistics(context: Context) -> None:
    """Say how far the statistics of a model are from those of the latents here, where it was given some.

    Raises:
        UserError: it was given none and was trained on other latents.
    """
    model, latents = model_of(context), context.optional("encode")
    if latents is None:
        return
    facts, own = model.manifest.facts, LatentStatistics.from_facts(latents.manifest.facts, latents.uri)
    if "statistics_from" not in facts:
        own.check(facts["statistics_hash"], model.uri)
        return
    tell_differences(LatentStatistics.from_facts(facts, model.uri), own, facts["statistics_from"])


def _scores(receipts: list[Receipt], sampled: int, seconds: float) -> dict[str, float]:
    """Speed of what was sampled now, and evaluations per image of the sample (`Integrator.evaluations`)."""
    counts = [receipt.facts["evaluations"] for receipt in receipts]
    scores = {name: sum(count[name] for count in counts) / len(counts) for name in counts[0]}
    return scores | ({"images_per_second": sampled / seconds, "sampling_seconds": seconds} if sampled else {})


def external(recipe: Recipe) -> dict[str, str]:
    """The content of a weak guide's file, where there is one."""
    sections = [recipe.sample.at(stage) for stage in recipe.sampled_resolutions]
    asked = [each.guidance.weights for each in sections if isinstance(each.guidance, AutoGuidanceSection)]
    found: dict[str, str] = {}
    for number, weights in enumerate(dict.fromkeys(asked)):
        found["guide" if number == 0 else f"guide {number + 1}"] = file_hash(fetch(weights))
    return found


def check(recipe: Recipe) -> None:
    """Raises UserError where a weak guide cannot be had or is not the network that the recipe describes: before the
    model it guides is trained for days."""
    sections = [recipe.sample.at(stage).guidance for stage in recipe.sampled_resolutions]
    guides = [each for each in sections if isinstance(each, AutoGuidanceSection)]
    for guide in dict.fromkeys(guides):
        field = "sample.guidance.weights"
        check_pretrained(lambda guide=guide: build_network(recipe, guide.model), guide.weights, field)  # type: ignore[misc]


STAGE = Stage(
    name="sample",
    version=2,
    sections=("sample",),
    inputs=("train_vavae", "encode", "train_dit", "tune_fewstep"),
    run=run,
    external=external,
    check=check,
)


class PartSampler:
    """An actor with the networks of one recipe; makes and writes one part per call."""

    def __init__(self, job: dict[str, Any]) -> None:
        context = Context(Job(**job))
        self.sampler, self.out, self._made_from = Sampler.of(context), context.out, context.job.fingerprint

    def __call__(self, part: Mapping[str, Any]) -> Receipt:
        batch, count = self.sampler.recipe.sample.batch, part["count"]
        starts = range(part["start"], part["start"] + count, batch)
        made = self.sampler.stream(np.arange(start, start + batch) for start in starts)  # the last one is cut below
        indices, labels, images = (np.concatenate(column)[:count] for column in zip(*made, strict=True))
        table = image_table(indices, labels, images)
        entry = self.out.write_table(part["name"], table, rows_per_group=batch, compression="zstd")
        receipt = Receipt(entry, self._made_from, {"evaluations": self.sampler.integrator.evaluations()})
        write_receipt(self.out, receipt)
        return receipt


def _parts(recipe: Recipe) -> list[dict[str, Any]]:
    """Stretches of the sample, each a whole number of static batches but for the end."""
    images, batch = recipe.sample.images, recipe.sample.batch
    length = batch * -(-SAMPLE_ROWS_PER_PART // batch)
    starts = range(0, images, length)
    return [
        {"name": f"part-{number:05d}.parquet", "start": start, "count": min(length, images - start)}
        for number, start in enumerate(starts)
    ]


def _grid(context: Context, entries: list[FileEntry]) -> Pixels:
    """One class per column, read from the parts that hold the shown images."""
    recipe = context.recipe
    indices = np.arange(min(recipe.sample.images, recipe.data.classes * SAMPLE_GRID_ROWS))
    labels = image_labels(recipe.sample.labels, indices, recipe.data.classes, recipe.sample.seed)
    rows = shown_per_class(labels, SAMPLE_GRID_COLUMNS, SAMPLE_GRID_ROWS)
    wanted = [index for row in rows for index in row]
    return pictures.grid(pick_images(context.out, entries, wanted, recipe.image.size), columns=len(rows[0]))
