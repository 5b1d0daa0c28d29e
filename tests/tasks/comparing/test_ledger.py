"""The ledger of a race: where each name is first as good as the baseline at its end, and what that cost."""

from __future__ import annotations

import pytest

from tasks.comparing.comparison import ComparedRun, page
from tasks.comparing.ledger import TERAFLOPS, Line, Standard, as_table, image_ratios, ledger, ratios_as_table

FRECHET, CONSISTENCY = "frechet_efficientnet_lite0", "class_consistency"
BY = Standard("plain", (CONSISTENCY, FRECHET), dollars_per_second=0.5)


def run(name: str, seed: int, frechet: list[float], consistency: list[float], teraflops: float = 4.0) -> ComparedRun:
    """Scored at every hundred images, which take two seconds."""
    curves = {
        score: [(100.0 * n, 2.0 * n, value) for n, value in enumerate(values, start=1)]
        for score, values in ((FRECHET, frechet), (CONSISTENCY, consistency))
    }
    scores = {score: curve[-1][2] for score, curve in curves.items()}
    return ComparedRun(name, scores, seed, curves, {TERAFLOPS: teraflops})


PLAIN = [run("plain", seed, [9.0 + seed, 5.0 + seed, 5.0], [0.2, 0.4, 0.5 + seed / 10]) for seed in (0, 1)]


def test_both_scores_have_to_be_as_good() -> None:
    sooner = [run("sooner", seed, [4.0, 4.0, 4.0], [0.3, 0.7, 0.8], teraflops=3.0) for seed in (0, 1)]
    plain, line = ledger([*PLAIN, *sooner], BY)
    assert (plain.images, plain.of_baseline, plain.processor_seconds, plain.dollars) == (300.0, 1.0, 6.0, 3.0)
    assert not plain.clear, "it is as good as itself, and no better"
    assert line == Line("sooner", 200.0, 2.0, 0.5, 4.0, 2.0, clear=True)


def test_what_lies_within_the_spread_is_said_to() -> None:
    near = [run("near", seed, [4.9, 4.8, 4.7], [0.56, 0.57, 0.58]) for seed in (0, 1)]
    assert ledger([*PLAIN, *near], BY)[1] == Line("near", 100.0, 4.0 / 3, 1 / 3, 2.0, 1.0, clear=False)
    alone = [each for each in (*PLAIN, run("alone", 0, [0.0] * 3, [1.0] * 3)) if each.seed == 0]
    assert not ledger(alone, BY)[1].clear, "one seed has no spread"


def test_what_never_gets_there_has_no_price() -> None:
    never = [run("never", seed, [1.0, 1.0, 1.0], [0.1, 0.2, 0.3]) for seed in (0, 1)]
    found = ledger([*never, *PLAIN], BY)
    assert found[0] == Line("never", None)
    text = page("A race", "Two.", never, [FRECHET], {}, {}, {}, further=[as_table(found, BY, "a cent")]).decode()
    rows = text.split("<h2>Ledger</h2>")[1]
    assert "first as good as plain at its end" in rows and "at a cent" in rows
    assert '<th>never</th><td class="number">not reached</td>' in rows and "100%" in rows
    assert '<th></th><th class="number">images</th>' in rows, "heads stand over their numbers"


def test_how_many_times_as_many_images_the_baseline_takes() -> None:
    """By the baseline's means: 9.5, 5.5, 5.0 and 0.2, 0.4, 0.55."""
    sooner = [run("sooner", seed, [7.5, 6.5, 5.25], [0.1, 0.6, 0.7]) for seed in (0, 1)]
    at_once = [run("at once", seed, [1.0, 1.0, 1.0], [0.25, 0.3, 0.3]) for seed in (0, 1)]
    found = image_ratios([*PLAIN, *sooner, *at_once], BY)
    assert found["plain"] == {CONSISTENCY: 1.0, FRECHET: 1.0}
    # It comes to the baseline's 0.55 at 190 images, where the baseline takes 300; the baseline to its 5.25 at 250.
    assert found["sooner"] == {CONSISTENCY: pytest.approx(300 / 190), FRECHET: pytest.approx(250 / 300)}
    # Who knows since when it had 5.0; the baseline comes to its 0.3 at 150 images, where it took 200.
    assert found["at once"] == {CONSISTENCY: pytest.approx(150 / 200), FRECHET: None}
    table = ratios_as_table(found, BY)
    assert table.rows[1:] == [["sooner", "1.58 ×", "0.83 ×"], ["at once", "0.75 ×", "–"]]
    assert table.columns == ("", CONSISTENCY, FRECHET)


def test_a_baseline_that_nobody_has_and_a_score_without_a_curve_are_named() -> None:
    with pytest.raises(ValueError, match="no run is called other; there are plain"):
        ledger(PLAIN, Standard("other", (FRECHET,), 1.0))
    with pytest.raises(ValueError, match="plain has no curve of fid"):
        ledger(PLAIN, Standard("plain", ("fid",), 1.0))
