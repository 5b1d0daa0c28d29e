"""Standings: means and spread over seeds, charts that can be opened, one page without outside references."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image as Picture

from tasks.comparing.comparison import (
    Axis,
    ComparedRun,
    as_csv,
    better,
    chosen_scores,
    draw,
    interpolated,
    page,
    score_columns,
    table,
)
from tasks.drawing.pictures import png

FRECHET, CONSISTENCY = "frechet_efficientnet_lite0", "class_consistency"
SHEET = png(np.full((8, 8, 3), 200, np.uint8))


def entry(name: str, seed: int, frechet: float, consistency: float = 0.5, **others: float) -> ComparedRun:
    curve = [(100.0, 1.0, frechet + 5), (200.0, 2.5, frechet)]
    scores = {FRECHET: frechet, CONSISTENCY: consistency, **others}
    return ComparedRun(name, scores, seed, {FRECHET: curve}, {"images_per_second": 80.0}, sheet=SHEET)


FOUND = [entry("plain", 0, 10.0), entry("better", 0, 6.0), entry("plain", 1, 14.0), entry("better", 1, 7.0, extra=1.0)]


def test_a_cell_is_the_mean_and_spread_over_seeds() -> None:
    cells = table(FOUND, [FRECHET, "images_per_second"])
    assert list(cells) == ["plain", "better"]
    assert cells["plain"][FRECHET].values == (10.0, 14.0)
    assert str(cells["plain"][FRECHET]) == "12 ± 2.8" and str(cells["plain"]["images_per_second"]) == "80 ± 0"
    single = ComparedRun("one", {FRECHET: 3.0}, intervals={FRECHET: (2.5, 3.5)})
    assert str(table([single], [FRECHET])["one"][FRECHET]) == "3 (2.5 to 3.5)"


def test_only_scores_that_all_have_are_columns() -> None:
    assert score_columns(FOUND) == [FRECHET, CONSISTENCY]
    assert chosen_scores([FRECHET, "fid", "other"], "efficientnet_lite0") == ["fid", FRECHET]
    assert chosen_scores(["a", "b"], "efficientnet_lite0") == ["a", "b"]


@pytest.mark.parametrize(
    ("score", "direction"),
    [("fid", "lower"), ("kid", "lower"), (FRECHET, "lower"), (f"reconstruction_{FRECHET}", "lower"),
     (CONSISTENCY, "higher"), ("inception_score", "higher"), ("precision_x", "higher")],
)  # fmt: skip
def test_scores_know_which_way_is_better(score: str, direction: str) -> None:
    assert better(score) == direction


def test_charts_of_curves_and_of_a_sweep() -> None:
    axis = Axis("delta", {"plain": (0.0, ""), "better": (0.3, "")})
    charts = draw(FOUND, [FRECHET, CONSISTENCY], {FRECHET: 2.0}, axis=axis)
    assert list(charts) == ["by_images.png", "by_seconds.png", "sweep.png"]
    for name, data in charts.items():
        picture = Picture.open(io.BytesIO(data)).convert("RGBA")
        assert np.asarray(picture)[..., 3].any(), name
    assert draw([ComparedRun("one", {"a": 1.0})], ["a"], {}) == {}
    untimed = ComparedRun("one", {"a": 1.0}, curves={"a": [(100.0, 0.0, 2.0), (200.0, 0.0, 1.0)]})
    assert list(draw([untimed], ["a"], {})) == ["by_images.png"]


def test_the_page_names_every_entry_marks_the_best_and_is_of_one_piece() -> None:
    text = page("A race", "Two.", FOUND, [FRECHET, CONSISTENCY, "images_per_second"], {}, {FRECHET: 2.0}, {}).decode()
    assert text.count('number best">6.5 ± 0.71<') == 1 and "real images" in text
    assert "lower is better" in text and "higher is better" in text
    assert 'src="http' not in text and "href=" not in text and text.count("data:image/png") == 2


def test_the_page_says_what_the_papers_have() -> None:
    told = [replace(each, published={FRECHET: 1.25}) for each in FOUND[:1]] + list(FOUND[1:])
    text = page("A race", "Two.", told, [FRECHET, CONSISTENCY], {}, {}, {}).decode()
    assert text.count("published for ") == 1
    row = text.split(f"published for {FOUND[0].name}")[1].split("</tr>")[0]
    assert re.findall(r'number">([^<]+)<', row) == ["1.25", "–"]


def test_the_csv_has_every_point_and_every_result() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(FOUND).decode())))
    assert len(rows) == sum(2 + len(each.scores) for each in FOUND)
    assert {row["value"] for row in rows if row["score"] == FRECHET and row["images_seen"]} >= {"6.0", "11.0"}


def test_time_is_read_between_the_points_that_were_kept() -> None:
    assert interpolated([0, 50, 150, 200], [[100.0, 2.0], [200.0, 6.0]]) == [0.0, 1.0, 4.0, 6.0]
    assert interpolated([50], []) == [0.0]
