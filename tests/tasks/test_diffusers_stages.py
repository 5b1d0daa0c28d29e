"""Autoencoders of diffusers on the road of ours: artifacts, latents, statistics, identity."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from configs import Recipe
from infra.artifacts import Artifact
from tasks import encode, sample, train_vavae
from tasks.data.pixels import peak_signal_to_noise, to_pixels
from tasks.data.statistics import ChannelSums, statistics_hash
from tasks.encoder import Encoder
from tasks.networks import EMA_WEIGHTS, WEIGHTS, build_network, trained_autoencoder
from tasks.sampling.sampler import Sampler
from tasks.scoring.features import FeatureExtractor, FeatureNetworks
from tasks.stage import Job
from tests.helpers.builders import at, context, put, put_shard, put_weights, small_recipe
from tests.helpers.foreign import saved, section, theirs
from tests.helpers.piles import run_stage

FILE = "diffusion_pytorch_model.safetensors"
ALONE = ("train_semvae=null", "foundation=null", "train_vavae.images=0", "encode.posterior=mean")


def recipe_on(location: object, class_name: str = "AutoencoderKL", *overrides: str) -> Recipe:
    clocks = (
        "train_dit.clock={kind: synchronous}",
        "sample.guidance={method: none}",
        "train_dit.objective.semantic_weight=1.0",
    )
    own = f"train_vavae.model={json.dumps(section(class_name, location))}"
    objective = "train_vavae.objective.align_weight=0.0"
    return small_recipe(*ALONE, *clocks, objective, own, *overrides)


def taken(folder: Path, class_name: str) -> tuple[Artifact, Recipe, Any]:
    """A `train_vavae` artifact of a network that diffusers saved in `folder / "theirs"`, and that network."""
    network = saved(folder / "theirs", class_name)
    recipe = recipe_on(folder / "theirs", class_name)
    shard = put_shard(at(folder / "root"), recipe, train=20, test=10)
    return run_stage(train_vavae.STAGE, recipe, at(folder / "root"), shard), recipe, network


@torch.no_grad()
@pytest.mark.parametrize("class_name", ["AutoencoderKL", "AutoencoderRAE"])
def test_diffusers_artifact_needs_its_source_no_more_and_is_one_itself(class_name: str, tmp_path: Path) -> None:
    artifact, _, network = taken(tmp_path, class_name)
    shutil.rmtree(tmp_path / "theirs")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    found = trained_autoencoder(artifact)
    assert not found.training and not any(each.requires_grad for each in found.parameters())
    latents = found.encode(images).mean
    given = (images + 1) / 2 if class_name == "AutoencoderRAE" else images
    expected = network.encode(given, return_dict=False)[0]
    torch.testing.assert_close(latents, getattr(expected, "mean", expected) if class_name[-2:] == "KL" else expected)
    assert artifact.manifest.scores["psnr"] > 0
    told = artifact.manifest.facts["tokenizer"]
    assert told["class_name"] == class_name and "scaling_factor" in told["factors"]
    folder = artifact.uri.removeprefix("file://")
    again = run_stage(
        train_vavae.STAGE,
        recipe_on(folder, class_name),
        at(tmp_path / "root"),
        Artifact(at(tmp_path / "root"), "shard", "shard"),
    )
    assert again.fingerprint != artifact.fingerprint
    assert again.read("config.json") == artifact.read("config.json")
    tensors, before = load(again.read(WEIGHTS)), load(artifact.read(WEIGHTS))  # headers name their run
    assert tensors.keys() == before.keys() and all(torch.equal(tensors[name], before[name]) for name in before)


def test_diffusers_content_names_the_artifact(tmp_path: Path) -> None:
    """Another weight, or another entry of the configuration, is another artifact."""
    saved(tmp_path, "AutoencoderKL")
    recipe, prints = recipe_on(tmp_path), set()

    def note() -> None:
        prints.add(train_vavae.STAGE.fingerprint(recipe, {})[0])

    note()
    note()
    assert len(prints) == 1
    tensors = load_file(tmp_path / FILE)
    tensors["decoder.conv_out.bias"] += 1
    save_file(tensors, tmp_path / FILE)
    note()
    values = json.loads((tmp_path / "config.json").read_text()) | {"scaling_factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    note()
    assert len(prints) == 3


@torch.no_grad()
def test_diffusers_latents_are_theirs_and_statistics_ours(tmp_path: Path) -> None:
    artifact, recipe, network = taken(tmp_path, "AutoencoderKL")
    job: Job = encode.STAGE.job(recipe, at(tmp_path / "root"), {"train_vavae": artifact.fingerprint, "shard": "shard"})
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    stored = Encoder(job).encode([f"image-{number}" for number in range(5)], pixels)
    assert set(stored) == {"z"} and stored["z"].shape == (5, 4, 4, 4)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    expected = network.encode(images).latent_dist.mean
    np.testing.assert_allclose(stored["z"], expected.numpy(), atol=2e-3)
    moments = ChannelSums.of(stored["z"]).mean_and_std()
    np.testing.assert_allclose(moments["std"], stored["z"].astype(np.float64).std(axis=(0, 2, 3)), rtol=1e-5)
    assert not np.allclose(moments["std"], 0.18215 * expected.numpy().std(axis=(0, 2, 3)), rtol=0.1)
    assert theirs("AutoencoderKL").config.scaling_factor == 0.18215


@torch.no_grad()
@pytest.mark.parametrize("class_name", ["AutoencoderKL", "AutoencoderDC", "AutoencoderRAE"])
def test_diffusers_decoder_makes_the_samples_from_standardised_latents(class_name: str, tmp_path: Path) -> None:
    artifact, _, network = taken(tmp_path, class_name)
    few = "sample.images=4", "sample.batch=4", "sample.labels=random"
    recipe, root = recipe_on(tmp_path / "theirs", class_name, *few), at(tmp_path / "root")
    channels = recipe.latent_channels
    statistics = {"z": {"mean": [0.25] * channels, "std": [0.5] * channels, "count": 1}}
    facts = {"statistics": statistics, "statistics_hash": statistics_hash(statistics)}
    put(root, recipe, "encode", [], facts=facts)
    dit = build_network(recipe, recipe.train_dit.model)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    put_weights(root, recipe, "train_dit", {WEIGHTS: dit, EMA_WEIGHTS: dit}, facts=facts)
    made = context(root, recipe, sample.STAGE, "encode", "train_dit", train_vavae=artifact.fingerprint)
    sampler = Sampler.of(made)
    seen: list[torch.Tensor] = []
    decode = sampler.decoder.tokenizer.decode
    sampler.decoder.tokenizer.decode = lambda z: decode(seen.append(z) or z)  # type: ignore[method-assign,func-returns-value]
    _, pixels = sampler.images(np.arange(4))
    (latents,) = seen
    assert pixels.shape == (4, 32, 32, 3) and pixels.dtype == np.uint8 and len({each.tobytes() for each in pixels}) == 4
    image = network.decode(latents, return_dict=False)[0]
    image = 2 * image - 1 if class_name == "AutoencoderRAE" else image
    assert np.abs(pixels.astype(int) - to_pixels(image).astype(int)).max() <= 1
    assert abs(float(latents.mean()) - 0.25) < 0.2, "in the tokenizer's own scale"


@torch.no_grad()
@pytest.mark.parametrize("class_name", ["AutoencoderKL", "AutoencoderRAE"])
def test_diffusers_reconstructions_are_scored(class_name: str, tmp_path: Path) -> None:
    artifact, recipe, network = taken(tmp_path, class_name)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    examiner = FeatureExtractor(FeatureNetworks(32, recipe.evaluate.features, tokenizer=artifact))
    found = examiner.look(np.zeros(5, np.int64), pixels, reconstruct=True)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    zero_to_one = class_name == "AutoencoderRAE"
    latents = network.encode((images + 1) / 2 if zero_to_one else images, return_dict=False)[0]
    again = network.decode(latents if zero_to_one else latents.mean, return_dict=False)[0]
    expected = peak_signal_to_noise(pixels, to_pixels(2 * again - 1 if zero_to_one else again))
    assert found.psnr is not None and found.ssim is not None
    np.testing.assert_allclose(found.psnr, expected, rtol=1e-3)
