"""Pictures for people: grids of images and charts as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image as Picture

from tasks.data.pixels import Pixels
from tasks.drawing import charts

Curve = Sequence[Sequence[float]]
"""(images seen, value) points."""

_READABLE = 64
"""Side in pixels that small images are enlarged to in a grid."""


def grid(images_BHW3: Pixels, columns: int, gap: int = 2) -> Pixels:
    """Tile images row by row on white; small ones are enlarged by whole pixels to stay readable.

    Raises ValueError when there is nothing to show.
    """
    if len(images_BHW3) == 0:
        raise ValueError("a picture grid needs at least one image")
    scale = max(1, _READABLE // images_BHW3.shape[1])
    images = images_BHW3.repeat(scale, axis=1).repeat(scale, axis=2)
    rows = -(-len(images) // columns)
    _, height, width, _ = images.shape
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for position, image in enumerate(images):
        row, column = divmod(position, columns)
        top, left = row * (height + gap), column * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def png(pixels_HW3: Pixels) -> bytes:
    """uint8 (H, W, 3) as a PNG file."""
    buffer = io.BytesIO()
    Picture.fromarray(pixels_HW3).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def curves_chart(stages: Mapping[str, Mapping[str, Curve]]) -> bytes | None:
    """One panel per stage with its loss curves over images seen, as a transparent PNG; None without curves.

    Panels are logarithmic where all values are positive and span more than a decade.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    shown = {stage: curves for stage, curves in stages.items() if any(len(curve) for curve in curves.values())}
    if not shown:
        return None
    figure = Figure(figsize=(4.6 * len(shown), 3.3), dpi=144, layout="constrained")
    for axes, (stage, curves) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        _panel(axes, stage, curves)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return buffer.getvalue()


def _panel(axes: Any, title: str, curves: Mapping[str, Curve]) -> None:
    values: list[float] = []
    for number, (name, curve) in enumerate(curves.items()):
        if not len(curve):
            continue
        images, losses = np.asarray(curve, dtype=np.float64).T
        axes.plot(images, losses, label=name, color=charts.COLOURS[number % len(charts.COLOURS)], linewidth=1.6)
        values += [value for value in losses.tolist() if np.isfinite(value)]
    if values and min(values) > 0 and max(values) / min(values) > 10:
        axes.set_yscale("log")
    charts.dress(axes, title, "images seen")
