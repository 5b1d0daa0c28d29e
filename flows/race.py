"""A race: variants of one recipe on equal budgets and seeds, and how they compare on the way."""

from __future__ import annotations

from prefect import flow

from flows.racing import open_race


@flow(name="race", flow_run_name="{race}")
def race(
    race: str = "fashion_mnist",
    overrides: list[str] | None = None,
    root: str | None = None,
    seeds: list[int] | None = None,
) -> str:
    """Train and score all variants of a race, reusing whatever is there. Returns the URI of its artifact.

    Args:
        race: a race's name or a path to a YAML file (`configs/race.py`).
        overrides: `section.field=value` strings laid upon the recipe of every variant.
        root: where artifacts live, a folder or a bucket URL; None is this machine's default.
        seeds: instead of the race's own.
    """
    with open_race(race, overrides or [], root, seeds) as racing:
        racing.prepare()
        racing.train()
        racing.score()
        return racing.report().uri
