"""A small `encode` and what it needs: real shards, and networks with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import torch
from safetensors.torch import save

from configs import Recipe
from infra.artifacts import Artifact
from tasks import encode, shard
from tasks.encoder import Encoder
from tasks.networks import WEIGHTS, build_autoencoder, build_semantic_vae
from tests.helpers.builders import context, put, put_weights
from tests.helpers.piles import folder_of_classes, folder_recipe, run_stage

SMALL = (
    "data.classes=2", "shard.rows_per_shard=10", "shard.limit=null", "shard.test_share=0.2", "encode.rows_per_group=4",
    "compute.actors.actors=2", "compute.actors.batch=8", "image.flips=true",
    "foundation.input_size=32", "foundation.layer=2", "foundation.feature_dim=40",  # 8 px stride: a 4 × 4 grid
)  # fmt: skip


def encode_recipe(folder: Path, images: int, *overrides: str) -> Recipe:
    """For a pile of so many images of two classes below `folder`."""
    pile = folder_of_classes(folder / "pile", {"a": images // 2, "b": images // 2})
    return folder_recipe(pile, *SMALL, f"foundation.weights={random_foundation(folder)}", *overrides)


def encode_inputs(root: str, recipe: Recipe) -> list[Artifact]:
    """Real shards and tokenizers with random weights."""
    return [run_stage(shard.STAGE, recipe, root), *put_tokenizers(root, recipe)]


def put_tokenizers(root: str, recipe: Recipe) -> list[Artifact]:
    """The autoencoder and the Semantic VAE with random weights."""
    assert recipe.train_semvae is not None and recipe.foundation is not None
    torch.manual_seed(0)
    networks = {
        "train_vavae": build_autoencoder(recipe.train_vavae.model),
        "train_semvae": build_semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim),
    }
    return [put_weights(root, recipe, stage, {WEIGHTS: network}) for stage, network in networks.items()]


def random_foundation(folder: Path) -> str:
    """Random weights of the demo's foundation model in a file, so that everybody has the same."""
    import timm

    torch.manual_seed(1)
    path = folder / "lite0.safetensors"
    path.write_bytes(save(timm.create_model("tf_efficientnet_lite0").state_dict()))
    return str(path)


def put_encoded(root: str, recipe: Recipe, name: str = "encode") -> Artifact:
    """What the real encoder makes in this process of the shards and tokenizers named after their stages."""
    stages = [stage for stage in ("shard", "train_vavae", "train_semvae") if Artifact(root, stage, stage).is_complete()]
    job = replace(context(root, recipe, encode.STAGE, *stages).job, fingerprint=name)
    encoder, shards, receipts = Encoder(job), Artifact(root, "shard", "shard"), []
    for entry in shards.files(suffix=".parquet"):
        one = pa.table({"part": [entry.path], "made_from": [entry.sha256]})
        row = encode.decode_part(one, shards, recipe.image.size)
        receipts.append(encoder.write_part({column: row[column][0] for column in row.column_names}))
    facts = shards.manifest.facts
    outcome = encode._outcome(recipe, receipts, facts["classes"], facts["splits"])
    inputs = {stage: stage for stage in stages}
    return put(root, recipe, "encode", outcome.files, name, inputs, facts=outcome.facts)
