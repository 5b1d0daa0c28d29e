"""Averages of other widths from a training's snapshots, as a sample asks for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from configs import Recipe, UserError, load_recipe
from infra.artifacts import Artifact
from models.power_ema import Average, combination
from tasks.networks import build_dit, trained_dit
from tasks.snapshots import snapshot_file
from tests.helpers.builders import at, put_networks, put_weights, small_recipe

STORED = [(images, sigma) for images in (320, 640) for sigma in (0.05, 0.1)]


def trained(root: str, recipe: Recipe) -> tuple[Artifact, dict[tuple[int, float], torch.nn.Module]]:
    put_networks(root, recipe)
    networks = {}
    for each in STORED:
        networks[each] = build_dit(recipe, recipe.train_dit.model)
        with torch.no_grad():
            for parameter in networks[each].parameters():
                if parameter.requires_grad:
                    parameter.normal_()
    storage = Artifact(root, "train_dit", "train_dit").storage
    weights = {"model.safetensors": networks[STORED[-1]]}
    files = {snapshot_file(*each): network for each, network in networks.items()}
    for name in files:
        storage.write_bytes(name, save(files[name].state_dict()))
    return put_weights(root, recipe, "train_dit", weights | files), networks


def test_a_sample_takes_an_average_of_any_width(tmp_path: Path) -> None:
    recipe = small_recipe()
    artifact, networks = trained(at(tmp_path), recipe)
    found = trained_dit(artifact, ema=True, sigma_rel=0.08).state_dict()
    shares = combination([Average(*each) for each in STORED], Average(640, 0.08))
    for name, parameter in networks[STORED[0]].named_parameters():
        if parameter.requires_grad:
            parts = [networks[each].state_dict()[name] for each in STORED]
            expected = sum(float(share) * part for share, part in zip(shares, parts, strict=True))
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


def test_no_snapshots_no_average(tmp_path: Path) -> None:
    put_networks(at(tmp_path), small_recipe())
    with pytest.raises(UserError, match="has no snapshots"):
        trained_dit(Artifact(at(tmp_path), "train_dit", "train_dit"), ema=True, sigma_rel=0.08)
    with pytest.raises(UserError, match="snapshot_every stores no snapshots"):
        load_recipe("demo_tiny", ["sample.ema_sigma=0.08"])
    wide = "train_dit.ema_sigmas=[0.05,0.1]"
    asked = load_recipe("demo_tiny", ["sample.ema_sigma=0.08", wide, "train_dit.snapshot_every=320"])
    assert asked.section("sample")["ema_sigma"] == 0.08
    assert "ema_sigma" not in load_recipe("demo_tiny").section("sample"), "fingerprints stay as they were"
