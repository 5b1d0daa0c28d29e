"""Checkpoint files: safe reading, and authors' layout to ours to authors' layout, bit for bit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoints import (
    Checkpoint,
    Statistics,
    load_into,
    read,
    read_statistics,
    write,
    write_authors,
    write_statistics,
)
from models.formats import build
from tests.models.conftest import small_dit, stirred

GOLDEN = Path(__file__).parents[1] / "golden"


def weights(case: str, prefix: str = "w.") -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def authors_model(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{case}.json").read_text())["model"]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: 2 * value for name, value in tensors.items()}


def semantic_vae_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    arguments = {"feature_dim": 10, "width": 16, "depth": 1, "num_heads": 2, "bottleneck": 3}
    return stirred(build("semantic_vae", arguments)).state_dict()


def file_of(case: str) -> dict[str, Any]:
    """The content of a published file, with everything the authors leave in it."""
    if case == "semantic_vae":
        facts = {"iteration": 7, "input_dim": 10, "bottleneck_dim": 3, "loss": np.float64(0.5)}
        return {"model_state_dict": semantic_vae_weights(), "config": argparse.Namespace(lr=5e-5), **facts}
    tensors = weights(case)
    if case == "vavae":
        return {
            "state_dict": tensors
            | {
                "linear_proj.weight": torch.randn(8, 4, 1, 1),
                "loss.logvar": torch.zeros(()),
                "loss.perceptual_loss.net.slice1.0.weight": torch.zeros(2),
                "foundation_model.model.cls_token": torch.zeros(1, 1, 3),
            },
            "epoch": 50,
        }
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    return {"model": doubled(tensors), "ema": tensors, "opt": optimizer, "config": {"model": authors_model(case)}}


@pytest.mark.parametrize("case", ["lightningdit_base", "lightningdit_qknorm_patch2", "dit_plain", "sfd_model", "vavae"])
def test_authors_to_ours_to_authors_is_bitwise(case: str, tmp_path: Path) -> None:
    there, ours, back = tmp_path / "a.pt", tmp_path / "b.safetensors", tmp_path / "c.pt"
    original = file_of(case)
    torch.save(original, there)
    imported = read(there)
    write(ours, imported)
    write_authors(back, read(ours))
    returned = torch.load(back, weights_only=True)
    for key in ("model", "ema", "state_dict"):
        if key in original:
            kept = ("loss.", "foundation_model.")
            same(returned[key], {n: v for n, v in original[key].items() if not n.startswith(kept)})
    # And the network that ours describes is theirs.
    model = build(imported.kind, imported.arguments)
    model.load_state_dict(read(ours).tensors, strict=True)


def test_semantic_vae_goes_there_and_back(tmp_path: Path) -> None:
    torch.save(file_of("semantic_vae"), tmp_path / "a.pt")
    imported = read(tmp_path / "a.pt", num_heads=2)
    assert imported.kind == "semantic_vae" and imported.arguments["bottleneck"] == 3
    write(tmp_path / "b.safetensors", imported)
    write_authors(tmp_path / "c.pt", read(tmp_path / "b.safetensors"))
    returned = torch.load(tmp_path / "c.pt", weights_only=True)
    same(returned["model_state_dict"], semantic_vae_weights())
    assert (returned["input_dim"], returned["bottleneck_dim"]) == (10, 3)


def test_low_precision_survives(tmp_path: Path) -> None:
    tensors = {name: value.bfloat16() for name, value in weights("vavae").items()}
    torch.save({"state_dict": tensors}, tmp_path / "a.ckpt")
    write(tmp_path / "b.safetensors", read(tmp_path / "a.ckpt"))
    same(read(tmp_path / "b.safetensors").tensors, tensors)


@pytest.mark.parametrize("nesting", [("ema",), ("model",), ("state_dict",), ()])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_nesting_and_wrapper_prefixes(nesting: tuple[str, ...], prefix: str, tmp_path: Path) -> None:
    expected = weights("lightningdit_base")
    content: dict[str, Any] = {prefix + name: value for name, value in expected.items()}
    for key in nesting:
        content = {key: content, "config": {}}
    torch.save(content, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    same(found.tensors, expected)
    assert found.nesting == nesting and not found.raw
    assert found.arguments["num_heads"] == 2


def test_compiled_submodules_are_unwrapped(tmp_path: Path) -> None:
    expected = weights("lightningdit_base")
    content = {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in expected.items()}
    torch.save(content, tmp_path / "a.pt")
    same(read(tmp_path / "a.pt").tensors, expected)


def test_average_is_preferred_and_raw_weights_are_kept(tmp_path: Path) -> None:
    torch.save(file_of("lightningdit_base"), tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    same(found.tensors, weights("lightningdit_base"))
    same(found.raw, doubled(weights("lightningdit_base")))
    model = build(found.kind, found.arguments)
    load_into(model, found, "a.pt", which="raw")
    same(model.state_dict(), found.raw)


def test_extra_networks_are_left_out_and_said(tmp_path: Path) -> None:
    torch.save(file_of("vavae"), tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    same(found.tensors, weights("vavae"))
    assert list(found.extra) == ["linear_proj.weight"]
    assert len(found.dropped) == 3 and "foundation_model.model.cls_token" in found.dropped


def test_plain_safetensors_without_metadata(tmp_path: Path) -> None:
    save_file({f"module.{name}": value for name, value in weights("sfd_model").items()}, tmp_path / "a.safetensors")
    found = read(tmp_path / "a.safetensors", semantic_channels=4)
    same(found.tensors, weights("sfd_model"))
    assert found.arguments["groups"]["sizes"] == [8, 4]
    assert read(tmp_path / "a.safetensors").arguments == {}, "unknown semantic channels leave the config open"


def test_files_of_other_things_are_named(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"list\.pt: expected a dictionary"):
        read(tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"other\.pt: these tensors belong to no network.*such as a\.weight"):
        read(tmp_path / "other.pt")


def test_statistics_files_go_there_and_back(tmp_path: Path) -> None:
    content = {"mean": torch.randn(1, 8, 1, 1), "std": torch.rand(1, 8, 1, 1) + 0.5}
    torch.save(content, tmp_path / "latents_stats.pt")
    statistics = read_statistics(tmp_path / "latents_stats.pt")
    assert statistics.mean.shape == (8,)
    write_statistics(tmp_path / "back.pt", statistics)
    same(torch.load(tmp_path / "back.pt", weights_only=True), content)
    torch.save({"mean": torch.zeros(2), "std": torch.zeros(2)}, tmp_path / "flat.pt")
    with pytest.raises(ValueError, match="std above 0"):
        read_statistics(tmp_path / "flat.pt")
    torch.save({"mean": torch.tensor([0.0, float("nan")]), "std": torch.ones(2)}, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match="one finite value per channel"):
        read_statistics(tmp_path / "nan.pt")
    torch.save({"mean": torch.zeros(2)}, tmp_path / "half.pt")
    with pytest.raises(ValueError, match="'mean' and 'std', found mean"):
        read_statistics(tmp_path / "half.pt")


def test_statistics_travel_with_the_weights(tmp_path: Path) -> None:
    model = small_dit()
    statistics = {
        "texture": Statistics(torch.randn(4), torch.ones(4)),
        "semantic": Statistics(torch.randn(2), torch.ones(2)),
    }
    write(
        tmp_path / "m.safetensors", Checkpoint("lightningdit", model.state_dict(), {"depth": 2}, statistics=statistics)
    )
    found = read(tmp_path / "m.safetensors")
    assert found.arguments == {"depth": 2}
    for group, expected in statistics.items():
        assert torch.equal(found.statistics[group].mean, expected.mean)
        assert torch.equal(found.statistics[group].std, expected.std)


def test_loading_is_strict_but_for_the_alignment_head() -> None:
    headed, plain = small_dit(), small_dit(align_depth=None, align_dim=None, depth=2)
    load_into(plain, Checkpoint("lightningdit", headed.state_dict()), "headed")
    same(plain.state_dict(), {n: v for n, v in headed.state_dict().items() if not n.startswith("repa_projector.")})
    before = {name: value.clone() for name, value in headed.state_dict().items() if name.startswith("repa_projector.")}
    load_into(headed, Checkpoint("lightningdit", doubled(plain.state_dict())), "plain")
    same({name: headed.state_dict()[name] for name in before}, before)
    assert torch.equal(headed.final_layer.linear.bias, 2 * plain.final_layer.linear.bias)
    with pytest.raises(ValueError, match=r"deep\.pt does not fit this LightningDiT: \d+ tensors unknown.*blocks\.2"):
        load_into(small_dit(), Checkpoint("lightningdit", small_dit(depth=3).state_dict()), "deep.pt")
    with pytest.raises(ValueError, match="of another shape"):
        load_into(small_dit(), Checkpoint("lightningdit", small_dit(num_classes=9).state_dict()), "more.pt")


def test_weights_with_a_value_residual_are_another_network_though_no_tensor_says_so() -> None:
    plain, residual = small_dit(), small_dit(value_residual=True)
    for model, told, words in ((residual, {"depth": 2}, "without"), (plain, {"value_residual": True}, "with")):
        given = Checkpoint("lightningdit", plain.state_dict(), told)
        with pytest.raises(ValueError, match=f"trained {words} a value residual"):
            load_into(model, given, "a.safetensors")
    load_into(residual, Checkpoint("lightningdit", plain.state_dict(), {"value_residual": True}), "same")
    load_into(residual, Checkpoint("lightningdit", plain.state_dict()), "of unknown arguments")
