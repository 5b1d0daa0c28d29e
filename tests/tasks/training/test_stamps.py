"""Files of weights that stages write say what they are, and reading them back needs nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from configs import load_recipe
from configs.errors import UserError
from flows.weights import app
from infra.weights import load_checkpoint
from models.checkpoints import facts_of, read_statistics, stamped
from models.formats import build
from tasks.networks import build_autoencoder, build_network, build_semantic_vae, kind_and_arguments
from tasks.snapshots import kept_file, snapshot_file
from tasks.stage import Context, Job
from tasks.training.stamps import Stamp
from tests.helpers.builders import small_recipe


def context_of(stage: str, recipe: str = "demo_tiny") -> Context:
    values = load_recipe(recipe).model_dump(mode="json")
    return Context(Job(stage, "0123456789abcdef", "file:///nowhere", values, {}, {"train_dit": {"images": 7}}))


@pytest.mark.parametrize("recipe", ["demo_tiny", "lowdiff_tiny", "lowdiff_pixels_tiny", "sfd_xl_80ep"])
def test_what_is_said_of_a_diffusion_network_builds_it(recipe: str) -> None:
    loaded = load_recipe(recipe)
    with torch.device("meta"):
        said, built = build(*kind_and_arguments(loaded, "train_dit")), build_network(loaded, loaded.train_dit.model)
    assert type(said) is type(built)
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (said, built)]
    assert shapes[0] == shapes[1]
    assert getattr(said, "groups", None) == getattr(built, "groups", None)


def test_what_is_said_of_tokenizers_builds_them() -> None:
    recipe = small_recipe()
    assert recipe.train_semvae is not None and recipe.foundation is not None
    pairs = [
        (kind_and_arguments(recipe, "train_vavae"), build_autoencoder(recipe.train_vavae.model)),
        (
            kind_and_arguments(recipe, "train_semvae"),
            build_semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim),
        ),
    ]
    for said, built in pairs:
        build(*said).load_state_dict(built.state_dict())


def test_inspect_of_our_own_file_tells_all_and_export_writes_statistics(tmp_path: Path) -> None:
    recipe = load_recipe("demo_tiny")
    context = context_of("train_dit")
    facts = {"statistics": {"z": {"mean": [0.1] * 8, "std": [1 / 3] * 8}, "s": {"mean": [0.2] * 4, "std": [2.0] * 4}}}
    sizes = list(recipe.channel_groups.values())
    for name, size in zip(("z", "s"), sizes, strict=True):
        facts["statistics"][name] = {each: values[:1] * size for each, values in facts["statistics"][name].items()}
    network = build_network(recipe, recipe.train_dit.model)
    file = tmp_path / "ema.safetensors"
    file.write_bytes(Stamp(context, facts).network(save(network.state_dict()), file.name))

    shown = CliRunner().invoke(app, ["inspect", str(file)], env={"COLUMNS": "200"}, catch_exceptions=False).output
    for told in ("lightningdit", "statistics of texture", "statistics of semantic", "0123456789abcdef", "demo_tiny"):
        assert told in shown, told
    assert "unknown" not in shown and "hidden_size" in shown and "images 7" in shown
    found = load_checkpoint(str(file))
    assert found.made["stage"] == "train_dit" and found.tensors.keys() == network.state_dict().keys()
    build(found.kind, found.arguments).load_state_dict(found.tensors)

    CliRunner().invoke(app, ["export", str(file), str(tmp_path / "theirs.pt")], catch_exceptions=False)
    theirs = read_statistics(tmp_path / "latents_stats.pt")
    assert torch.equal(theirs.std, torch.full((sizes[0],), 1 / 3)) and theirs.std.dtype == torch.float32
    assert len(read_statistics(tmp_path / "latents_sv_stats.pt").mean) == sizes[1]


def test_what_is_no_network_says_so(tmp_path: Path) -> None:
    stamp = Stamp(context_of("train_dit"), {})
    file = tmp_path / "snapshot.safetensors"
    file.write_bytes(stamp.snapshot(save({"a": torch.ones(2)}), snapshot_file(9, 0.1)))
    assert facts_of(file)["kind"].startswith("a snapshot")
    with pytest.raises(UserError, match="a snapshot for averages of another width, which is no network"):
        load_checkpoint(str(file))
    shown = CliRunner().invoke(app, ["inspect", str(file)], catch_exceptions=False).output
    assert "snapshot" in shown and "train_dit" in shown
    file.write_bytes(stamp.snapshot(save({"a": torch.ones(2)}), kept_file(9)))
    assert facts_of(file)["kind"] == "lightningdit"


def test_a_stamp_leaves_tensors_alone_and_is_the_same_every_time(tmp_path: Path) -> None:
    data = save({"odd": torch.arange(3, dtype=torch.uint8), "b": torch.randn(5, 2), "c": torch.zeros(0)})
    once = stamped(data, {"kind": "x", "made": {}})
    assert all(stamped(data, {"made": {}, "kind": "x"}) == once for _ in range(8))
    file = tmp_path / "stamped.safetensors"
    file.write_bytes(once)
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes(data)
    found, before = load_file(file), load_file(plain)
    assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)
    assert int.from_bytes(once[:8], "little") % 8 == 0, "tensors stay aligned"
    assert facts_of(plain) == {}
