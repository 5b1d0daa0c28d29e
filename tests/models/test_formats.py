"""The authors' argument names, and arguments read off tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.formats import (
    autoencoder_from_authors,
    build,
    groups_of,
    infer_arguments,
    kind_of,
    lightningdit_from_authors,
    lightningdit_to_authors,
)
from models.groups import SFD, ChannelGroups
from models.sizes import SIZES

GOLDEN = Path(__file__).parents[1] / "golden"
NAMED = {path.stem: json.loads(path.read_text()) for path in GOLDEN.glob("*.json")}
CASES = [name for name, case in NAMED.items() if "model" in case and "head_hidden" not in case["model"]]
"""Those in their authors' arguments: the wide head's are ours (`test_golden`)."""


def authors_arguments(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{case}.json").read_text())["model"]


@pytest.mark.parametrize("case", CASES)
def test_arguments_go_there_and_back(case: str) -> None:
    ours = lightningdit_from_authors(authors_arguments(case))
    assert lightningdit_from_authors(lightningdit_to_authors(ours)) == ours
    json.dumps(ours)


@pytest.mark.parametrize("case", CASES)
def test_arguments_are_read_off_the_tensors(case: str) -> None:
    ours = lightningdit_from_authors(authors_arguments(case))
    tensors = build("lightningdit", ours).state_dict()
    semantic = groups_of(ours).sizes[1] if "groups" in ours else None
    # Without rotary table, query norm or a published size, heads leave no trace in the tensors.
    assert infer_arguments(tensors, num_heads=ours["num_heads"], semantic_channels=semantic) == ("lightningdit", ours)
    if ours["rope"]:
        assert infer_arguments(tensors, semantic_channels=semantic)[1]["num_heads"] == ours["num_heads"]
    else:
        with pytest.raises(ValueError, match="num_heads"):
            infer_arguments(tensors)
    if semantic:
        with pytest.raises(ValueError, match="semantic_channels"):
            infer_arguments(tensors)


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_need_no_hints(size: str) -> None:
    ours = {"input_size": 16, "in_channels": 48, "num_classes": 1000, "rope": False, **SIZES[size]}
    ours["groups"] = {"names": list(SFD.names), "sizes": list(SFD.sizes)}
    with torch.device("meta"):
        tensors = build("lightningdit", ours).state_dict()
    _, found = infer_arguments(tensors)
    assert {name: found[name] for name in ours} == ours


def test_autoencoder_arguments_are_read_off_the_tensors() -> None:
    authors = json.loads((GOLDEN / "vavae.json").read_text())
    ours = autoencoder_from_authors(authors)
    assert ours["attention_levels"] == [1]
    kind, found = infer_arguments(build("autoencoder", ours).state_dict())
    assert kind == "autoencoder"
    assert found == {name: value for name, value in ours.items() if name != "dropout"} | {"decoder_attention": True}
    squares = {"z_channels": 4, "base_channels": 8, "channel_multipliers": [1, 2], "patch_size": 4, "norm_groups": 4}
    squares |= {"attention_levels": [], "linear_path": True}
    found = infer_arguments(build("autoencoder", squares).state_dict())[1]
    assert (found["patch_size"], found["in_channels"], found["out_channels"]) == (4, 3, 3)
    assert found["linear_path"] is True and "linear_path" not in ours
    bare = {"z_channels": 16, "decoder_attention": False}
    with torch.device("meta"):
        assert infer_arguments(build("autoencoder", bare).state_dict())[1]["decoder_attention"] is False


def test_semantic_vae_arguments_are_read_off_the_tensors() -> None:
    ours = {"feature_dim": 10, "width": 16, "depth": 2, "num_heads": 2, "bottleneck": 3}
    tensors = build("semantic_vae", ours).state_dict()
    assert infer_arguments(tensors, num_heads=2) == ("semantic_vae", ours)
    with pytest.raises(ValueError, match="num_heads"):
        infer_arguments(tensors)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown LightningDiT arguments use_magic"):
        lightningdit_from_authors({"use_magic": True})
    with pytest.raises(ValueError, match="mlp_ratio"):
        lightningdit_from_authors({"mlp_ratio": 3.0})
    with pytest.raises(ValueError, match=r"no network we know.*somebody.weight"):
        kind_of({"somebody.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="kind must be one of"):
        build("unet", {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wings"):
        build("semantic_vae", {"wings": 2})
    odd = {"in_channels": 4, "groups": ChannelGroups(("left", "right"), (2, 2))}
    with pytest.raises(ValueError, match="texture and semantic"):
        lightningdit_to_authors(odd)
