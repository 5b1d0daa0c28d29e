"""Tokenizers by themselves: from labelled images to a trained and scored autoencoder and Semantic VAE."""

from __future__ import annotations

from prefect import flow

from flows.run import open_run
from flows.titles import title
from tasks.evaluate_tokenizer import STAGE as evaluate_tokenizer
from tasks.shard import STAGE as shard
from tasks.train_semvae import STAGE as train_semvae
from tasks.train_vavae import STAGE as train_vavae

STAGES = (shard, train_vavae, train_semvae, evaluate_tokenizer)


@flow(name="tokenizer-eval", flow_run_name=title)
def tokenizer_eval(
    recipe: str = "demo",
    overrides: list[str] | None = None,
    root: str | None = None,
    start: str | None = None,
    only: str | None = None,
    force: list[str] | None = None,
) -> str:
    """Train the recipe's tokenizers, or take what is there, and score them. Returns the scores' URI.

    Args:
        recipe: a recipe's name or a path to a YAML file.
        overrides: `section.field=value` strings laid upon the recipe.
        root: where artifacts live, a folder or a bucket URL; None is this machine's default.
        start: take everything before this stage as it is, and redo it and all that follows.
        only: run just this stage; its inputs must be complete.
        force: redo these stages even where their artifacts are complete.
    """
    with open_run("tokenizer-eval", STAGES, recipe, overrides or [], root, start, only, force or []) as run:
        shards = run(shard)
        tokenizer = run(train_vavae, shards)
        semantics = run(train_semvae, shards)
        return run(evaluate_tokenizer, shards, tokenizer, semantics).uri
