"""Weights in the authors' layout take a training's place; sampling and scores run unchanged from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from configs import load_recipe
from infra.artifacts import Artifact
from models.checkpoints import Checkpoint, write_authors
from tasks.networks import build_dit
from tests.flows.conftest import Workplace


def test_sampling_runs_from_an_imported_checkpoint(finished: Workplace, tmp_path: Path) -> None:
    recipe = load_recipe("demo_tiny")
    torch.manual_seed(7)
    network = build_dit(recipe, recipe.train_dit.model)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    theirs = tmp_path / "theirs.pt"
    write_authors(theirs, Checkpoint("lightningdit", dict(network.state_dict())))
    before = finished.manifests()
    finished.run("--set", "train_dit.images=0", "--set", f"train_dit.pretrained={theirs}")
    assert finished.rebuilt_since(before) == {"train_dit", "sample", "evaluate", "report"}
    (fingerprint,) = finished.manifests()["train_dit"].keys() - before["train_dit"].keys()
    imported = load(Artifact(f"file://{finished.root}", "train_dit", fingerprint).read("model.safetensors"))
    for name, value in network.state_dict().items():
        assert torch.equal(imported[name], value), name


@pytest.mark.slow
def test_a_checkpoint_of_another_network_is_refused(finished: Workplace, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.pt"
    torch.save({"model": {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}}, theirs)
    refused = finished.run("--set", "train_dit.images=0", "--set", f"train_dit.pretrained={theirs}", check=False)
    assert refused.returncode == 1
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "theirs.pt" in line
    assert "Traceback" not in refused.stderr
