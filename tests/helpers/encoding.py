"""A small `encode` and what it needs: real shards, and networks with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save

from configs import Recipe
from infra.artifacts import Artifact
from infra.storage import Storage
from tasks import shard
from tasks.networks import WEIGHTS, build_autoencoder, build_semantic_vae
from tests.helpers.builders import put
from tests.helpers.piles import folder_of_classes, folder_recipe, run_stage

SMALL = (
    "data.classes=2", "shard.rows_per_shard=10", "shard.limit=null", "shard.test_share=0.2", "encode.rows_per_group=4",
    "compute.actors.actors=2", "compute.actors.batch=8", "image.flips=true",
    "foundation.input_size=32", "foundation.layer=2", "foundation.feature_dim=40",  # 8 px stride: a 4 × 4 grid
)  # fmt: skip


def encode_recipe(folder: Path, images: int, *overrides: str) -> Recipe:
    """For a pile of so many images of two classes below `folder`."""
    pile = folder_of_classes(folder / "pile", {"a": images // 2, "b": images // 2})
    return folder_recipe(pile, *SMALL, f"foundation.weights={_foundation(folder)}", *overrides)


def encode_inputs(root: str, recipe: Recipe) -> list[Artifact]:
    """Real shards and tokenizers with random weights."""
    assert recipe.train_semvae is not None and recipe.foundation is not None
    torch.manual_seed(0)
    networks = {
        "train_vavae": build_autoencoder(recipe.train_vavae.model),
        "train_semvae": build_semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim),
    }
    found = [run_stage(shard.STAGE, recipe, root)]
    for stage, network in networks.items():
        storage = Storage.at(root).child(stage, stage)
        found.append(put(root, recipe, stage, [storage.write_bytes(WEIGHTS, save(network.state_dict()))]))
    return found


def _foundation(folder: Path) -> str:
    """Random weights in a file, so that every actor has the same."""
    import timm

    torch.manual_seed(1)
    path = folder / "lite0.safetensors"
    path.write_bytes(save(timm.create_model("tf_efficientnet_lite0").state_dict()))
    return str(path)
