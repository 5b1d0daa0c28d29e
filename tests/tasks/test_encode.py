from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from configs import Recipe, UserError
from infra.artifacts import MANIFEST, Artifact
from infra.storage import Storage
from tasks import encode, shard
from tasks.decode import load
from tasks.encode import share_cpus
from tasks.encoder import Encoder, key_noise
from tasks.latents import Statistics, statistics_hash, to_numpy
from tasks.networks import WEIGHTS, build_autoencoder, build_semantic_vae
from tasks.stage import Job
from tests.tasks.builders import put
from tests.tasks.piles import folder_of_classes, folder_recipe, read_rows, run_stage

pytestmark = pytest.mark.usefixtures("local_ray")

SMALL = (
    "data.classes=2", "shard.rows_per_shard=10", "shard.limit=null", "shard.test_share=0.2", "encode.rows_per_group=4",
    "compute.actors.actors=2", "compute.actors.batch=8", "image.flips=true",
    "foundation.weights=random", "foundation.input_size=32", "foundation.layer=2",  # 8 px stride: a 4 × 4 grid
    "foundation.feature_dim=40",
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    pile = folder_of_classes(tmp_path_factory.mktemp("data") / "pile", {"a": 20, "b": 20})
    return folder_recipe(pile, *SMALL, "foundation.weights=" + _foundation(tmp_path_factory.mktemp("weights")))


def _foundation(folder: Path) -> str:
    """Random weights in a file, so that every actor has the same."""
    import timm

    torch.manual_seed(1)
    path = folder / "lite0.safetensors"
    path.write_bytes(save(timm.create_model("tf_efficientnet_lite0").state_dict()))
    return str(path)


def _inputs(root: str, recipe: Recipe) -> list[Artifact]:
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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def encoded(root: str, recipe: Recipe, local_ray: None) -> Artifact:
    return run_stage(encode.STAGE, recipe, root, *_inputs(root, recipe))


def _tensors(artifact: Artifact, split: str) -> dict[str, np.ndarray]:
    tables = [pq.read_table(pa.BufferReader(artifact.read(e.path))) for e in artifact.files(f"{split}/", ".parquet")]
    names = artifact.manifest.facts["shapes"]
    return {
        name: np.concatenate([to_numpy(table[name], table.schema.field(name)) for table in tables]) for name in names
    }


def test_one_part_per_shard_with_its_rows_in_order(root: str, encoded: Artifact) -> None:
    shards = Artifact(root, "shard", encoded.manifest.inputs["shard"])
    assert [(e.path, e.rows) for e in encoded.manifest.files] == [
        (e.path, e.rows) for e in shards.manifest.files if "/" in e.path
    ]
    for split in ("train", "test"):
        rows, images = read_rows(encoded, split), read_rows(shards, split)
        assert [(r["key"], r["label"]) for r in rows] == [(r["key"], r["label"]) for r in images]
    assert encoded.manifest.facts["shapes"] == {
        name: shape
        for column, shape in (("z", [8, 4, 4]), ("s", [4, 4, 4]), ("f", [40, 4, 4]))
        for name, shape in ((column, shape), (column + "_flip", shape))
    }


def test_latents_are_what_the_networks_say(root: str, recipe: Recipe, encoded: Artifact) -> None:
    shards = Artifact(root, "shard", encoded.manifest.inputs["shard"])
    image = read_rows(shards, "train")[3]
    pixels = load(image["image"], 32).astype(np.float32) / 127.5 - 1
    encoder = Encoder(_job(root, recipe, encoded))
    for suffix, view in (("", pixels), ("_flip", pixels[:, ::-1].copy())):
        x = torch.from_numpy(view).permute(2, 0, 1)[None]
        with torch.inference_mode():
            posterior = encoder.autoencoder.encode(x)
            features = encoder.foundation(x)
        noise = key_noise(recipe.encode.seed, image["key"], "z" + suffix, (8, 4, 4))
        found = _tensors(encoded, "train")
        expected = posterior.sample(torch.from_numpy(noise)[None])[0].numpy()
        np.testing.assert_allclose(found["z" + suffix][3], expected, atol=5e-3, rtol=2e-3)
        np.testing.assert_allclose(found["f" + suffix][3], features[0].numpy(), atol=5e-3, rtol=2e-3)


def _job(root: str, recipe: Recipe, made: Artifact) -> Job:
    return Job("encode", made.fingerprint, root, recipe.model_dump(mode="json"), made.manifest.inputs, {})


def test_statistics_are_numpys_over_all_train_rows(encoded: Artifact) -> None:
    facts, tensors = encoded.manifest.facts, _tensors(encoded, "train")
    for name in ("z", "s"):
        values = tensors[name].astype(np.float64)
        np.testing.assert_allclose(
            facts["statistics"][name]["mean"], values.mean(axis=(0, 2, 3)), rtol=1e-12, atol=1e-15
        )
        np.testing.assert_allclose(facts["statistics"][name]["std"], values.std(axis=(0, 2, 3)), rtol=1e-12)
        assert facts["statistics"][name]["count"] == values.size // values.shape[1]
    assert facts["statistics_hash"] == statistics_hash(facts["statistics"])
    assert Statistics.from_facts(facts).columns == ("z", "s")


def test_an_interrupted_run_ends_bitwise_the_same(tmp_path: Path, recipe: Recipe, encoded: Artifact, root: str) -> None:
    """As after a kill at the worst moments: a part without receipt, a receipt without part, half a part."""
    again = Storage.at(root).child("encode", encoded.fingerprint)
    folder = Path(again.path)
    before = {entry.path: (folder / entry.path).read_bytes() for entry in encoded.manifest.files}
    names = sorted(before)
    again.delete(MANIFEST)
    (folder / "receipts" / f"{names[0]}.json").unlink()
    (folder / names[1]).unlink()
    (folder / names[2]).write_bytes(before[names[2]][:100])
    receipt = folder / "receipts" / f"{names[3]}.json"
    receipt.write_text(json.dumps({**json.loads(receipt.read_text()), "made_from": "another shard"}))
    untouched = {name: (folder / name).stat().st_mtime_ns for name in names[4:]}
    inputs = [Artifact(root, stage, name) for stage, name in encoded.manifest.inputs.items()]
    redone = run_stage(encode.STAGE, recipe, root, *inputs)
    assert redone.manifest.files == encoded.manifest.files
    assert redone.manifest.facts == encoded.manifest.facts
    assert {name: (folder / name).read_bytes() for name in names} == before
    assert untouched and {name: (folder / name).stat().st_mtime_ns for name in untouched} == untouched


def test_a_damaged_shard_is_named(tmp_path: Path, recipe: Recipe) -> None:
    inputs = _inputs(str(tmp_path), recipe)
    path = Path(inputs[0].storage.path) / inputs[0].files("train/")[1].path
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"train/part-00001\.parquet is not the file that the manifest describes"):
        run_stage(encode.STAGE, recipe, str(tmp_path), *inputs)
    assert not list((tmp_path / "encode").rglob(MANIFEST))


def test_grids_that_do_not_fit_are_refused(root: str, recipe: Recipe, encoded: Artifact) -> None:
    values = recipe.model_dump(mode="json")
    values["foundation"] = {**values["foundation"], "input_size": 64}
    job = Job("encode", "x", root, values, encoded.manifest.inputs, {})
    with pytest.raises(UserError, match="8 × 8 grid but latents are 4 × 4"):
        Encoder(job)


def test_noise_belongs_to_the_image() -> None:
    noise = key_noise(0, "a", "z", (8, 4, 4))
    assert np.array_equal(noise, key_noise(0, "a", "z", (8, 4, 4)))
    others = [
        key_noise(1, "a", "z", (8, 4, 4)),
        key_noise(0, "b", "z", (8, 4, 4)),
        key_noise(0, "a", "z_flip", (8, 4, 4)),
    ]
    assert not any(np.array_equal(noise, other) for other in others)
    many = np.stack([key_noise(0, f"k{i}", "z", (8, 4, 4)) for i in range(500)])
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02


@pytest.mark.parametrize(
    ("cpus", "actors", "wanted"), [(1, 1, 1), (2, 2, 1), (2, 1, 1), (4, 2, 2), (64, 8, 4), (2, 8, 4)]
)
def test_actors_and_a_decode_task_always_fit(cpus: float, actors: int, wanted: float) -> None:
    decode, each = share_cpus(cpus, actors, wanted)
    assert decode > 0 and each > 0 and decode + actors * each <= cpus
