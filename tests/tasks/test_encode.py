from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from configs import Recipe, UserError, load_recipe
from infra.artifacts import MANIFEST, Artifact
from infra.cluster import require_gpus
from infra.storage import FileEntry, Storage
from tasks import encode
from tasks.data.decode import load
from tasks.data.statistics import ChannelSums, LatentStatistics, statistics_hash
from tasks.data.tensors import to_numpy
from tasks.encode import share_cpus
from tasks.encoder import Encoder
from tasks.randomness import key_noise
from tasks.stage import Job
from tests.helpers.encoding import encode_inputs, encode_recipe
from tests.helpers.piles import folder_recipe, read_rows, run_stage

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return encode_recipe(tmp_path_factory.mktemp("data"), 40)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def encoded(root: str, recipe: Recipe, local_ray: None) -> Artifact:
    return run_stage(encode.STAGE, recipe, root, *encode_inputs(root, recipe))


def _tensors(artifact: Artifact, split: str) -> dict[str, np.ndarray]:
    tables = [pq.read_table(pa.BufferReader(artifact.read(e.path))) for e in artifact.files(f"{split}/", ".parquet")]
    names = artifact.manifest.facts["shapes"]
    return {
        name: np.concatenate([to_numpy(table[name], table.schema.field(name)) for table in tables]) for name in names
    }


def test_statistics_of_averages_are_over_all_train_rows(encoded: Artifact) -> None:
    """What the lower resolutions of a cascade are standardised by."""
    tensors = _tensors(encoded, "train")
    for side, factor in ((2, 2), (1, 4)):
        found = LatentStatistics.of_averages(encoded.manifest.facts, side)
        for name in ("z", "s"):
            values = tensors[name].astype(np.float64)
            pooled = values.reshape(*values.shape[:2], side, factor, side, factor).mean(axis=(3, 5))
            np.testing.assert_allclose(found.mean([name]), pooled.mean(axis=(0, 2, 3)), rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(found.std([name]), pooled.std(axis=(0, 2, 3)), rtol=1e-5)


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
        noise = key_noise(recipe.encode.seed, [image["key"]], "z" + suffix, (8, 4, 4))
        found = _tensors(encoded, "train")
        expected = posterior.sample(torch.from_numpy(noise))[0].numpy()
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
    assert LatentStatistics.from_facts(facts).columns == ("z", "s")


def _by_one(recipe: Recipe) -> Recipe:
    actors = recipe.compute.actors.model_copy(update={"actors": 1})
    return recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"actors": actors})})


def test_an_interrupted_run_ends_bitwise_the_same(tmp_path: Path, recipe: Recipe, encoded: Artifact, root: str) -> None:
    """As after a kill at the worst moments: a part without receipt, a receipt without part, half a part.

    By one actor, where two made the whole.
    """
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
    redone = run_stage(encode.STAGE, _by_one(recipe), root, *inputs)
    assert redone.manifest.files == encoded.manifest.files
    assert redone.manifest.facts == encoded.manifest.facts
    assert {name: (folder / name).read_bytes() for name in names} == before
    assert untouched and {name: (folder / name).stat().st_mtime_ns for name in untouched} == untouched


def test_a_damaged_shard_is_named(tmp_path: Path, recipe: Recipe) -> None:
    inputs = encode_inputs(str(tmp_path), recipe)
    path = Path(inputs[0].storage.path) / inputs[0].files("train/")[1].path
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"train/part-00001\.parquet is not the file that the manifest describes"):
        run_stage(encode.STAGE, _by_one(recipe), str(tmp_path), *inputs)
    assert not list((tmp_path / "encode").rglob(MANIFEST))


def test_grids_that_do_not_fit_are_refused(root: str, recipe: Recipe, encoded: Artifact) -> None:
    values = recipe.model_dump(mode="json")
    values["foundation"] = {**values["foundation"], "input_size": 64}
    job = Job("encode", "x", root, values, encoded.manifest.inputs, {})
    with pytest.raises(UserError, match=r"grid of 8 × 8 at input_size 64, but .* 4 × 4"):
        Encoder(job)


def test_moments_are_stored_and_their_statistics_are_those_of_samples(
    root: str, recipe: Recipe, encoded: Artifact, tmp_path: Path
) -> None:
    values = recipe.model_dump(mode="json")
    values["encode"] = {**values["encode"], "posterior": "moments"}
    values["train_dit"] = {**values["train_dit"], "images": 0, "pretrained": "theirs.safetensors"}
    shards = Artifact(root, "shard", encoded.manifest.inputs["shard"])
    part = shards.files("train/")[0]
    encoder = Encoder(Job("encode", "moments", root, values, encoded.manifest.inputs, {}))
    row = encode.decode_part(pa.table({"part": [part.path], "made_from": [part.sha256]}), shards, 32)
    receipt = encoder.write_part({name: row[name][0] for name in row.column_names})
    table = pq.read_table(pa.BufferReader(encoder.context.out.read_bytes(part.path)))
    stored = {name: to_numpy(table[name], table.schema.field(name)) for name in receipt.facts["shapes"]}
    assert [name for name in stored if name[0] == "s"] == ["s", "s_flip", "s_std", "s_std_flip"]
    for name in ("z", "s"):
        mean, std = stored[name].astype(np.float64), stored[name + "_std"].astype(np.float64)
        assert (std > 0).all()
        found = ChannelSums(**receipt.facts["sums"][name]).mean_and_std()
        np.testing.assert_allclose(found["mean"], mean.mean(axis=(0, 2, 3)), rtol=1e-12, atol=1e-15)
        noise = np.random.default_rng(0).normal(size=(500, *mean.shape))
        samples = (mean + std * noise).std(axis=(0, 1, 3, 4))
        np.testing.assert_allclose(found["std"], samples, rtol=0.03)
        drawn = np.concatenate([_tensors(encoded, "train")[name][: len(mean)]]).astype(np.float64)
        assert abs(((drawn - mean) / std).std() - 1) < 0.1  # what `sample` stores is drawn from these


def test_a_part_is_written_while_the_next_is_encoded(
    root: str, recipe: Recipe, encoded: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe.model_dump(mode="json")
    encoder = Encoder(Job("encode", "overlapping", root, values, encoded.manifest.inputs, {}))
    shards = Artifact(root, "shard", encoded.manifest.inputs["shard"])
    rows = []
    for part in shards.files("train/")[:2]:
        row = encode.decode_part(pa.table({"part": [part.path], "made_from": [part.sha256]}), shards, 32)
        rows.append({name: row[name][0] for name in row.column_names})
    second, busy = threading.Event(), threading.Lock()
    networks, write = Encoder.encode, Storage.write_table
    begun: list[int] = []

    def counted(self: Encoder, keys: list[str], pixels: np.ndarray) -> dict[str, np.ndarray]:
        assert busy.acquire(blocking=False), "two parts at once on the device"
        begun.append(len(keys))
        if len(begun) == 2:
            second.set()
        try:
            return networks(self, keys, pixels)
        finally:
            busy.release()

    def waiting(self: Storage, *given: Any, **options: Any) -> FileEntry:
        assert second.wait(60), "the next part is not encoded before this one is written"
        return write(self, *given, **options)

    monkeypatch.setattr(Encoder, "encode", counted)
    monkeypatch.setattr(Storage, "write_table", waiting)
    with ThreadPoolExecutor(2) as threads:
        receipts = list(threads.map(encoder.write_part, rows))
    made = {entry.path: entry for entry in encoded.manifest.files}
    assert [receipt.entry for receipt in receipts] == [made[receipt.entry.path] for receipt in receipts]


def test_noise_belongs_to_the_image() -> None:
    keys = [f"k{number}" for number in range(500)]
    noise = key_noise(0, keys, "z", (8, 4, 4))
    assert np.array_equal(noise[7], key_noise(0, ["k9", "k7"], "z", (8, 4, 4))[1])
    assert len(np.unique(noise[:, 0, 0, 0])) == len(keys)
    for other in (key_noise(1, keys, "z", (8, 4, 4)), key_noise(0, keys, "z_flip", (8, 4, 4))):
        assert not (noise == other).all(axis=(1, 2, 3)).any()
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize(
    ("cpus", "actors", "wanted"), [(1, 1, 1), (2, 2, 1), (2, 1, 1), (4, 2, 2), (64, 8, 4), (2, 8, 4)]
)
def test_actors_and_a_decode_task_always_fit(cpus: float, actors: int, wanted: float) -> None:
    decode, each = share_cpus(cpus, actors, wanted)
    assert decode > 0 and each > 0 and decode + actors * each <= cpus


def test_accelerators_that_are_not_there_are_refused(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"compute\.actors\.gpus_per_actor is 64 but Ray finds \d+ GPUs"):
        require_gpus("compute.actors.gpus_per_actor", 64)
    require_gpus("compute.actors.gpus_per_actor", 0)
    monkeypatch.setenv("RAY_ADDRESS", "a cluster that may grow")
    require_gpus("compute.actors.gpus_per_actor", 64)


def test_moments_are_refused_while_the_diffusion_model_trains_on_what_is_stored(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encode\.posterior is moments but train_dit"):
        folder_recipe(tmp_path, "encode.posterior=moments")


@pytest.mark.parametrize("stage", ["encode", "train_vavae", "train_semvae", "evaluate", "evaluate_tokenizer"])
def test_other_weights_in_the_same_file_are_another_artifact(stage: str, tmp_path: Path) -> None:
    made = import_module(f"tasks.{stage}").STAGE
    file = tmp_path / "weights.safetensors"

    def prints(weights: str) -> str:
        changes = [f"{field}={weights}" for field in ("foundation.weights", "evaluate.features.weights")]
        sections = made.external(load_recipe("vavae_tiny" if "tokenizer" in stage else "demo_tiny", changes))
        return json.dumps(sections)

    file.write_bytes(b"first")
    first = prints(str(file))
    file.write_bytes(b"other")
    assert prints(str(file)) != first
    assert "random" not in prints("random"), "names stand for themselves"


def test_a_stage_that_reads_nothing_from_outside_keeps_its_fingerprint() -> None:
    recipe = load_recipe("demo_tiny")
    assert "external" not in encode.STAGE.fingerprint(recipe, {})[1]
    nothing = replace(encode.STAGE, external=lambda recipe: {})
    assert nothing.fingerprint(recipe, {}) != encode.STAGE.fingerprint(recipe, {})
