"""Stage `report`: one page and a few pictures that say what a run made, how good it is and what it cost.

The page is one HTML file without any outside reference; the pictures are also files of their own, for the tracker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import yaml
from rich.filesize import decimal

from configs import UserError
from configs.published import beside, departures, scores_of_pictures
from infra.artifacts import Manifest
from tasks.data.images import pick_images, read_labels
from tasks.data.pixels import Pixels
from tasks.drawing import pages, pictures
from tasks.drawing.reconstruct import reconstructed
from tasks.sampling.per_image import shown_per_class
from tasks.scoring.distances import score_name
from tasks.stage import Context, Outcome, Stage

PAGE = "report.html"
_STAGES = ("shard", "train_vavae", "train_semvae", "encode", "train_dit", "tune_fewstep", "sample", "evaluate")
SECOND = score_name("frechet", "classifier")
"""Of the second distance (`evaluate.classifier_frechet`)."""
_FEW_IMAGES = 300
"""Below which scores say little (our choice: there a Fréchet distance of a few hundred features is mostly bias)."""
_LOOKED_THROUGH = 20_000
"""Images whose labels are read to choose what to show."""


def run(context: Context) -> Outcome:
    """Draw the pictures, fill in the page, attach both to the stage's tracked run."""
    manifests = {name: context.input(name).manifest for name in _STAGES if name in context.job.inputs}
    labels, sheets = _sheets(context)
    chart = pictures.curves_chart({name: _losses(manifest) for name, manifest in manifests.items()})
    files = {f"{name}.png": pictures.png(sheet) for name, sheet in sheets.items()}
    if chart is not None:
        files["curves.png"] = chart
    files[PAGE] = _page(context, manifests, labels, files).encode()
    entries = []
    for name, data in files.items():
        entries.append(context.out.write_bytes(name, data))
        context.tracker.file(name, data)
    return Outcome(files=entries, rows=1)


STAGE = Stage(name="report", version=4, sections=("report",), inputs=_STAGES, run=run)


# ------------------------------------------------------------------------------------------------------ pictures


def _sheets(context: Context) -> tuple[list[int], dict[str, Pixels]]:
    """Labels of the columns; grids of generated images and, where some are read, of real and reconstructed ones."""
    recipe, shards, sample = context.recipe, context.optional("shard"), context.input("sample")
    size, section = recipe.image.size, recipe.report
    made_labels = read_labels(sample, "part-", _LOOKED_THROUGH)
    if shards is None:
        made = shown_per_class(made_labels, section.columns, section.rows)
        generated = pick_images(sample.storage, sample.files("part-"), [*chain(*made)], size)
        return made_labels[made[0]].tolist(), {"generated": pictures.grid(generated, len(made[0]))}
    split = "test/" if shards.files("test/") else "train/"
    real_labels = read_labels(shards, split, _LOOKED_THROUGH)
    common = np.intersect1d(made_labels, real_labels)
    if not len(common):
        raise UserError("no label is both in the sample and in the source: nothing can be shown side by side")
    made = shown_per_class(made_labels, section.columns, section.rows, common)
    real = shown_per_class(real_labels, section.columns, section.rows, common)
    generated = pick_images(sample.storage, sample.files("part-"), [*chain(*made)], size)
    originals = pick_images(shards.storage, shards.files(split), [*chain(*real)], size)
    again = reconstructed(context, originals)
    columns = len(made[0])
    sheets = {
        "generated": pictures.grid(generated, columns),
        "real": pictures.grid(originals, columns),
        "reconstructed": pictures.grid(again, columns),
    }
    return made_labels[made[0]].tolist(), sheets


def _losses(manifest: Manifest) -> dict[str, pictures.Curve]:
    """A training stage's curves: the sum first, then its terms, without those per channel group."""
    curves: dict[str, pictures.Curve] = manifest.facts.get("curves", {})
    names = sorted((name for name in curves if "/" not in name), key=lambda name: (name != "total", name))
    return {name: curves[name] for name in names}


# ---------------------------------------------------------------------------------------------------------- page


@dataclass(frozen=True)
class Row:
    """One score beside what real images reach."""

    name: str
    meaning: str
    better: str
    value: str
    floor: str = ""
    interval: str = ""
    """Of 95 % under resampling of the generated images."""


def _page(context: Context, manifests: dict[str, Manifest], labels: Sequence[int], files: dict[str, bytes]) -> str:
    recipe = context.recipe
    shards = manifests["shard"].facts if "shard" in manifests else {}
    classes = shards.get("classes", ())
    held_out = "shard" in manifests and any(each.path.startswith("test/") for each in manifests["shard"].files)
    made, total = manifests["evaluate"], sum(manifest.seconds for manifest in manifests.values())
    return pages.render(
        "report",
        title=recipe.report.title,
        recipe=recipe,
        made=_timestamp(max(manifest.created for manifest in manifests.values())),
        columns=[_class_name(classes, label) for label in labels],
        absent=[_class_name(classes, label) for label in _absent(labels, recipe.data.classes)],
        why_absent=_why_absent(len(labels), recipe.report.columns),
        few=_few(made),
        pictures={
            name.removesuffix(".png"): pages.as_url(data) for name, data in files.items() if name.endswith(".png")
        },
        cards=_cards(made),
        rows=_score_rows(made),
        split="test" if held_out else "training",
        published=recipe.published,
        published_here=scores_of_pictures(recipe),
        beside=beside(scores_of_pictures(recipe), made.scores),
        departures=departures(recipe),
        network=made.facts["network"],
        counts=made.facts["images"],
        by_label=[
            (_class_name(classes, label), share)
            for label, share in enumerate(made.facts["consistency_by_label"])
            if share is not None
        ][:100],
        stages=[_stage_row(name, manifest, total) for name, manifest in manifests.items()],
        total=_duration(total),
        source=shards.get("source", {}).get("lines", []),
        quarantined=shards.get("quarantine", {}),
        others=_other_scores(manifests),
        yaml=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        libraries=made.libraries,
    )


def _cards(evaluated: Manifest) -> list[tuple[str, str, str]]:
    """The figures a reader asks for first: name, value, what it compares with."""
    scores, network = evaluated.scores, evaluated.facts["network"]
    cards = []
    if "class_consistency" in scores:
        floor = scores["floor_class_consistency"]
        cards.append(("Class consistency", f"{100 * scores['class_consistency']:.1f} %", f"real {100 * floor:.1f} %"))
    for score, title in (("frechet", "Fréchet distance"), ("precision", "Precision"), ("recall", "Recall")):
        name = score_name(score, network)
        real = f"real {scores['floor_' + name]:.2f}" if "floor_" + name in scores else ""
        cards.append((title, f"{scores[name]:.2f}", real))
    if "reconstruction_psnr" in scores:
        cards.append(("Tokenizer PSNR", f"{scores['reconstruction_psnr']:.1f} dB", "on test images"))
    return cards


def _why_absent(shown: int, columns: int) -> str:
    """Of classes without a column."""
    return (
        "report.columns says how many"
        if shown == columns
        else "of the others the sample, or the split beside it, has no image"
    )


def _absent(shown: Sequence[int], classes: int) -> list[int]:
    """Classes without a column; none where no column is of a class."""
    return [label for label in range(classes) if label not in shown] if min(shown) < classes else []


def _few(evaluated: Manifest) -> str:
    """What a reader of scores of few images must know; empty where there are enough."""
    counts, scores = evaluated.facts["images"], evaluated.scores
    fewest = min(counts["generated"], counts["test"])
    if fewest >= _FEW_IMAGES:
        return ""
    name = score_name("frechet", evaluated.facts["network"])
    said = f"These scores say little: {fewest:,} images on one side. With so few, another sample of the same model may "
    span = evaluated.facts.get("intervals", {}).get(name)
    said += (
        "score otherwise"
        if span is None
        else f"score {_said(span[0])} to {_said(span[1])} where this one has {_said(scores[name])}"
    )
    if (floor := scores.get(f"floor_{name}")) is not None and scores[name] < floor:
        said += f"; that it is below the {_said(floor)} of real images is chance"
    return said + ". Look at the pictures."


def _said(value: float) -> str:
    """Three digits, or all of a large number's: nobody reads `5.31e+03`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _score_rows(evaluated: Manifest) -> list[Row]:
    scores, network = evaluated.scores, evaluated.facts["network"]
    spans = evaluated.facts.get("intervals", {})
    weak = "" if "class_consistency" in scores else "; too weak for class consistency to mean something"
    known = [
        ("class_consistency", "share of images that the judge gives their label", "higher"),
        (score_name("frechet", network), "distance of the feature distributions", "lower"),
        (SECOND, "the same on features of the judge, which no stage trains on", "lower"),
        (score_name("precision", network), "share of these images that lie among real ones", "higher"),
        (score_name("recall", network), "share of real images that lie among these", "higher"),
        ("judge_accuracy", f"the judge on the test split{weak}", "higher"),
        ("reconstruction_psnr", "tokenizer on the test split, dB", "higher"),
        (score_name("reconstruction_frechet", network), "test images against their reconstructions", "lower"),
        (f"reconstruction_{SECOND}", "the same on features of the judge", "lower"),
    ]
    return [
        Row(
            name,
            meaning,
            better,
            f"{scores[name]:.3f}",
            f"{scores[floor]:.3f}" if (floor := f"floor_{name}") in scores else "",
            "{:.3f} to {:.3f}".format(*spans[name]) if name in spans else "",
        )
        for name, meaning, better in known
        if name in scores
    ]


def _stage_row(name: str, manifest: Manifest, total: float) -> dict[str, Any]:
    return {
        "name": name,
        "seconds": _duration(manifest.seconds),
        "share": manifest.seconds / total if total else 0.0,
        "rows": f"{manifest.rows:,}",
        "unit": "images seen" if name.startswith(("train_", "tune_")) else "images",
        "bytes": decimal(manifest.size),
        "fingerprint": manifest.fingerprint,
        "created": _timestamp(manifest.created),
    }


def _other_scores(manifests: dict[str, Manifest]) -> list[tuple[str, str, str]]:
    """Every other figure that a stage put on record."""
    return [
        (stage, name, f"{value:,.4g}")
        for stage, manifest in manifests.items()
        if stage != "evaluate"
        for name, value in sorted(manifest.scores.items())
    ]


def _class_name(classes: Sequence[str], label: int) -> str:
    return str(classes[label]) if label < len(classes) else str(label)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _timestamp(created: str) -> str:
    """A manifest's timestamp (ISO, UTC) to the minute."""
    return created[:16].replace("T", " ") + " UTC"
