"""LowDiff: the same DAG with a cascade, one network that learns and samples several resolutions, coarse to fine."""

from __future__ import annotations

from prefect import flow

from configs import UserError
from flows.run import open_run
from flows.sfd_full import dag
from flows.stages import STAGES, StageName
from flows.titles import title


@flow(name="lowdiff-full", flow_run_name=title)
def lowdiff_full(
    recipe: str = "lowdiff_demo",
    overrides: list[str] | None = None,
    root: str | None = None,
    start: StageName | None = None,
    only: StageName | None = None,
    force: list[StageName] | None = None,
) -> str:
    """Run the whole DAG of a recipe with `train_dit.cascade`: `encode` stores the statistics of every resolution,
    `train_dit` draws one for each batch, `sample` goes through them. Returns the report's URI.

    Arguments as `sfd_full`'s. Raises UserError where the recipe has no cascade.
    """
    with open_run("lowdiff-full", STAGES, recipe, overrides or [], root, start, only, force or []) as run:
        if run.recipe.train_dit.cascade is None:
            raise UserError(f"recipe {recipe} has no train_dit.cascade: add one, or run it as sfd-full")
        return dag(run)
