"""Whole runs on autoencoders that are not ours: images to scored samples, the cache, resume, and a cluster's job."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.artifacts import Artifact
from tests.flows.conftest import Workplace
from tests.helpers.foreign import saved, section
from tests.helpers.nodes import ray_nodes

pytestmark = pytest.mark.slow
ONLINE = "{posterior: mean, align_features: false, latents: online}"
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "kl4": ("AutoencoderKL", {}),
    "kl16": ("AutoencoderKL", {"latent_channels": 16}),
    "dc": ("AutoencoderDC", {}),
    "rae": ("AutoencoderRAE", {}),
}
WHOLE = ("kl16", "dc", "rae")
"""One of each class, from images to a report: trained further, taken as it is, and with latents made in training."""
REDONE = "kl16"
"""Cached, drawn again and resumed as well; a whole flow takes minutes."""


def twin(folder: Path, name: str) -> Path:
    """A recipe on a tiny network of diffusers, and the network."""
    class_name, changes = TWINS[name]
    saved(folder / name, class_name, **changes)
    channels = {"channels": changes["latent_channels"]} if changes else {}
    model = section(class_name, folder / name, **channels)
    recipe = folder / f"{name}.yaml"
    trained = {"images": 64, "batch": 32} if name == "kl16" else {"images": 0}
    recipe.write_text(
        f"""extends: demo_tiny
shard: {{limit: 200}}
train_vavae: {json.dumps(trained | {"model": model})}
train_semvae: null
encode: {ONLINE if name == "rae" else "{align_features: false}"}
train_dit:
  images: 96
  clock: {{kind: synchronous}}
  objective: {{semantic_weight: 1.0, align_weight: 0.0}}
  model: {{align_depth: null}}
sample: {{guidance: {{method: none}}, images: 40}}
compute: {{train: {{checkpoint_every: 32}}}}
"""
    )
    return recipe


@pytest.mark.parametrize("name", WHOLE)
def test_diffusers_twin_runs_whole_and_is_cached(name: str, workplace: Workplace, tmp_path: Path) -> None:
    recipe = twin(tmp_path, name)
    here = replace(workplace, root=str(tmp_path / "artifacts"))

    def run(*more: str) -> None:
        here.flows("run", "sfd-full", "--recipe", str(recipe), "--root", here.root, *more)

    run()
    made = here.manifests()
    assert {"shard", "train_vavae", "encode", "train_dit", "sample", "evaluate", "report"} <= set(made)
    (print_,) = made["encode"]
    facts = Artifact(f"file://{here.root}", "encode", print_).manifest.facts
    channels = TWINS[name][1].get("latent_channels", section(TWINS[name][0], "")["channels"])
    assert facts["shapes"] == ({} if name == "rae" else {"z": [channels, 4, 4]}), "representations are made in training"
    assert len(facts["statistics"]["z"]["mean"]) == channels
    if name != REDONE:
        return
    run()
    assert here.manifests() == made, "the same again is all cached"
    run("--set", "sample.steps=3")
    assert here.rebuilt_since(made) == {"sample", "evaluate", "report"}
    latents = Path(here.root) / "encode" / print_
    files = Artifact(f"file://{here.root}", "encode", print_).manifest.files
    (latents / "manifest.json").unlink()
    (latents / "receipts" / "train" / "part-00000.parquet.json").unlink()
    before = here.manifests()
    run()
    assert here.rebuilt_since(before) == {"encode"}, "what was made of it is there"
    assert Artifact(f"file://{here.root}", "encode", print_).manifest.files == files, "the same bytes, resumed"


def test_diffusers_twin_is_encoded_by_a_cluster_job(workplace: Workplace, tmp_path: Path) -> None:
    recipe = twin(tmp_path, "kl4")
    with ray_nodes(workplace.environment, head_cpus=2) as cluster:
        environment = {**workplace.environment, **cluster.environment}
        there = replace(workplace, root=str(tmp_path / "artifacts"), environment=environment)
        for stage in ("shard", "train_vavae", "encode"):
            there.flows("run", "sfd-full", "--recipe", str(recipe), "--root", there.root, "--only", stage)
        submitted = [name for name in cluster.jobs() if "-encode-" in name]
    assert len(submitted) == 1 and len(there.manifests()["encode"]) == 1
