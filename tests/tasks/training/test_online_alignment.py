"""Alignment targets made in training: of the very images that the latents were made of, and with the same losses."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs import Recipe, UserError, load_recipe
from configs.recipe import Recipe as AnyRecipe
from infra.artifacts import Artifact
from tasks import encode, train_dit
from tasks.data.crops import Crop
from tasks.data.tensors import FLIP
from tasks.loading import loader as loading
from tasks.loading.loader import IMAGE, Batch, Loader
from tasks.train_dit import Diffusion
from tasks.training.trainee import HELD_OUT_NUMBERS, pieces
from tests.helpers.builders import at, context, put, put_shard
from tests.helpers.encoding import put_encoded, put_tokenizers, random_foundation

CPU = torch.device("cpu")
SETTINGS = (
    "image.flips=true",
    "encode.rows_per_group=48",  # no multiple of the shards' 32
    "compute.actors.batch=25",
    "train_dit.model={hidden_size: 32, depth: 2, heads: 2, align_depth: 1}",
    "train_dit.foundation_precision=fp32",
    "train_dit.batch=16",
    "compute.train={workers: 1, cpus_per_worker: 2}",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, networks, and what the real encoder makes of them, targets stored."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("aligned")
    random_foundation(folder)
    recipe, root = recipe_of(folder), at(folder / "root")
    put_shard(root, recipe)
    put_tokenizers(root, recipe)
    put_encoded(root, recipe)
    return folder


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    weights = f"foundation.weights={folder / 'lite0.safetensors'}"
    return load_recipe("demo_tiny", [*SETTINGS, weights, *overrides])


def trainee(place: Path, align: str, *overrides: str) -> Diffusion:
    recipe = recipe_of(place, f"train_dit.objective.align={align}", *overrides)
    torch.manual_seed(0)
    return Diffusion(context(at(place / "root"), recipe, train_dit.STAGE, "encode"))


def batches(loader: Loader, count: int, cursor: int = 0, rank: int = 0, world: int = 1) -> list[Batch]:
    stream = loader.stream(cursor, rank, world)
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


def with_images(place: Path, keys: bool = True, split: str = "train") -> Loader:
    latents, shards = (Artifact(at(place / "root"), name, name) for name in ("encode", "shard"))
    options: dict[str, Any] = {"crop": Crop(32), "shards": shards, "flips": split == "train", "keys": keys}
    return Loader(latents, split, ["z", IMAGE], 16, 3, threads=2, **options)


@pytest.mark.parametrize("shuffled", [16_384, 64], ids=["one window", "many lanes"])
def test_the_image_is_the_one_of_the_row(place: Path, monkeypatch: pytest.MonkeyPatch, shuffled: int) -> None:
    """By name and by how it is turned, over two epochs."""
    monkeypatch.setattr(loading, "_SHUFFLED_LATENTS", shuffled)
    shards = Artifact(at(place / "root"), "shard", "shard")
    known: dict[str, np.ndarray] = {}
    for entry in shards.files("train/", ".parquet"):
        keys, _, pixels = encode.decoded(shards, entry.path, 32)
        known |= dict(zip(keys, pixels, strict=True))
    loader = with_images(place)
    assert loader.order.lanes == (1 if shuffled > 200 else 32)
    turned = 0
    for batch in batches(loader, 26):
        for position, key, pixels in zip(batch.positions, batch.keys, batch.arrays[IMAGE], strict=True):
            epoch, within = divmod(int(position), loader.rows)
            mirrored = loader.order.flips(epoch, np.array([within]))[0]
            turned += mirrored
            assert np.array_equal(pixels, known[key][:, ::-1] if mirrored else known[key]), key
    assert 100 < turned < 300, "of 416 rows"


def test_losses_and_gradients_are_those_of_stored_targets(place: Path) -> None:
    found = []
    for align in ("stored", "online"):
        made = trainee(place, align)
        (batch,) = batches(made.loader, 1)
        given = made.inputs(batch, CPU)
        torch.manual_seed(0)
        for parameter in made.network.parameters():
            torch.nn.init.normal_(parameter, std=0.1) if parameter.requires_grad else None
        terms = made.module(**given)
        terms["total"].backward()
        gradients = {name: p.grad for name, p in made.module.named_parameters() if p.grad is not None}
        found.append((given, terms, gradients))
    (stored, its_terms, its_gradients), (online, terms, gradients) = found
    assert stored.keys() == online.keys()
    for name in stored.keys() - {"align_target_BChw", "images_seen"}:
        assert torch.equal(torch.as_tensor(stored[name]), torch.as_tensor(online[name])), name
    torch.testing.assert_close(online["align_target_BChw"], stored["align_target_BChw"], rtol=1e-3, atol=1e-3)
    assert not torch.equal(online["align_target_BChw"], stored["align_target_BChw"]), "stored ones are rounded"
    assert its_terms["alignment"] > 0
    for name in ("total", "alignment", "velocity"):
        torch.testing.assert_close(terms[name], its_terms[name], rtol=1e-3, atol=1e-5)
    assert gradients.keys() == its_gradients.keys()
    for name, gradient in gradients.items():
        scale = float(its_gradients[name].abs().max())
        torch.testing.assert_close(gradient, its_gradients[name], rtol=2e-3, atol=2e-3 * scale, msg=name)


def test_nothing_depends_on_where_it_was_resumed_or_on_workers(place: Path) -> None:
    loader = with_images(place, keys=False)
    whole = batches(loader, 14)
    for later in (1, 9, 13):
        (resumed,) = batches(loader, 1, cursor=16 * later)
        assert np.array_equal(resumed.arrays[IMAGE], whole[later].arrays[IMAGE])
    halves = [batches(loader, 14, rank=rank, world=2) for rank in range(2)]
    for first, second, both in zip(*halves, whole, strict=True):
        joined = np.concatenate([first.arrays[IMAGE], second.arrays[IMAGE]])
        assert np.array_equal(joined, both.arrays[IMAGE])


def test_tokens_are_routed_by_image_and_the_last_ones_are_not(place: Path) -> None:
    routing = "train_dit.routing={first: 2, last: 2, drop: 0.75, dense_share: 0.5}"
    made = trainee(place, "stored", routing, "train_dit.images=64")
    cut = list(pieces(batches(made.loader, 1)[0], 8))
    whole = [made.inputs(batch, CPU) for batch in batches(made.loader, 4)]
    assert ["kept_BK" in given for given in whole] == [True, False, False, False], "from 32 of 64 images on: dense"
    kept = whole[0]["kept_BK"]
    assert kept.shape == (16, 4), "a quarter of 16 tokens"
    assert len(kept.unique(dim=0)) > 12, "others for each image"
    assert torch.equal(torch.cat([made.inputs(piece, CPU)["kept_BK"] for piece in cut]), kept)
    (held_out,) = batches(made.held_out(), 1)
    numbered = replace(held_out, positions=held_out.positions + HELD_OUT_NUMBERS)
    assert "kept_BK" not in made.inputs(numbered, CPU)
    made.module(**whole[0])["total"].backward()


def test_the_foundation_model_rests_once_alignment_is_over(place: Path) -> None:
    made = trainee(place, "online", "train_dit.objective.align_until=32")
    looked: list[int] = []
    made.foundation.register_forward_hook(lambda _model, given, _out: looked.append(len(given[0])))
    served = batches(made.loader, 3)
    targets = [made.inputs(batch, CPU)["align_target_BChw"] for batch in served]
    assert looked == [16], "the second batch ends at 32 images"
    assert [IMAGE in batch.arrays for batch in served] == [True, False, False], "nothing is decoded for nobody"
    (later,) = batches(made.loader, 1, cursor=32)
    assert IMAGE not in later.arrays and np.array_equal(later.arrays["z"], served[2].arrays["z"])
    (held_out,) = batches(made.held_out(), 1, cursor=64)
    assert IMAGE in held_out.arrays
    assert targets[1].shape == targets[0].shape and not targets[1].any()


def test_held_out_images_have_targets_of_their_own(place: Path) -> None:
    made = trainee(place, "online")
    (batch,) = batches(made.held_out(), 1)
    features = made.inputs(batch, CPU)["align_target_BChw"]
    (stored,) = batches(trainee(place, "stored").held_out(), 1)
    torch.testing.assert_close(features, torch.from_numpy(stored.arrays["f"]).float(), rtol=1e-3, atol=1e-3)


def test_latents_need_no_stored_features(place: Path) -> None:
    made = trainee(place, "online", "encode.align_features=false")
    assert made.loader.columns == ("z", "s", IMAGE)
    assert "f" not in made.loader.columns and f"f{FLIP}" not in made.loader.reader.columns
    with pytest.raises(UserError, match="align: online to make them in training"):
        recipe_of(place, "encode.align_features=false")


def test_latents_without_images_are_refused_by_name(place: Path) -> None:
    root = at(place / "root")
    latents = Artifact(root, "encode", "encode").manifest
    storage = Artifact(root, "encode", "ready").storage
    for entry in latents.files:
        storage.write_bytes(entry.path, Artifact(root, "encode", "encode").read(entry.path))
    recipe = recipe_of(place, "train_dit.objective.align=online")
    put(root, recipe, "encode", list(latents.files), "ready", facts=latents.facts)
    with pytest.raises(
        UserError, match=r"align is online, but the latents in .* come without images: set it to stored"
    ):
        Diffusion(context(root, recipe, train_dit.STAGE, encode="ready"))


def test_other_shards_are_refused_by_name(place: Path, tmp_path: Path) -> None:
    shards = put_shard(at(tmp_path), recipe_of(place), train=90)
    with pytest.raises(UserError, match=r"train/part-00000.parquet has 45 rows and the latents made of it .* 100"):
        latents = Artifact(at(place / "root"), "encode", "encode")
        Loader(latents, "train", ["z", IMAGE], 16, 3, crop=Crop(32), shards=shards)


def test_no_fingerprint_knows_of_it_while_targets_are_stored() -> None:
    from configs.section import fingerprinted

    recipe: AnyRecipe = load_recipe("demo")
    stored: dict[str, Any] = fingerprinted(recipe.train_dit)
    assert "foundation_precision" not in stored and "align" not in stored["objective"]
    online = fingerprinted(load_recipe("demo", ["train_dit.objective.align=online"]).train_dit)
    assert online["objective"]["align"] == "online"
