"""Pictures and scores while training goes on: always the same images, and training does not notice."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from configs import Recipe
from infra.artifacts import Artifact
from infra.tracking import Tracker
from tasks.data.pixels import to_tensor
from tasks.data.statistics import LatentStatistics
from tasks.networks import trained_dit
from tasks.sample import STAGE as SAMPLE
from tasks.sampling.preview import DiffusionPreview, _gathered, _share, simplified
from tasks.sampling.sampler import Sampler
from tasks.train_dit import STAGE, Diffusion, preview
from tasks.training.loop import Setting, fit
from tasks.training.metrics import Metrics
from tests.helpers.builders import at, context, put, put_networks, put_shard, small_recipe
from tests.helpers.toy_training import same
from tests.tasks.training.test_killed_worker import put_latents

NAME = "preview/frechet_efficientnet_lite0_24"
EVERY = 64


@dataclass(frozen=True)
class Kept(Tracker):
    """Keeps what is tracked in a folder."""

    folder: str = ""

    def series(self, points: list[tuple[str, float, int]]) -> None:
        with open(f"{self.folder}/series", "a") as file:
            file.writelines(json.dumps(point) + "\n" for point in points)

    def file(self, name: str, data: bytes) -> None:
        Path(self.folder, Path(name).name).write_bytes(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, dict[str, Tensor]]]]:
    """The same training with previews, again with previews, and without."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("previews")
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    results = {}
    try:
        for name, every in (("one", EVERY), ("two", EVERY), ("none", None)):
            recipe = small_recipe(
                "train_dit.images=128",
                "train_dit.batch=32",
                "train_dit.ema_decay=0.5",
                "compute.train.engine=plain",
                f"compute.train.preview_every={json.dumps(every)}",
                "compute.train.preview_scored=24",
            )
            results[name] = _trained(folder / name, recipe)
    finally:
        dist.destroy_process_group()
    yield folder, results


def _trained(folder: Path, recipe: Recipe) -> dict[str, Tensor]:
    root = at(folder)
    put_networks(root, recipe)
    put_shard(root, recipe)
    latents = put_latents(root, recipe).manifest
    made_from = {"shard": "shard", "train_vavae": "train_vavae"}
    put(root, recipe, "encode", list(latents.files), facts=latents.facts, inputs=made_from)
    job = context(root, recipe, STAGE, "encode")
    ends: list[dict[str, Tensor]] = []

    def finished(end: Any, best: Any, curves: Any) -> None:
        ends.append({f"{part}/{name}": tensor for part, found in end.tensors.items() for name, tensor in found.items()})

    compute, cpu = recipe.compute.train, torch.device("cpu")
    metrics = Metrics("train_dit", recipe.train_dit.images, compute.log_every, Kept(folder=str(folder)), cpu)
    setting = Setting(job.out, compute, cpu, metrics, finished, preview=partial(preview, job))
    trained: Any = Diffusion(job)
    fit(lambda: trained, setting)
    return ends[0]


def test_a_preview_changes_nothing(runs: tuple[Path, dict[str, dict[str, Tensor]]]) -> None:
    assert same(runs[1]["one"], runs[1]["none"])


def test_pictures_show_what_was_learnt_of_the_same_noise(runs: tuple[Path, dict[str, dict[str, Tensor]]]) -> None:
    folder = runs[0]
    pictures = {path.name: path.read_bytes() for path in sorted((folder / "one").glob("*.png"))}
    assert list(pictures) == [f"{images:014d}.png" for images in (EVERY, 2 * EVERY)]
    early, late = (np.asarray(Image.open(io.BytesIO(data))) for data in pictures.values())
    assert early.shape == late.shape == (4 * 66 - 2, 10 * 66 - 2, 3)
    assert not np.array_equal(early, late)
    for name, data in pictures.items():
        assert (folder / "two" / name).read_bytes() == data
    assert not list((folder / "none").glob("*.png"))


def test_a_score_is_named_after_its_network_and_number_of_images(
    runs: tuple[Path, dict[str, dict[str, Tensor]]],
) -> None:
    points = [json.loads(line) for line in (runs[0] / "one" / "series").read_text().splitlines()]
    scores = {images: value for name, value, images in points if name == NAME}
    assert set(scores) == {EVERY, 2 * EVERY}
    assert all(np.isfinite(value) and value > 0 for value in scores.values())


def test_a_score_by_class_tokens_is_of_class_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = (
        "{name: vit_tiny_patch16_224, weights: random, feature_dim: 192, input_size: 32, layer: null, vector: token}"
    )
    recipe, root = small_recipe(f"evaluate.features={network}", "compute.train.preview_scored=2"), at(tmp_path)
    put_networks(root, recipe)
    model = Artifact(root, "train_dit", "train_dit")
    made_from = {"train_vavae": "train_vavae", "shard": "shard"}
    put(root, recipe, "encode", [], facts=model.manifest.facts, inputs=made_from)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    statistics = LatentStatistics.from_facts(model.manifest.facts, model.uri)
    shown = DiffusionPreview(context(root, recipe, STAGE, "encode"), trained_dit(model, ema=True), statistics)
    images = np.random.default_rng(0).integers(256, size=(2, 32, 32, 3), dtype=np.uint8)
    given = shown._features.preprocess(to_tensor(images))
    with torch.no_grad():
        tokens = shown._features.network.forward_features(given)[:, 0]
        assert np.allclose(shown._features_of(images), tokens.numpy(), atol=1e-5)


def test_a_preview_shows_what_sampling_would_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    recipe = small_recipe("sample.steps=3", "sample.batch=16", "compute.train.preview_scored=0")
    root = at(tmp_path)
    put_networks(root, recipe)
    model = Artifact(root, "train_dit", "train_dit")
    put(root, recipe, "encode", [], facts=model.manifest.facts, inputs={"train_vavae": "train_vavae"})
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    statistics = LatentStatistics.from_facts(model.manifest.facts, model.uri)
    trained = trained_dit(model, recipe.sample.ema, recipe.sample.ema_sigma)
    shown = DiffusionPreview(context(root, recipe, STAGE, "encode"), trained, statistics)
    indices = np.array([*range(12), 40, 7])
    given = context(root, recipe, SAMPLE, "train_vavae", "encode", "train_dit")
    labels, pixels = Sampler.of(given).images(indices)
    with torch.no_grad():
        assert np.array_equal(shown._made(indices.tolist()), pixels)
    assert {labels[index] for index in range(3)} == {0, 1, 2} and len(np.unique(pixels, axis=0)) == 13


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_are_equal_and_come_back_in_order(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    shares: list[np.ndarray] = []
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        shares.append(_share(np.arange(3, 8)))
    assert len({len(share) for share in shares}) == 1

    def all_of_them(found: list[np.ndarray], own: np.ndarray) -> None:
        found[:] = shares

    monkeypatch.setattr(dist, "all_gather_object", all_of_them)
    assert _gathered(shares[0], 5).tolist() == [3, 4, 5, 6, 7]


def test_a_preview_needs_no_weak_network_and_keeps_workers_together() -> None:
    guided = simplified(
        small_recipe(
            "sample.guidance.method=autoguidance",
            "sample.guidance.scale=1.5",
            "sample.guidance.weights=nowhere.safetensors",
            'sample.guidance.model={"size": "S"}',
            "sample.solver=dopri5",
            "sample.steps=250",
        )
    )
    assert guided.sample.guidance.method == "none"
    assert (guided.sample.solver, guided.sample.steps) == ("euler", 50)
    kept = small_recipe("sample.steps=4")
    assert simplified(kept) == kept
