"""The main job: from labelled images to a sampled and scored Semantic-First Diffusion model."""

from __future__ import annotations

from prefect import flow

from flows.run import Run, open_run
from flows.stages import (
    STAGES,
    StageName,
    encode,
    evaluate,
    report,
    sample,
    shard,
    train_dit,
    train_semvae,
    train_vavae,
    tune_fewstep,
)
from flows.titles import title


@flow(name="sfd-full", flow_run_name=title)
def sfd_full(
    recipe: str = "demo",
    overrides: list[str] | None = None,
    root: str | None = None,
    start: StageName | None = None,
    only: StageName | None = None,
    force: list[StageName] | None = None,
) -> str:
    """Run the whole DAG, reusing every stage whose inputs did not change. Returns the URI of the last
    artifact, the report.

    Args:
        recipe: a recipe's name or a path to a YAML file.
        overrides: `section.field=value` strings laid upon the recipe.
        root: where artifacts live, a folder or a bucket URL; None is this machine's default.
        start: take everything before this stage as it is, and redo it and all that follows.
        only: run just this stage; its inputs must be complete.
        force: redo these stages even where their artifacts are complete.
    """
    with open_run("sfd-full", STAGES, recipe, overrides or [], root, start, only, force or []) as run:
        return dag(run)


def dag(run: Run) -> str:
    """From images to a report; what a recipe does not have is left out. The URI of the last artifact made or reused.

    Where tokenizer, diffusion weights and their statistics are given, no latents are made, and where scores compare
    with none of the recipe's images either, no image is read.
    """
    shards = run(shard)
    tokenizer = run(train_vavae, shards)
    semantics = run(train_semvae, shards)
    latents = run(encode, shards, tokenizer, semantics)
    model = run(train_dit, latents)
    fewstep = run(tune_fewstep, model)
    images = run(sample, tokenizer, latents, model, fewstep)
    scores = run(evaluate, shards, tokenizer, images)
    run(report, shards, tokenizer, semantics, latents, model, fewstep, images, scores)
    return run.uri
