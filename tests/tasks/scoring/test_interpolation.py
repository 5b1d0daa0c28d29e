"""Nearest neighbours and midpoints as by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.data.images import images
from tasks.data.pixels import to_pixels, to_tensor
from tasks.networks import WEIGHTS, build_autoencoder, load_foundation, trained_autoencoder
from tasks.scoring import interpolation
from tasks.scoring.distances import frechet_distance
from tasks.scoring.features import FeatureNetworks
from tasks.scoring.gaussian import Gaussian
from tasks.scoring.interpolation import interpolation_features, midpoints, nearest_neighbours
from tests.helpers.builders import at, context, put_shard, put_weights, small_recipe


@pytest.mark.parametrize("rows", [3, 512])
def test_neighbours_are_the_nearest_others(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpolation, "_ROWS_AT_ONCE", rows)
    points = np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    np.testing.assert_array_equal(nearest_neighbours(points), distances.argmin(axis=1))


def test_a_twin_is_the_nearest_and_a_point_is_never_its_own() -> None:
    points = np.array([[0.0, 0.0], [5.0, 5.0], [0.0, 0.0], [5.0, 4.0]], np.float32)
    assert nearest_neighbours(points).tolist() == [2, 3, 0, 1]
    with pytest.raises(ValueError, match="1 points have no neighbours"):
        nearest_neighbours(points[:1])


def test_midpoints_are_of_neighbours_where_channels_count_alike() -> None:
    """A channel of a thousand times the scale decides nothing more than the others."""
    random = np.random.default_rng(0)
    latents = random.normal(size=(12, 2, 2, 2)).astype(np.float32)
    loud = latents * np.array([1000.0, 1.0], np.float32)[:, None, None]
    np.testing.assert_allclose(midpoints(loud), midpoints(latents) * [[[1000.0]], [[1.0]]], rtol=1e-4)
    flat = (latents / latents.std(axis=(0, 2, 3))[:, None, None]).reshape(12, -1)
    nearest = nearest_neighbours(flat)
    np.testing.assert_allclose(midpoints(latents)[3], (latents[3] + latents[nearest[3]]) / 2, rtol=1e-6)
    same = np.ones((3, 1, 1, 1), np.float32)
    np.testing.assert_array_equal(midpoints(same), same)


@torch.no_grad()
def test_the_distance_is_that_of_decoded_midpoints_from_the_training_images(tmp_path: Path, actors_here: None) -> None:
    recipe, root = small_recipe("evaluate_tokenizer.interpolation_images=30"), at(tmp_path)
    shards = put_shard(root, recipe, train=40, test=10)
    torch.manual_seed(0)
    tokenizer = put_weights(root, recipe, "train_vavae", {WEIGHTS: build_autoencoder(recipe.train_vavae.model)})
    networks = FeatureNetworks(32, recipe.evaluate.features, tokenizer=tokenizer)
    real, halves = interpolation_features(shards, networks, 32, 30, recipe.compute.actors)
    shown = np.concatenate([each for _, each in images(shards, "train", 32, 30)])
    assert len(shown) == real.images == len(halves.labels) == 30
    vae, features = trained_autoencoder(tokenizer), load_foundation(recipe.evaluate.features)
    latents = vae.encode(to_tensor(shown)).mean.numpy()
    again = to_tensor(to_pixels(vae.decode(torch.from_numpy(midpoints(latents)))))
    np.testing.assert_allclose(
        halves.features, features(again).mean(dim=(2, 3)).numpy(), rtol=2e-3, atol=2e-2
    )  # a level may round away
    from tasks.evaluate_tokenizer import STAGE, _interpolation

    scores = _interpolation(context(root, recipe, STAGE, "shard", "train_vavae"), networks)
    expected = frechet_distance(real.gaussians["features"], Gaussian.of(halves.features))
    assert scores == {"interpolation_frechet_efficientnet_lite0": pytest.approx(expected, rel=1e-4)}
    assert expected > 0 and not any("fid" in name for name in scores)
