"""A race: variants of one recipe that train on equal budgets and seeds, and are scored alike on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs.errors import UserError
from configs.load import checked, load_recipe, resolve
from configs.recipe import Recipe
from configs.section import Added, Positive, Section, Seed

RACES = Path(__file__).parent / "races"
_SECOND_WIDTH = 0.5
"""Snapshots come in two widths; the narrower one is this share of the wider one."""


class Sweep(Section):
    """Variants that differ in one number, drawn once more over it."""

    label: str
    values: dict[str, float]
    """By variant."""


class Ledger(Section):
    """What each variant takes to be as good as one of them is at its end, on the race's page."""

    baseline: str
    """A variant."""
    cluster: str = "aws"
    """Whose processors give processor seconds their price: a name, or a path to a YAML file."""


class Race(Section):
    """Everything but the recipe's own fields is about the race; what variants share is made once."""

    name: str
    title: str = ""
    recipe: str
    """The recipe that all start from: a name, or a path to a YAML file."""
    common: dict[str, Any] = Field(default_factory=dict)
    """Laid upon it for all variants; `train_dit.images` is the budget, `sample` and `evaluate` say how it is scored."""
    variants: dict[str, dict[str, Any]]
    """What each one lays upon that, in the order of the table."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Of `train_dit`; every variant trains once with each."""
    points: Positive = 4
    """Moments of the training, evenly apart, at which it is scored."""
    average: Annotated[float, Field(gt=0.0, lt=0.288)] = 0.1
    """Relative width of the power-profile average of weights that is scored (Karras et al. 2024)."""
    clock: Literal["seconds", "processor_seconds"] = "seconds"
    """Of the chart over time: wall clock, or processor time, which other work on the same machine disturbs less."""
    sweep: Sweep | None = None
    ledger: Annotated[Ledger | None, Added(before=None)] = None

    @model_validator(mode="after")
    def _somebody_runs(self) -> Race:
        if not self.variants or not self.seeds:
            raise ValueError("a race needs at least one of variants and one of seeds")
        strangers = [name for name in (self.sweep.values if self.sweep else {}) if name not in self.variants]
        if strangers:
            raise ValueError(f"sweep.values names {strangers[0]}; there are {', '.join(self.variants)}")
        if self.ledger is not None and self.ledger.baseline not in self.variants:
            raise ValueError(f"ledger.baseline is {self.ledger.baseline}; there are {', '.join(self.variants)}")
        if self.ledger is not None and self.clock != "processor_seconds":
            raise ValueError("a ledger counts processor seconds: set clock to processor_seconds, or leave ledger out")
        return self

    def entry(self, variant: str, seed: int, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe of one variant with one seed; snapshots of its weights are stored at the race's points.

        Raises UserError where it is impossible.
        """
        plain = load_recipe(self.recipe, overrides, [self.common, self.variants[variant]], self._origin(variant))
        plain.require(("train_dit", "sample", "evaluate"), f"race {self.name}")
        if plain.tune_fewstep is not None:
            raise UserError(
                f"{self._origin(variant)}: tune_fewstep is set, but a race scores what train_dit makes: leave it out"
            )
        images, batch = plain.train_dit.images, plain.train_dit.batch
        if images % (self.points * batch):
            whole = self.points * batch
            raise UserError(
                f"{self._origin(variant)}: train_dit.images {images} is not a multiple of {whole}, points "
                f"{self.points} × train_dit.batch {batch}: use {max(1, round(images / whole)) * whole}"
            )
        stored = {
            "seed": seed,
            "ema_sigmas": [self.average * _SECOND_WIDTH, self.average],
            "snapshot_every": images // self.points,
        }
        layers = [self.common, self.variants[variant], {"name": f"{self.name} {variant}", "train_dit": stored}]
        return load_recipe(self.recipe, overrides, layers, self._origin(variant))

    def _origin(self, variant: str) -> str:
        return f"race {self.name}, variant {variant}"


def race_names() -> list[str]:
    """Names of the races that come with the project."""
    return sorted(path.stem for path in RACES.glob("*.yaml"))


def load_race(name: str) -> Race:
    """A race that comes with the project, or a path to a YAML file; it may extend another one.

    Raises:
        UserError: no such race, or a field that is unknown, of a wrong type or impossible.
    """
    values = resolve("race", RACES, name)
    return checked(Race, values, f"race {name}")
