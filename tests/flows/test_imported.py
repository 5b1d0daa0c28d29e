"""Weights in the authors' layout take a training's place; sampling and scores run unchanged from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from configs import load_recipe
from flows.picture import draw
from infra.artifacts import Artifact
from models.checkpoints import Checkpoint, write_authors
from tasks.networks import build_dit
from tests.flows.conftest import Workplace


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of random weights in the authors' layout, and what is in it."""
    recipe = load_recipe("demo_tiny")
    torch.manual_seed(7)
    network = build_dit(recipe, recipe.train_dit.model)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    write_authors(tmp_path / "theirs.pt", Checkpoint("lightningdit", dict(network.state_dict())))
    return tmp_path / "theirs.pt", dict(network.state_dict())


def test_sampling_runs_from_an_imported_checkpoint(
    finished: Workplace, theirs: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    path, weights = theirs
    changes = ["train_dit.images=0", f"train_dit.pretrained={path}"]
    before = finished.manifests()
    finished.run("--only", "train_dit", "--set", changes[0], "--set", changes[1])
    assert finished.rebuilt_since(before) == {"train_dit"}
    (fingerprint,) = finished.manifests()["train_dit"].keys() - before["train_dit"].keys()
    imported = load(Artifact(f"file://{finished.root}", "train_dit", fingerprint).read("model.safetensors"))
    for name, value in weights.items():
        assert torch.equal(imported[name], value), name
    drawn = [
        draw("demo_tiny", [3, 4], 0, tmp_path / f"{number}.png", overrides=overrides, root=finished.root).read_bytes()
        for number, overrides in enumerate([changes, []])
    ]
    assert drawn[0] != drawn[1], "from their weights, not from ours"


@pytest.mark.slow
def test_scores_run_from_an_imported_checkpoint(
    finished: Workplace, theirs: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    before = finished.manifests()
    finished.run("--set", "train_dit.images=0", "--set", f"train_dit.pretrained={theirs[0]}")
    assert finished.rebuilt_since(before) == {"train_dit", "sample", "evaluate", "report"}


@pytest.mark.slow
def test_a_checkpoint_of_another_network_is_refused(finished: Workplace, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.pt"
    torch.save({"model": {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}}, theirs)
    refused = finished.run("--set", "train_dit.images=0", "--set", f"train_dit.pretrained={theirs}", check=False)
    assert refused.returncode == 1
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "theirs.pt" in line
    assert "Traceback" not in refused.stderr
