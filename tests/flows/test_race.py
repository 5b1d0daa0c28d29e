"""A race from the command line: what is shared is made once; a second call makes nothing but the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.flows.conftest import Workplace

RACE = """
title: Who leads
recipe: demo_tiny
common:
  train_dit: {images: 128, batch: 32, schedule: constant, ema_decay: null}
  sample: {guidance: {method: none}}
  evaluate: {bootstrap: 0}
  compute: {train: {workers: 1, engine: plain, log_every: 32}}
variants:
  semantic_first: {}
  together: {train_dit: {clock: {kind: semantic_first, delta: 0.0}}}
seeds: [0, 1]
points: 2
sweep: {label: delta, values: {semantic_first: 0.3, together: 0.0}}
"""


def manifest(workplace: Workplace, stage: str) -> dict[str, object]:
    (path,) = Path(workplace.root).glob(f"{stage}/*/manifest.json")
    found: dict[str, object] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def raced(finished: Workplace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, str, str]:
    """The workplace after a race; with what it printed, and the race's file."""
    file = tmp_path_factory.mktemp("race") / "small.yaml"
    file.write_text(RACE)
    done = finished.flows("race", str(file), "--root", finished.root)
    return finished, done.stdout, str(file)


def test_a_race_shares_what_is_there_and_scores_every_entry_at_every_point(raced: tuple[Workplace, str, str]) -> None:
    workplace, printed, _ = raced
    made = workplace.manifests()
    for stage in ("shard", "train_vavae", "train_semvae", "encode", "judge", "reference"):
        assert len(made[stage]) == 1, f"{stage} was made once, for the pipeline and for the race"
    assert len(made["trial"]) == 2 * 2 * 2 and len(made["train_dit"]) == 1 + 2 * 2
    found = manifest(workplace, "race")
    names = {entry["path"] for entry in found["files"]}  # type: ignore[attr-defined]
    assert names == {"race.html", "scores.csv", "by_images.png", "by_seconds.png", "sweep.png"}
    assert {"semantic_first/class_consistency", "together/class_consistency"} <= found["scores"].keys()  # type: ignore[attr-defined]
    (page,) = Path(workplace.root).glob("race/*/race.html")
    assert "Who leads" in page.read_text() and str(page) in printed.replace("file://", "")


def test_a_race_again_trains_and_samples_nothing(raced: tuple[Workplace, str, str]) -> None:
    workplace, _, file = raced
    before = workplace.manifests()
    workplace.flows("race", file, "--root", workplace.root, "--seeds", "0")
    assert workplace.rebuilt_since(before) == {"race"}, "fewer seeds are another page of the same trials"
