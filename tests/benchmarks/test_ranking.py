"""How scores rank tokenizers: the correlation, its signs, what is written, and the experiment at its smallest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.tokenizers import ranking
from benchmarks.tokenizers.correlations import SCORES, agreement, page, picture, ranks, spearman
from benchmarks.tokenizers.kept import alone, write_between_marks


def rows(count: int = 4) -> list[dict[str, object]]:
    """Tokenizers of which each is better than the last by every score, and whose diffusion models are too."""
    found = []
    for number in range(count):
        scores = {score: float(sign * number) for score, (_, sign) in SCORES.items()}
        distances = [100.0 - 10 * number, 101.0 - 10 * number]
        found.append({"name": f"t{number}", **scores, "frechet": distances, "consistency": [0.1 * number] * 2})
    return found


def test_ranks_and_correlation_are_scipys_with_ties_too() -> None:
    assert ranks([3.0, 1.0, 1.0, 7.0]).tolist() == [3.0, 1.5, 1.5, 4.0]
    random = np.random.default_rng(0)
    for _ in range(20):
        one, other = random.integers(0, 5, 8).tolist(), random.normal(size=8).tolist()
        assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert np.isnan(spearman([1.0, 1.0], [1.0, 2.0]))


def test_a_score_that_ranks_as_diffusion_does_has_a_correlation_of_one_whatever_its_sign() -> None:
    good = page(rows())
    lines = [line for line in good.splitlines() if line.startswith(tuple(f"| {name} |" for name, _ in SCORES.values()))]
    assert len(lines) == len(SCORES) and all(line.count("+1.00") == 4 for line in lines), good
    assert agreement(rows(), "frechet") == pytest.approx(1.0)
    turned = rows()
    for row in turned:
        row["interpolation_frechet"] = -row["interpolation_frechet"]  # type: ignore[operator]
    assert "| interpolation Fréchet | -1.00 | -1.00, -1.00 | -1.00 |" in page(turned)
    assert picture(rows()).startswith(b"\x89PNG")


def test_figures_are_put_between_their_own_marks(tmp_path: Path) -> None:
    page_ = tmp_path / "page.md"
    marks = "<!-- figures of one -->\nold\n<!-- end of figures -->\n"
    page_.write_text(f"before\n{marks}between\n{marks.replace('one', 'one.two')}after\n")
    write_between_marks(page_, "one.two", "new\n")
    assert page_.read_text() == (
        f"before\n{marks}between\n<!-- figures of one.two -->\n\nnew\n\n<!-- end of figures -->\nafter\n"
    )


@pytest.mark.slow
def test_one_tokenizer_is_scored_and_trained_on_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("train_vavae.images=320", "train_dit.images=320", "sample.images=100", "sample.steps=2")
    monkeypatch.setattr(ranking, "BUDGET", (*ranking.BUDGET, *few))
    with alone():
        row = ranking.Ranking(tmp_path, seeds=2).row("8 channels")
        said = capsys.readouterr().out
        again = ranking.Ranking(tmp_path, seeds=2).row("8 channels")
    assert again == row and "train_dit" in said and "train_dit" not in capsys.readouterr().out
    assert {*SCORES, "name", "frechet", "consistency"} <= row.keys()
    assert len(row["frechet"]) == 2 and row["frechet"][0] != row["frechet"][1]
    assert row["interpolation_frechet"] > 0 and 0 <= min(row["consistency"]) <= 1
