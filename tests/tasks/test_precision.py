"""The precision of a section is what its networks compute in, and of nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from configs import Recipe
from infra.artifacts import fingerprint
from tasks import encode, sample, train_dit, train_vavae
from tasks.encoder import Encoder
from tasks.networks import WEIGHTS, build_semantic_vae
from tasks.sampling.sampler import Sampler
from tasks.scoring.features import FeatureExtractor, FeatureNetworks
from tasks.scoring.reference import looked_at
from tasks.training import launch
from tests.helpers.builders import at, context, put_networks, put_shard, put_weights, small_recipe

FULL, REDUCED, HALF = (False, False, False), (True, True, False), (True, True, True)
"""TF32 products, TF32 convolutions, autocast."""
SEEN = {"fp32": FULL, "tf32": REDUCED, "bf16": HALF}
SETTINGS = ("foundation.weights=random", "evaluate.features.weights=random", "sample.steps=2")
precisions = pytest.mark.parametrize("precision", SEEN)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def watch(network: nn.Module, seen: list[tuple[bool, bool, bool]]) -> None:
    """Notes what holds in the first layer that has weights."""

    def note(*_: Any) -> None:
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        seen.append((*tf32, torch.is_autocast_enabled("cpu")))

    next(m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)).register_forward_pre_hook(note)


def recipe_of(*overrides: str) -> Recipe:
    return small_recipe(*SETTINGS, *overrides)


@precisions
def test_of_sampling_and_its_decoder(tmp_path: Path, precision: str) -> None:
    recipe = recipe_of(f"sample.precision={precision}")
    put_networks(at(tmp_path), recipe)
    sampler = Sampler.of(context(at(tmp_path), recipe, sample.STAGE, "train_vavae", "encode", "train_dit"))
    network: list[Any] = []
    decoder: list[Any] = []
    watch(sampler.integrator.model, network)
    watch(sampler.decoder.tokenizer.decoder, decoder)
    sampler.images(np.arange(2))
    assert set(network) == {SEEN[precision]}
    assert set(decoder) == {FULL if precision == "fp32" else REDUCED}, "levels of 8 bits are not made in bfloat16"


def test_bf16_is_close_and_tf32_the_same_on_a_cpu(tmp_path: Path) -> None:
    def latents(precision: str) -> torch.Tensor:
        recipe = recipe_of(f"sample.precision={precision}")
        put_networks(at(tmp_path), recipe)
        sampler = Sampler.of(context(at(tmp_path), recipe, sample.STAGE, "train_vavae", "encode", "train_dit"))
        return sampler.latents(np.arange(2), np.arange(2))

    full, half = latents("fp32"), latents("bf16")
    assert torch.equal(full, latents("tf32"))
    assert full.dtype == half.dtype == torch.float32, "what is integrated stays float32"
    assert 0 < (full - half).norm() / full.norm() < 0.05


@precisions
def test_of_encoding(tmp_path: Path, precision: str) -> None:
    recipe = recipe_of(f"encode.precision={precision}", "encode.align_features=true")
    put_networks(at(tmp_path), recipe)
    inputs = ["train_vavae"]
    if recipe.train_semvae is not None and recipe.foundation is not None:
        semantic = build_semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim)
        put_weights(at(tmp_path), recipe, "train_semvae", {WEIGHTS: semantic})
        inputs.append("train_semvae")
    encoder = Encoder(context(at(tmp_path), recipe, encode.STAGE, *inputs).job)
    seen: list[Any] = []
    for network in (encoder.autoencoder.encoder, encoder.foundation, encoder.semantic_vae):
        watch(network, seen)
    pixels = np.random.default_rng(0).integers(0, 256, (2, recipe.image.size, recipe.image.size, 3), np.uint8)
    found = encoder.encode(["a", "b"], pixels)
    assert len(seen) % 3 == 0 and set(seen) == {SEEN[precision]}
    assert {"z", "s", "f"} <= found.keys() and all(each.dtype == np.float16 for each in found.values())


@precisions
def test_of_scores(precision: str) -> None:
    recipe = recipe_of()
    extractor = FeatureExtractor(FeatureNetworks(32, recipe.evaluate.features, precision=precision))
    seen: list[Any] = []
    watch(extractor.features, seen)
    found = extractor.look(np.arange(2), np.zeros((2, 32, 32, 3), np.uint8))
    assert set(seen) == {SEEN[precision]} and found.features.dtype == np.float32


def test_scores_of_another_precision_have_real_images_of_their_own() -> None:
    plain, half = (looked_at(recipe_of(f"evaluate.precision={name}")) for name in ("fp32", "bf16"))
    assert "precision" not in plain, "artifacts that were there before the field keep their names"
    assert fingerprint("reference", 1, plain, {}) != fingerprint("reference", 1, half, {})


@pytest.mark.parametrize(("own", "frozen"), [("fp32", "tf32"), ("tf32", "bf16"), ("bf16", "tf32"), ("bf16", "fp32")])
def test_of_training_and_of_the_frozen_network_it_learns_from(tmp_path: Path, own: str, frozen: str) -> None:
    names = {"train_vavae.precision": own, "train_vavae.foundation_precision": frozen}
    recipe = recipe_of(*(f"{name}={value}" for name, value in names.items()), "train_vavae.objective.align_weight=0.1")
    put_shard(at(tmp_path), recipe)
    job = context(at(tmp_path), recipe, train_vavae.STAGE, "shard")
    launch._setting(job)  # what a worker begins with
    trainee: Any = train_vavae.STAGE.trainee(job)
    seen: list[Any] = []
    assert trainee.foundation is not None
    watch(trainee.foundation, seen)
    given = trainee.inputs(next(iter(trainee.loader.stream())), torch.device("cpu"))
    reduced = "fp32" not in (own, frozen)
    assert seen == [(reduced, reduced, frozen == "bf16")]
    assert given["features_BDhw"].dtype == torch.float32


def test_a_training_without_a_frozen_network_has_its_own_precision(tmp_path: Path) -> None:
    for precision, reduced in (("fp32", False), ("bf16", True)):
        recipe = recipe_of(f"train_dit.precision={precision}")
        launch._setting(context(at(tmp_path), recipe, train_dit.STAGE, "encode"))
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (reduced, reduced)


def test_whoever_takes_a_device_says_in_which_precision() -> None:
    """A process that forgets would multiply in full float32 and convolve in TF32. Who computes through others, or
    beside a training, is named here."""
    through_others = {"comparing/trial.py", "sampling/preview.py"}
    root = Path(encode.__file__).parent
    taking = {str(path.relative_to(root)): path.read_text() for path in root.rglob("*.py")}
    taking = {name: text for name, text in taking.items() if "default_device()" in text}
    assert {name for name, text in taking.items() if not re.search(r"\b(computing|set_precision)\(", text)} == (
        through_others
    )
