"""A race from the command line: what is shared is made once; a second call makes nothing but the page."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from infra.artifacts import Artifact
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


@dataclass(frozen=True)
class Raced:
    """The workplace after a race."""

    workplace: Workplace
    file: str
    printed: str
    made: dict[str, set[str]]
    """Fingerprints of the artifacts that the race made, by stage."""


@pytest.fixture(scope="module")
def raced(finished: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Raced:
    file = tmp_path_factory.mktemp("race") / "small.yaml"
    file.write_text(RACE)
    before = finished.manifests()
    printed = finished.flows("race", str(file), "--root", finished.root).stdout
    made = {stage: prints.keys() - before.get(stage, {}).keys() for stage, prints in finished.manifests().items()}
    return Raced(finished, str(file), printed, {stage: prints for stage, prints in made.items() if prints})


@pytest.mark.slow  # trials, standings and trainings in an actor have tests of their own
def test_a_race_shares_what_is_there_and_scores_every_entry_at_every_point(raced: Raced) -> None:
    shared = {"shard", "train_vavae", "train_semvae", "encode", "judge", "reference"}
    assert not raced.made.keys() & shared, "they were there, from the pipeline"
    assert (len(raced.made["train_dit"]), len(raced.made["trial"])) == (2 * 2, 2 * 2 * 2)
    (name,) = raced.made["race"]
    race = Artifact(f"file://{raced.workplace.root}", "race", name)
    names = {entry.path for entry in race.files()}
    assert names == {"race.html", "scores.csv", "by_images.png", "by_seconds.png", "sweep.png"}
    assert {"semantic_first/class_consistency", "together/class_consistency"} <= race.manifest.scores.keys()
    assert "Who leads" in race.read("race.html").decode()
    assert f"{race.uri}/race.html".removeprefix("file://") in raced.printed.replace("file://", "")


@pytest.mark.slow
def test_a_race_again_trains_and_samples_nothing(raced: Raced) -> None:
    workplace = raced.workplace
    before = workplace.manifests()
    workplace.flows("race", raced.file, "--root", workplace.root, "--seeds", "0")
    assert workplace.rebuilt_since(before) == {"race"}, "fewer seeds are another page of the same trials"
