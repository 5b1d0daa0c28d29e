"""What each name of a race takes to be as good as one of them is at its end: images, FLOPs, time, dollars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from tasks.comparing.comparison import ComparedRun, FurtherTable, better, by_name

TERAFLOPS = "training_teraflops"
"""The figure of an entry that holds the FLOPs of its whole training."""


@dataclass(frozen=True)
class Line:
    """Where one name is first as good as the baseline is at its end, in all scores; means over seeds."""

    name: str
    images: float | None
    """None, as all that follows: at no point of its training."""
    teraflops: float | None = None
    """In proportion to images: those of a network whose routed blocks end dense are a little fewer."""
    of_baseline: float | None = None
    """Its FLOPs over those of the baseline's whole training."""
    processor_seconds: float | None = None
    dollars: float | None = None
    clear: bool = False
    """Better there in every score by more than either's spread over seeds."""

    @property
    def told(self) -> list[str]:
        """The cells of a table."""
        if self.images is None or self.teraflops is None or self.of_baseline is None:
            return [self.name, "not reached", *["–"] * 5]
        return [
            self.name,
            f"{self.images:,.0f}",
            f"{self.teraflops:.3g}",
            f"{self.of_baseline:.0%}",
            f"{self.processor_seconds:.0f}",
            f"{self.dollars:.2g}",
            "yes" if self.clear else "within the spread",
        ]


COLUMNS = ("", "images", "TFLOPs", "of the baseline's", "processor seconds", "dollars", "by more than the spread")


@dataclass(frozen=True)
class Standard:
    """What a ledger is drawn up by."""

    baseline: str
    """The name whose last point all are measured by."""
    scores: Sequence[str]
    """Those that have to be as good."""
    dollars_per_second: float
    """Of one processor."""


def ledger(compared_runs: Sequence[ComparedRun], by: Standard) -> list[Line]:
    """A line for each name, in their order. The runs' clocks are processor seconds, and all have as many points.

    Raises:
        ValueError: no run has the baseline's name, or one lacks a curve of a score.
    """
    named = _checked(compared_runs, by)
    goals = {score: _at(named[by.baseline], score, -1) for score in by.scores}
    whole = mean(each.figures[TERAFLOPS] for each in named[by.baseline])
    return [_line(name, same, goals, whole, by.dollars_per_second) for name, same in named.items()]


def image_ratios(compared_runs: Sequence[ComparedRun], by: Standard) -> dict[str, dict[str, float | None]]:
    """By name and score: how many times as many images the baseline takes to be as good, 2.0 for twice as many.

    As good as the worse of both at their ends, which both reach; means over seeds, and straight lines between the
    points that were scored. None where one of them is as good at its first point, of which nobody knows since when.

    Raises:
        ValueError: as `ledger`.
    """
    named = _checked(compared_runs, by)
    found: dict[str, dict[str, float | None]] = {}
    for name, same in named.items():
        found[name] = {}
        for score in by.scores:
            ways = [_way(each, score) for each in (named[by.baseline], same)]
            goal = min((way[-1][1] for way in ways), key=lambda value: _gain(score, [value], [0.0]))
            baseline, own = (_images_for(way, score, goal) for way in ways)
            found[name][score] = None if baseline is None or own is None else baseline / own
    return found


def _checked(compared_runs: Sequence[ComparedRun], by: Standard) -> dict[str, list[ComparedRun]]:
    named = by_name(compared_runs)
    if by.baseline not in named:
        raise ValueError(f"no run is called {by.baseline}; there are {', '.join(named)}")
    lacking = [each.name for each in compared_runs if any(score not in each.curves for score in by.scores)]
    if lacking:
        raise ValueError(f"{lacking[0]} has no curve of {' or '.join(by.scores)}")
    return named


def _way(same: Sequence[ComparedRun], score: str) -> list[tuple[float, float]]:
    """Images seen and score at every point, means over seeds."""
    points = zip(*(each.curves[score] for each in same), strict=True)
    return [(mean(images for images, _, _ in at), mean(value for _, _, value in at)) for at in points]


def _images_for(way: Sequence[tuple[float, float]], score: str, goal: float) -> float | None:
    """Where a curve first comes to the goal, which it does; None where it began there."""
    reached = next(n for n, (_, value) in enumerate(way) if _gain(score, [value], [goal]) >= 0)
    if reached == 0:
        return None
    (before, worse), (after, value) = way[reached - 1], way[reached]
    return before + (after - before) * (goal - worse) / (value - worse)


def _line(
    name: str, same: Sequence[ComparedRun], goals: dict[str, list[float]], whole: float, dollars_per_second: float
) -> Line:
    first = next(iter(goals))
    points = len(same[0].curves[first])
    for point in range(points):
        reached = {score: _at(same, score, point) for score in goals}
        if not all(_gain(score, reached[score], goals[score]) >= 0 for score in goals):
            continue
        images, seconds = (mean(each.curves[first][point][axis] for each in same) for axis in (0, 1))
        share = images / same[0].curves[first][-1][0]
        teraflops = share * mean(each.figures[TERAFLOPS] for each in same)
        return Line(
            name,
            images,
            teraflops,
            teraflops / whole,
            seconds,
            seconds * dollars_per_second,
            all(
                _gain(score, reached[score], goals[score]) > max(_spread(reached[score]), _spread(goals[score]))
                for score in goals
            ),
        )
    return Line(name, None)


def _at(same: Sequence[ComparedRun], score: str, point: int) -> list[float]:
    """By seed."""
    return [each.curves[score][point][2] for each in same]


def _gain(score: str, ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How much better the mean is; 0 is as good."""
    difference = mean(ours) - mean(theirs)
    return -difference if better(score) == "lower" else difference


def _spread(values: Sequence[float]) -> float:
    """Infinite for one seed: nothing is clear then."""
    return stdev(values) if len(values) > 1 else float("inf")


def as_table(lines: Sequence[Line], by: Standard, prices: str) -> FurtherTable:
    """For the page. prices: whose they are, and where that is stated."""
    note = (
        f"Where each is first as good as {by.baseline} at its end, in {' and '.join(by.scores)}: means over seeds, at "
        f"the points that were scored. Dollars are processor seconds at {prices}."
    )
    return FurtherTable("Ledger", note, COLUMNS, [line.told for line in lines])


def ratios_as_table(ratios: Mapping[str, Mapping[str, float | None]], by: Standard) -> FurtherTable:
    """For the page."""
    note = (
        f"How many times as many images {by.baseline} takes to be as good, for the worse of both ends, by straight "
        "lines between the points that were scored. – is for one that was as good at its first point."
    )
    rows = [
        [name, *("–" if each is None else f"{each:.2f} ×" for each in own.values())] for name, own in ratios.items()
    ]
    return FurtherTable("Images for the same score", note, ("", *by.scores), rows)
