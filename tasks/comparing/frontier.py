"""The frontier of a sweep: which settings nothing beats at their cost, and which one to use.

Cost is what an image takes in passes of the network at full resolution (`effective_evaluations`, papers.md 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.comparing.comparison import ComparedRun, better

COST = "effective_evaluations"
DECIDING = ("fid", "frechet", "class_consistency")
"""Beginnings of the names of scores that decide: how far the set is from real images, and whether labels are kept."""


@dataclass(frozen=True)
class Frontier:
    """undominated: per score, names of the settings that no other equals or beats for less, cheapest first.
    chosen: the cheapest setting that is as good as the best one; None where no interval says what that means.
    why: a sentence for people.
    """

    undominated: Mapping[str, Sequence[str]]
    chosen: str | None
    why: str


def frontier(runs: Sequence[ComparedRun], scores: Sequence[str]) -> Frontier:
    """Of settings of one model, each with its cost among its `figures`.

    A setting is as good as the best one in a score where its value lies inside the interval of the best one's, which
    is at 95 % over images; our choice. All deciding scores must be so at once.
    """
    found = {score: _undominated(runs, score) for score in scores}
    deciding = [score for score in scores if score.startswith(DECIDING)]
    best = {score: min(runs, key=lambda each: _worse(each, score)) for score in deciding}
    bounds = {score: run.intervals[score] for score, run in best.items() if score in run.intervals}
    if not bounds or len(bounds) < len(deciding):
        return Frontier(found, None, "No setting is named: set evaluate.bootstrap to know which scores are alike.")
    alike = [each for each in runs if all(_within(each, score, bounds[score]) for score in deciding)]
    if not alike:
        named = " and ".join(f"{run.name} in {score}" for score, run in best.items())
        return Frontier(found, None, f"No setting is as good as the best in every score: {named}.")
    chosen = min(alike, key=lambda each: (each.figures[COST], _worse(each, deciding[0])))
    values = ", ".join(f"{score} {chosen.scores[score]:.4g}" for score in deciding)
    return Frontier(
        found,
        chosen.name,
        f"Use {chosen.name}: the cheapest, at {chosen.figures[COST]:.3g} evaluations an image, whose scores lie "
        f"within the intervals of the best ({values}).",
    )


def _worse(run: ComparedRun, score: str) -> float:
    """A number that falls as the score gets better."""
    return run.scores[score] * (1 if better(score) == "lower" else -1)


def _within(run: ComparedRun, score: str, interval: Sequence[float]) -> bool:
    """Inside, or beyond on the good side."""
    low, high = interval
    return run.scores[score] <= high if better(score) == "lower" else run.scores[score] >= low


def _undominated(runs: Sequence[ComparedRun], score: str) -> list[str]:
    found: list[str] = []
    least = float("inf")
    for run in sorted(runs, key=lambda each: (each.figures[COST], _worse(each, score))):
        if _worse(run, score) < least:
            found.append(run.name)
            least = _worse(run, score)
    return found
