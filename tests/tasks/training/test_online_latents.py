"""Latents made in training: those that `encode` would have stored, of the same images in the same order."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load

from configs import Recipe, UserError, load_recipe
from infra.artifacts import Artifact
from tasks import train_dit, train_vavae
from tasks.loading.loader import IMAGE, Batch, Loader
from tasks.networks import WEIGHTS
from tasks.stage import Context
from tasks.train_dit import Diffusion
from tasks.training.trainee import HELD_OUT_NUMBERS
from tests.helpers.builders import at, context, put, put_shard, small_recipe
from tests.helpers.encoding import put_encoded, put_tokenizers, random_foundation
from tests.helpers.foreign import saved, section
from tests.helpers.piles import run_stage
from tests.tasks.test_train_tokenizers import Interrupted, train

CPU = torch.device("cpu")
OURS = (
    "image.flips=true",
    "encode.posterior=mean",
    "encode.align_features=false",
    "encode.rows_per_group=48",  # no multiple of the shards' 32
    "compute.actors.batch=25",
    "train_dit.model={hidden_size: 32, depth: 2, heads: 2, align_depth: null}",
    "train_dit.images=48",
    "train_dit.batch=16",
    "train_dit.precision=fp32",
    "compute.train={workers: 1, engine: plain, checkpoint_every: 16, keep_checkpoints: 9, log_every: 16}",
)
THEIRS = (
    "foundation=null",
    "train_semvae=null",
    "train_vavae.images=0",
    "train_vavae.objective.align_weight=0.0",
    "train_dit.clock={kind: synchronous}",
    "train_dit.objective.semantic_weight=1.0",
    "sample.guidance={method: none}",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of our two tokenizers, stored and online."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ours")
    random_foundation(folder)
    recipe, root = ours(folder), at(folder / "root")
    put_shard(root, recipe)
    put_tokenizers(root, recipe)
    for latents in ("stored", "online"):
        put_encoded(root, ours(folder, f"encode.latents={latents}"), latents)
    return folder


def ours(folder: Path, *overrides: str) -> Recipe:
    weights = f"foundation.weights={folder / 'lite0.safetensors'}"
    return small_recipe(weights, *OURS, *overrides)


def trainee(root: str, recipe: Recipe) -> Diffusion:
    torch.manual_seed(0)
    return Diffusion(context(root, recipe, train_dit.STAGE, encode=recipe.encode.latents))


def batches(loader: Loader, count: int, cursor: int = 0, rank: int = 0, world: int = 1) -> list[Batch]:
    stream = loader.stream(cursor, rank, world)
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


def same_losses(stored: Diffusion, online: Diffusion) -> None:
    """Over two epochs of all that a step is given, and of one step's terms and gradients."""
    for one, other in zip(batches(stored.loader, 26), batches(online.loader, 26), strict=True):
        assert np.array_equal(one.labels, other.labels)
        given, made = stored.inputs(one, CPU), online.inputs(other, CPU)
        assert given.keys() == made.keys()
        for name in given.keys() - {"x1_BCHW", "images_seen"}:
            assert torch.equal(given[name], made[name]), name
        torch.testing.assert_close(made["x1_BCHW"], given["x1_BCHW"], rtol=2e-3, atol=2e-3)
        assert not torch.equal(made["x1_BCHW"], given["x1_BCHW"]), "stored ones are rounded to float16"
    terms = []
    for each, inputs in ((stored, given), (online, made)):
        torch.manual_seed(0)
        for parameter in each.network.parameters():
            torch.nn.init.normal_(parameter, std=0.1) if parameter.requires_grad else None
        found = each.module(**inputs)
        found["total"].backward()
        norm = torch.stack([p.grad.norm() for p in each.network.parameters() if p.grad is not None]).norm()
        terms.append([float(found["total"].detach()), float(norm)])
    np.testing.assert_allclose(terms[1], terms[0], rtol=1e-3)


def test_losses_are_those_of_stored_latents(place: Path) -> None:
    """Of both tokenizers, mirrored or not: the trained networks cannot tell the roads apart."""
    root = at(place / "root")
    same_losses(*(trainee(root, ours(place, f"encode.latents={latents}")) for latents in ("stored", "online")))


def test_losses_of_a_diffusers_representation_are_those_of_stored_latents(tmp_path: Path) -> None:
    saved(tmp_path / "rae", "AutoencoderRAE")
    model = f"train_vavae.model={json.dumps(section('AutoencoderRAE', tmp_path / 'rae'))}"
    root, made = at(tmp_path / "root"), []
    for latents in ("stored", "online"):
        recipe = small_recipe(*OURS, *THEIRS, model, f"encode.latents={latents}")
        shard = put_shard(root, recipe)
        if not made:
            tokenizer = run_stage(train_vavae.STAGE, recipe, root, shard)
            target = Artifact(root, "train_vavae", "train_vavae").storage
            for entry in tokenizer.files():
                target.write_bytes(entry.path, tokenizer.read(entry.path))
            put(root, recipe, "train_vavae", list(tokenizer.files()), facts=tokenizer.manifest.facts)
        put_encoded(root, recipe, latents)
        made.append(trainee(root, recipe))
    same_losses(*made)


def test_online_latents_are_looked_at_and_not_stored(place: Path) -> None:
    """The pass leaves exactly the statistics of stored ones, averages for cascades too, and keys and labels."""
    stored, online = (Artifact(at(place / "root"), "encode", name) for name in ("stored", "online"))
    facts, plain = online.manifest.facts, stored.manifest.facts
    assert facts["shapes"] == {} and set(plain["shapes"]) == {"z", "s", "z_flip", "s_flip"}
    for name in ("statistics", "statistics_hash", "averages", "splits", "classes", "rows_per_group", "flips"):
        assert facts[name] == plain[name], name
    (one, *_), (other, *_) = online.files("train/"), stored.files("train/")
    table = pq.read_table(online.storage.open(one.path))
    assert table.column_names == ["key", "label"] and one.rows == other.rows
    assert table.equals(pq.read_table(stored.storage.open(other.path), columns=["key", "label"]))
    assert 4 * one.bytes < other.bytes


def test_nothing_depends_on_where_it_was_resumed_or_on_workers(place: Path) -> None:
    made = trainee(at(place / "root"), ours(place, "encode.latents=online", "encode.posterior=sample"))
    assert made.loader.columns == (IMAGE,)
    whole = [made.inputs(batch, CPU) for batch in batches(made.loader, 3)]
    (resumed,) = batches(made.loader, 1, cursor=32)
    assert torch.equal(made.inputs(resumed, CPU)["x1_BCHW"], whole[2]["x1_BCHW"])
    halves = [made.inputs(batches(made.loader, 1, rank=rank, world=2)[0], CPU) for rank in range(2)]
    joined = torch.cat([half["x1_BCHW"] for half in halves])
    torch.testing.assert_close(joined, whole[0]["x1_BCHW"], rtol=1e-4, atol=1e-5)


def test_posteriors_are_drawn_anew_in_every_epoch(place: Path) -> None:
    root, online = at(place / "root"), "encode.latents=online"
    drawn = trainee(root, ours(place, online, "encode.posterior=sample"))
    means = trainee(root, ours(place, online))
    (batch,) = batches(drawn.loader, 1)
    later = replace(batch, positions=batch.positions + drawn.loader.rows)
    first, second, mean = (
        each._latents(given, CPU) for each, given in ((drawn, batch), (drawn, later), (means, batch))
    )
    assert not torch.equal(first, second) and torch.equal(first, drawn._latents(batch, CPU))
    noise = drawn.posteriors.normal(batch.positions, mean.shape[1:])
    deviation = (first - mean) / noise
    expected = mean + deviation * drawn.posteriors.normal(later.positions, mean.shape[1:])
    torch.testing.assert_close(second, expected, rtol=1e-3, atol=1e-3)
    assert float(deviation.min()) > 0


def test_held_out_images_have_latents_of_their_own(place: Path) -> None:
    stored, online = (
        trainee(at(place / "root"), ours(place, f"encode.latents={latents}")) for latents in ("stored", "online")
    )
    found = []
    for each in (stored, online):
        (batch,) = batches(each.held_out(), 1)
        numbered = replace(batch, positions=batch.positions + HELD_OUT_NUMBERS)
        found.append(each.inputs(numbered, CPU)["x1_BCHW"])
    torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_training_on_online_latents_resumes_in_every_bit(alone: None, place: Path) -> None:
    recipe, made = ours(place, "encode.latents=online", "encode.posterior=sample"), []
    for name in ("whole", "stopped"):
        job = context(at(place / "root"), recipe, train_dit.STAGE, encode="online").job
        made.append(Context(replace(job, fingerprint=name)))
    whole, stopped = made
    train(whole)
    with pytest.raises(Interrupted):
        train(stopped, stop_at=16)
    train(stopped)
    ours_, resumed = (load(each.out.read_bytes(WEIGHTS)) for each in made)
    assert ours_.keys() == resumed.keys() and all(torch.equal(value, resumed[name]) for name, value in ours_.items())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("encode.align_features=true",), r"encode.align_features is true.*train_dit.objective.align: online"),
        (("encode.posterior=moments",), r"encode.latents is online but encode.posterior is moments"),
    ],
)
def test_what_online_latents_cannot_be_is_refused_by_the_recipe(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe("demo", ["encode.latents=online", "encode.align_features=false", *overrides])


def test_latents_of_others_are_refused_by_name(place: Path) -> None:
    root, recipe = at(place / "root"), ours(place, "encode.latents=online")
    facts = Artifact(root, "encode", "online").manifest.facts
    put(root, recipe, "encode", [], "ready", facts=facts)
    with pytest.raises(UserError, match=r"encode.latents is online, but the latents in .*ready come without images"):
        Diffusion(context(root, recipe, train_dit.STAGE, encode="ready"))
    inputs = {"shard": Artifact(root, "encode", "online").manifest.inputs["shard"]}
    put(root, recipe, "encode", [], "alone", facts=facts, inputs=inputs)
    with pytest.raises(UserError, match=r"the latents in .*alone come without what train_vavae makes"):
        Diffusion(context(root, recipe, train_dit.STAGE, encode="alone"))


def test_no_fingerprint_knows_of_it_while_latents_are_stored() -> None:
    assert "latents" not in load_recipe("demo").section("encode")
    assert load_recipe("ditdh_xl_rae").section("encode")["latents"] == "online"
