"""Pixels: the published rounding, grids that keep every pixel, charts that open."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from tasks.data.pixels import to_pixels, to_tensor
from tasks.drawing.pictures import curves_chart, grid, png


def test_values_are_clamped_and_truncated_as_published() -> None:
    values = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 0.99, 1.0, 2.0]).view(1, 1, 1, 8).expand(1, 3, 1, 8)
    expected = [0, 0, 0, 128, 191, 254, 255, 255]
    assert to_pixels(values)[0, 0, :, 0].tolist() == expected


def test_pixels_survive_the_way_to_a_tensor_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    tensor = to_tensor(levels)
    assert tensor.shape == (1, 3, 16, 16) and tensor.min() == -1 and tensor.max() == 1
    assert np.abs(to_pixels(tensor).astype(int) - levels).max() <= 1


def test_grid_keeps_order_and_enlarges_small_images() -> None:
    images = np.zeros((3, 16, 16, 3), np.uint8)
    images[:] = np.array([10, 20, 30], np.uint8).reshape(3, 1, 1, 1)
    sheet = grid(images, columns=2)
    assert sheet.shape == (2 * 64 + 2, 2 * 64 + 2, 3)
    assert [sheet[0, 0, 0], sheet[0, 66, 0], sheet[66, 0, 0], sheet[66, 66, 0]] == [10, 20, 30, 255]
    assert np.array_equal(np.asarray(Picture.open(io.BytesIO(png(sheet)))), sheet)
    assert grid(np.zeros((1, 300, 300, 3), np.uint8), columns=5).shape == (300, 5 * 302 - 2, 3)
    with pytest.raises(ValueError, match="at least one image"):
        grid(images[:0], columns=2)


def test_chart_has_a_panel_per_stage_with_curves() -> None:
    curve = [[float(step), 1.0 / (step + 1)] for step in range(50)]
    one = Picture.open(io.BytesIO(curves_chart({"a": {"total": curve}, "b": {}}) or b""))
    two = Picture.open(io.BytesIO(curves_chart({"a": {"total": curve}, "b": {"total": curve, "none": []}}) or b""))
    assert two.width == 2 * one.width and two.mode == "RGBA"
    assert np.asarray(one)[0, 0, 3] == 0, "no background of its own"
    assert curves_chart({"a": {}}) is None
