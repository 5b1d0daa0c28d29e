"""How runs compare: a table over seeds, charts over images seen and over time, and one HTML page of both."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

import numpy as np
import yaml

from tasks.drawing import charts, pages
from tasks.scoring.distances import score_name
from tasks.stage import Context, Outcome

LOWER_IS_BETTER = ("frechet", "fid", "sfid", "kid", "kernel_distance", "spatial_frechet")


Curve = Sequence[tuple[float, float, float]]
"""(images seen, seconds of training, value) points in order."""


@dataclass(frozen=True)
class ComparedRun:
    """How one training or sample turned out: an entry of a race, a setting of a sweep, a run."""

    name: str
    """Entries of one name are repetitions with other seeds."""
    scores: Mapping[str, float]
    seed: int | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """On the way there: of scores, or of losses."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What is not a score of images: seconds, images per second."""
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Of scores, where there are some."""
    published: Mapping[str, float] = field(default_factory=dict)
    """What its paper reports."""
    sheet: bytes | None = None
    """A PNG of images."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What it is: artifact, MLflow run, and what sets it apart."""


@dataclass(frozen=True)
class Axis:
    """Names whose results are drawn once more, over a number."""

    label: str
    places: Mapping[str, tuple[float, str]]
    """Number and line by name; a single line has no name."""


@dataclass(frozen=True)
class FurtherTable:
    """One more table of a page, as it is shown."""

    heading: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def better(score: str) -> str:
    """`lower` or `higher`."""
    return "lower" if score.removeprefix("reconstruction_").startswith(LOWER_IS_BETTER) else "higher"


def score_columns(compared_runs: Sequence[ComparedRun]) -> list[str]:
    """Scores that all have, in the order of the first."""
    return (
        [name for name in compared_runs[0].scores if all(name in each.scores for each in compared_runs)]
        if compared_runs
        else []
    )


def chosen_scores(known: Sequence[str], network: str) -> list[str]:
    """The scores that a reader asks for first, of those known: for charts and the left of the table."""
    published = ("fid", "inception_score")
    wanted = [*published, "class_consistency", *(score_name(s, network) for s in ("frechet", "precision", "recall"))]
    wanted.append(score_name("frechet", "classifier"))
    return [name for name in wanted if name in known] or list(known[:4])


@dataclass(frozen=True)
class Cell:
    """One score of one name, over its seeds."""

    values: tuple[float, ...]
    interval: Sequence[float] | None = None

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for a single one."""
        return stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if self.spread is not None:
            return f"{self.mean:.4g} ± {self.spread:.2g}"
        if self.interval is not None:
            return f"{self.mean:.4g} ({self.interval[0]:.4g} to {self.interval[1]:.4g})"
        return f"{self.mean:.4g}"


def table(compared_runs: Sequence[ComparedRun], columns: Sequence[str]) -> dict[str, dict[str, Cell]]:
    """Cells by name, in the order of entries, and by column: a score or a figure."""
    found: dict[str, dict[str, Cell]] = {}
    for name, same in by_name(compared_runs).items():
        row: dict[str, Cell] = {}
        for column in columns:
            values = [known[column] for each in same if column in (known := {**each.scores, **each.figures})]
            if values:
                row[column] = Cell(tuple(values), same[0].intervals.get(column) if len(values) == 1 else None)
        found[name] = row
    return found


def interpolated(places: Sequence[float], curve: Sequence[Sequence[float]]) -> list[float]:
    """A curve that begins at (0, 0), such as the time of a training by images seen, at these places; 0 without one."""
    x, y = np.asarray([[0.0, 0.0], *curve], dtype=np.float64).T
    return [float(value) for value in np.interp(places, x, y)]


def as_csv(compared_runs: Sequence[ComparedRun]) -> bytes:
    """Every point of every curve and every score at the end, one row each: for other programs. Names that a
    spreadsheet would take for formulas begin with an apostrophe."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["name", "seed", "images_seen", "seconds", "score", "value"])
    for each in compared_runs:
        name = _inert(each.name)
        for score, curve in each.curves.items():
            told = _inert(score)
            writer.writerows([name, each.seed, *point[:2], told, point[2]] for point in curve)
        writer.writerows([name, each.seed, "", "", _inert(score), value] for score, value in each.scores.items())
    return text.getvalue().encode()


def _inert(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def draw(
    compared_runs: Sequence[ComparedRun],
    scores: Sequence[str],
    floor: Mapping[str, float],
    seconds: str = "seconds of training",
    axis: Axis | None = None,
) -> dict[str, bytes]:
    """Charts as PNG by file name: curves over images seen and over `seconds` (the axis's name), and the results.

    A line is the mean over seeds, its band reaches from the lowest to the highest.
    """
    found: dict[str, bytes] = {}
    named = by_name(compared_runs)
    curves = list(dict.fromkeys(curve for each in compared_runs for curve in each.curves))
    timed = any(point[1] for each in compared_runs for curve in each.curves.values() for point in curve)
    for number, (file, label) in enumerate(
        (("by_images.png", "images seen"), ("by_seconds.png", seconds))[: 1 + timed]
    ):
        panels = [
            charts.Panel(
                curve,
                {
                    name: charts.band([[(point[number], point[2]) for point in each.curves[curve]] for each in having])
                    for name, same in named.items()
                    if (having := [each for each in same if curve in each.curves])
                },
                floor.get(curve),
            )
            for curve in curves
        ]
        if panels:
            found[file] = charts.lines(panels, label)
    if axis is not None:
        panels = []
        for score in scores:
            ends: dict[str, list[tuple[float, float]]] = {}
            for each in compared_runs:
                if each.name in axis.places:
                    place, line = axis.places[each.name]
                    ends.setdefault(line, []).append((place, each.scores[score]))
            bands = {line: charts.spread_at(points) for line, points in ends.items()}
            panels.append(charts.Panel(score, bands, floor.get(score)))
        found["sweep.png"] = charts.lines(panels, axis.label)
    return found


def page(
    title: str,
    lead: str,
    compared_runs: Sequence[ComparedRun],
    columns: Sequence[str],
    pictures: Mapping[str, bytes],
    floor: Mapping[str, float],
    details: Mapping[str, Any],
    advice: str = "",
    further: Sequence[FurtherTable] = (),
) -> bytes:
    """One HTML file without any outside reference.

    columns: scores and figures of the table. details: plain values that are shown as YAML under their names.
    advice: what to make of it, in a sentence.
    """
    cells, scores = table(compared_runs, columns), set(score_columns(compared_runs))
    best = {
        column: min(
            (row[column].mean * (1 if better(column) == "lower" else -1), name)
            for name, row in cells.items()
            if column in row
        )[1]
        for column in columns
        if column in scores and len(cells) > 1
    }
    return pages.render(
        "comparison",
        title=title,
        lead=lead,
        advice=advice,
        further=further,
        columns=[(name, better(name) if name in best else "") for name in columns],
        rows=cells,
        best=best,
        floor={name: f"{floor[name]:.4g}" for name in columns if name in floor},
        published={
            each.name: {name: f"{each.published[name]:.4g}" for name in columns if name in each.published}
            for each in compared_runs
            if each.published
        },
        pictures={name.removesuffix(".png"): pages.as_url(data) for name, data in pictures.items()},
        sheets=[
            (each.name, each.seed, pages.as_url(each.sheet))
            for each, *_ in by_name(compared_runs).values()
            if each.sheet
        ],
        facts=[(each.name, each.seed, each.facts) for each in compared_runs],
        details={name: yaml.safe_dump(value, sort_keys=False, allow_unicode=True) for name, value in details.items()},
    ).encode()


def by_name(compared_runs: Sequence[ComparedRun]) -> dict[str, list[ComparedRun]]:
    found: dict[str, list[ComparedRun]] = {}
    for each in compared_runs:
        found.setdefault(each.name, []).append(each)
    return found


def write(
    context: Context,
    page_name: str,
    title: str,
    lead: str,
    compared_runs: Sequence[ComparedRun],
    network: str,
    floor: Mapping[str, float],
    details: Mapping[str, Any],
    seconds: str = "seconds of training",
    axis: Axis | None = None,
    further: Mapping[str, bytes] | None = None,
    advice: str = "",
    tables: Sequence[FurtherTable] = (),
    facts: Mapping[str, Any] | None = None,
) -> Outcome:
    """Page, charts and CSV as an artifact's files, and the table into its MLflow run.

    network: whose scores come first. further: charts of the caller's own, by file name. advice, tables: as for `page`.
    facts: for the artifact's manifest.
    """
    known = score_columns(compared_runs)
    shown = chosen_scores(known, network)
    figures = dict.fromkeys(name for each in compared_runs for name in each.figures)
    columns = [*shown, *(name for name in known if name not in shown), *figures]
    pictures = draw(compared_runs, shown, floor, seconds, axis) | dict(further or {})
    files = {
        page_name: page(title, lead, compared_runs, columns, pictures, floor, details, advice, tables),
        "scores.csv": as_csv(compared_runs),
        **pictures,
    }
    cells = table(compared_runs, columns)
    values = {column: [str(row.get(column, "")) for row in cells.values()] for column in columns}
    context.tracker.table("scores.json", {"name": list(cells), **values})
    for name, data in files.items():
        context.tracker.file(name, data)
    return Outcome(
        files=[context.out.write_bytes(name, data) for name, data in files.items()],
        rows=len(compared_runs),
        scores={f"{name}/{column}": row[column].mean for name, row in cells.items() for column in shown},
        facts=dict(facts or {}),
    )
