"""The stages of the DAG in order, and each as a flow (and so a deployment) of its own."""

from __future__ import annotations

from prefect import flow

from flows.run import open_run
from tasks.dag import StageName, stages_of
from tasks.stage import Stage

STAGES: tuple[Stage, ...] = stages_of("sfd-full")
shard, train_vavae, train_semvae, encode, train_dit, tune_fewstep, sample, evaluate, report = STAGES


@flow(name="stage", flow_run_name="{stage}/{recipe}")
def single_stage(
    stage: StageName,
    recipe: str = "demo",
    overrides: list[str] | None = None,
    root: str | None = None,
    force: bool = False,
) -> str:
    """Run one stage whose inputs are complete.

    Args:
        stage: its name.
        recipe: a recipe's name or a path to a YAML file.
        overrides: `section.field=value` strings laid upon the recipe.
        root: where artifacts live, a folder or a bucket URL; None is this machine's default.
        force: run it again even where its artifact is complete.
    """
    with open_run("stage", STAGES, recipe, overrides or [], root, only=stage, force=[stage] if force else []) as run:
        return run.all()
