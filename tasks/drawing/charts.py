"""Charts as transparent PNG bytes that read on light and on dark paper."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

INK = "#7c8594"
"""A grey that reads on light and on dark paper: charts have no background of their own."""
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d31", "#84cc16")
_DOTS_PER_INCH = 144
_COLUMNS = 2


@dataclass(frozen=True)
class Band:
    """A line with what lies around it: (N,) places, means, lowest and highest values."""

    places: Sequence[float]
    means: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


@dataclass(frozen=True)
class Panel:
    title: str
    bands: Mapping[str, Band]
    """By name in the legend; an empty name has none."""
    floor: float | None = None
    """A level to compare with."""
    points: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Single (place, value) points by name, drawn behind the bands and named where a band goes through them."""


def band(runs: Sequence[Sequence[tuple[float, float]]]) -> Band:
    """Of repeated runs, (place, value) points each: means of places and values of their first, second … points."""
    columns = list(zip(*runs, strict=False))
    places = [float(np.mean([place for place, _ in column])) for column in columns]
    values = [[value for _, value in column] for column in columns]
    return Band(places, [float(np.mean(v)) for v in values], [min(v) for v in values], [max(v) for v in values])


def spread_at(points: Sequence[tuple[float, float]]) -> Band:
    """Of (place, value) points, several at a place."""
    places = sorted({place for place, _ in points})
    values = [[value for other, value in points if other == place] for place in places]
    return Band(places, [float(np.mean(v)) for v in values], [min(v) for v in values], [max(v) for v in values])


def lines(panels: Sequence[Panel], axis: str) -> bytes:
    """Panels over the same axis, two in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), dpi=_DOTS_PER_INCH, layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.remove()
    for axes, panel in zip(places, panels, strict=False):
        if panel.points:
            axes.scatter(*zip(*panel.points.values(), strict=True), s=14, color=INK, alpha=0.6, linewidth=0)
        marked = {place for found in panel.bands.values() for place in zip(found.places, found.means, strict=True)}
        for name, place in panel.points.items():
            if place in marked:
                axes.annotate(name, place, textcoords="offset points", xytext=(4, 4), fontsize=6, color=INK)
        for number, (name, found) in enumerate(panel.bands.items()):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(found.places, found.means, marker="o", markersize=3, color=colour, linewidth=1.6, label=name)
            axes.fill_between(found.places, found.lows, found.highs, color=colour, alpha=0.15, linewidth=0)
        if panel.floor is not None:
            axes.axhline(panel.floor, color=INK, linewidth=1, linestyle=":", label="real images")
        dress(axes, panel.title, axis)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return buffer.getvalue()


def dress(axes: Any, title: str, axis: str) -> None:
    """Title, labels, grid and legend in the one ink."""
    axes.set_title(title, color=INK, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(axis, color=INK, fontsize=9)
    axes.tick_params(colors=INK, which="both", labelsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
    axes.grid(alpha=0.25, color=INK, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    if any(not label.startswith("_") for label in axes.get_legend_handles_labels()[1]):
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)


def short_count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
