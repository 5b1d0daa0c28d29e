"""How scores of tokenizers rank them, beside how diffusion models do: tables and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.tokenizers.tables import spread, table
from tasks.drawing.charts import Band, Panel, lines

SCORES = {
    "psnr": ("PSNR, dB", 1),
    "reconstruction_frechet": ("reconstruction Fréchet", -1),
    "interpolation_frechet": ("interpolation Fréchet", -1),
    "latent_probe": ("probe, all cells", 1),
    "latent_pooled_probe": ("probe, mean cell", 1),
    "align_cosine": ("cosine to features", 1),
    "density_variation": ("density CV", -1),
    "density_entropy": ("density entropy", 1),
}
"""Names, and whether more of it should be better."""
SHOWN = ("reconstruction_frechet", "interpolation_frechet", "latent_probe", "density_variation")
Rows = Sequence[dict[str, Any]]


def ranks(values: Sequence[float]) -> np.ndarray:
    """1 for the least; equal values share the mean of theirs."""
    numbers = np.asarray(values, dtype=float)
    below = (numbers[:, None] > numbers).sum(axis=1)
    return below + ((numbers[:, None] == numbers).sum(axis=1) + 1) / 2


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation of two lists; nan where one has a single value."""
    first, second = (ranks(values) - (len(values) + 1) / 2 for values in (one, other))
    length = float(np.sqrt(np.square(first).sum() * np.square(second).sum()))
    return float(first @ second) / length if length else float("nan")


def means(rows: Rows, score: str) -> list[float]:
    """Over seeds."""
    return [float(np.mean(row[score])) for row in rows]


def agreement(rows: Rows, score: str) -> float:
    """Mean rank correlation of two seeds' diffusion models: what no score of a tokenizer can be expected to exceed."""
    seeds = range(len(rows[0][score]))
    pairs = [([row[score][a] for row in rows], [row[score][b] for row in rows]) for a, b in combinations(seeds, 2)]
    return float(np.mean([spearman(*pair) for pair in pairs])) if pairs else float("nan")


def page(rows: Rows) -> str:
    """The tokenizers, and the rank correlation of every score with what diffusion reached on them."""
    tokenizers = [["tokenizer", *(name for name, _ in SCORES.values()), "diffusion's Fréchet", "class consistency"]]
    for row in rows:
        figures = [spread([row[score]]) for score in SCORES]
        tokenizers.append([row["name"], *figures, spread(row["frechet"]), spread(row["consistency"])])
    found = [["score", "with diffusion's Fréchet distance", "by seed", "with class consistency"]]
    for score, (name, sign) in SCORES.items():
        values, seeds = [sign * row[score] for row in rows], range(len(rows[0]["frechet"]))
        by_seed = [spearman(values, [-row["frechet"][seed] for row in rows]) for seed in seeds]
        whole = spearman(values, [-value for value in means(rows, "frechet")])
        consistency = spearman(values, means(rows, "consistency"))
        found.append([name, f"{whole:+.2f}", ", ".join(f"{each:+.2f}" for each in by_seed), f"{consistency:+.2f}"])
    seeds_agree = [f"{agreement(rows, score):+.2f}" for score in ("frechet", "consistency")]
    found.append(["*one seed's models with another's*", seeds_agree[0], "", seeds_agree[1]])
    return f"{table(tokenizers)}\n\n{table(found)}\n"


def picture(rows: Rows) -> bytes:
    """Of each tokenizer the diffusion models' Fréchet distances over its scores, as PNG."""
    panels = []
    for number, score in enumerate(SHOWN):
        bands = {}
        for row in rows:
            distances, hidden = sorted(row["frechet"]), "_" * (number > 0)
            places = [row[score]] * len(distances)
            bands[hidden + row["name"]] = Band(places, distances, distances, distances)
        panels.append(Panel(f"diffusion's Fréchet over {SCORES[score][0]}", bands))
    return lines(panels, "of the tokenizer")
