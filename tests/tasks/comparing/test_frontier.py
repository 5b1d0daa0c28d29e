"""Which settings of a sweep nothing beats at their cost, and which one is named."""

from __future__ import annotations

from tasks.comparing.comparison import ComparedRun
from tasks.comparing.frontier import COST, frontier

FRECHET = "frechet_efficientnet_lite0"
SCORES = (FRECHET, "class_consistency", "recall_efficientnet_lite0")


def run(name: str, cost: float, frechet: float, consistency: float, intervals: bool = True) -> ComparedRun:
    bounds = {FRECHET: (frechet - 20, frechet + 20), "class_consistency": (consistency - 0.02, consistency + 0.02)}
    scores = {FRECHET: frechet, "class_consistency": consistency, "recall_efficientnet_lite0": 0.2}
    return ComparedRun(name, scores, figures={COST: cost}, intervals=bounds if intervals else {})


RUNS = [
    run("euler 50", 50, 1000, 0.90),
    run("euler 10", 10, 1200, 0.91),
    run("unipc 10", 10, 1015, 0.89),
    run("unipc 5", 5, 1100, 0.80),
    run("heun 25", 50, 1005, 0.90),
]


def test_what_is_as_good_for_less_dominates() -> None:
    found = frontier(RUNS, SCORES).undominated
    assert found[FRECHET] == ["unipc 5", "unipc 10", "euler 50"]
    assert found["class_consistency"] == ["unipc 5", "euler 10"]
    assert found["recall_efficientnet_lite0"] == ["unipc 5"], "alike in all: the cheapest"


def test_the_cheapest_within_the_best_intervals_is_named() -> None:
    found = frontier(RUNS, SCORES)
    assert found.chosen == "unipc 10" and "10 evaluations" in found.why and "1015" in found.why


def test_none_is_named_without_intervals_or_where_none_is_good_in_all() -> None:
    alone = [run(each.name, each.figures[COST], each.scores[FRECHET], 0.9, intervals=False) for each in RUNS]
    assert frontier(alone, SCORES).chosen is None and "bootstrap" in frontier(alone, SCORES).why
    apart = [run("near", 10, 1000, 0.5), run("consistent", 20, 1300, 0.9)]
    assert frontier(apart, SCORES).chosen is None
    assert "near in frechet" in frontier(apart, SCORES).why
