"""Races: what an entry's recipe is, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import UserError
from configs.race import load_race, race_names
from flows.race import entries_of

SMALL = """
recipe: demo_tiny
common: {train_dit: {images: 320, batch: 32}}
variants:
  first: {}
  later: {train_dit: {clock: {kind: semantic_first, delta: 0.1}}}
seeds: [4, 7]
points: 2
"""


def written(folder: Path, text: str = SMALL, **changes: str) -> str:
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    (folder / "small.yaml").write_text(text)
    return str(folder / "small.yaml")


@pytest.mark.parametrize("name", race_names())
def test_every_race_that_comes_with_the_project_can_be_run(name: str) -> None:
    race, entries = entries_of(name, [], None)
    assert len(entries) == len(race.variants) * len(race.seeds)


def test_entries_differ_in_what_their_variant_and_seed_say(tmp_path: Path) -> None:
    race, entries = entries_of(written(tmp_path), ["sample.steps=3"], None)
    assert [(e.variant, e.seed) for e in entries] == [("first", 4), ("later", 4), ("first", 7), ("later", 7)]
    for entry in entries:
        dit = entry.recipe.train_dit
        assert (dit.seed, dit.images, dit.snapshot_every) == (entry.seed, 320, 160)
        assert race.average in dit.ema_sigmas and entry.recipe.sample.steps == 3
        assert dit.clock.delta == (0.1 if entry.variant == "later" else 0.3)  # type: ignore[union-attr]
    shared = [entry.recipe.model_dump(exclude={"name", "train_dit"}) for entry in entries]
    assert all(each == shared[0] for each in shared)


def test_other_seeds_can_be_asked_for(tmp_path: Path) -> None:
    race, entries = entries_of(written(tmp_path), [], [9])
    assert race.seeds == (9,) and [entry.seed for entry in entries] == [9, 9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("points: 2", "points: 3"), r"train_dit\.images 320 is not a multiple of 96, points 3 × train_dit\.batch 32"),
        (("delta: 0.1", "delay: 0.1"), "race small, variant later: .*delay"),
        (("points: 2", "pints: 2"), "race .*small.*: pints: "),
        (("seeds: [4, 7]", "seeds: []"), "at least one of variants and one of seeds"),
        (("points: 2", "sweep: {label: x, values: {third: 1.0}}"), "third; there are first, later"),
        (("points: 2", "points: 2\nledger: {baseline: third}"), "ledger.baseline is third; there are first, later"),
        (("points: 2", "points: 2\nledger: {baseline: first}"), "counts processor seconds: set clock to"),
        (
            ("points: 2", "points: 2\nclock: processor_seconds\nledger: {baseline: first, cluster: moon}"),
            "no cluster .moon.",
        ),
        (("first: {}", "first: {evaluate: {images: 20}}"), "evaluate of variant later is not that of first"),
        (("first: {}", "first: {sample: {images: 20}}"), r"sample\.images of variant later is not that of first"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        entries_of(written(tmp_path, change=change), [], None)


def test_a_race_extends_another(tmp_path: Path) -> None:
    base = written(tmp_path)
    (tmp_path / "longer.yaml").write_text(f"extends: {base}\ncommon: {{train_dit: {{images: 640}}}}\nseeds: [1]\n")
    race, entries = entries_of(str(tmp_path / "longer.yaml"), [], None)
    assert race.name == "longer" and [(e.variant, e.seed) for e in entries] == [("first", 1), ("later", 1)]
    assert {(e.recipe.train_dit.images, e.recipe.train_dit.batch) for e in entries} == {(640, 32)}
    (tmp_path / "loop.yaml").write_text(f"extends: {tmp_path / 'loop.yaml'}\n")
    with pytest.raises(UserError, match="extends itself"):
        load_race(str(tmp_path / "loop.yaml"))


def test_an_unknown_race_is_refused_with_what_there_is() -> None:
    with pytest.raises(UserError, match=r"did you mean fashion_mnist\?"):
        load_race("fashion_mnits")
