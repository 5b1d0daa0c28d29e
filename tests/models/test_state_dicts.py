"""Networks are found wherever training codes keep them, and averages before raw weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.autoencoder import AutoencoderKL
from models.checkpoints import check_whole, read, write_authors
from models.formats import build
from models.lightningdit import LightningDiT
from tests.helpers.published import save_lightningdit, save_sfd, save_tokenizer
from tests.models.conftest import small_dit, stirred
from tests.models.test_files import sharded

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def vae() -> Tensors:
    return stirred(
        AutoencoderKL(base_channels=32, channel_multipliers=(1, 2), blocks_per_level=1, z_channels=4, embed_dim=4,
                      attention_levels=())
    ).state_dict()  # fmt: skip


@pytest.fixture(scope="module")
def dit() -> Tensors:
    return stirred(
        LightningDiT(input_size=4, patch_size=1, in_channels=4, hidden_size=64, depth=2, num_heads=2, num_classes=10)
    ).state_dict()


def prefixed(state: Tensors, prefix: str) -> Tensors:
    return {prefix + name: value for name, value in state.items()}


def averaged(state: Tensors) -> Tensors:
    """Averages of these weights: other numbers where something is trained, the same tables."""
    return {name: value if name in FIXED else value + 1 for name, value in state.items()}


FIXED = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")


def same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def saved(tmp_path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, tmp_path / "w.pt", **options)
    return tmp_path / "w.pt"


def litema(state: Tensors, prefix: str = "") -> Tensors:
    """As latent-diffusion keeps averages: parameters only, names without dots, two counters."""
    own = {f"{prefix}model_ema.{name.replace('.', '')}": value for name, value in state.items() if name not in FIXED}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return own | prefixed(counters, prefix)


@pytest.mark.parametrize(
    "key",
    ["ema", "ema_model", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema", "ema_0.9999", "swa_model"],
)
@pytest.mark.parametrize("beside", ["model", "state_dict", "params", "module"])
def test_averages_are_taken_where_they_lie_beside(key: str, beside: str, dit: Tensors, tmp_path: Path) -> None:
    path = saved(tmp_path, {beside: dit, key: averaged(dit), "opt": {"state": {0: {"exp_avg": torch.zeros(2)}}}})
    found = read(path)
    same(found.tensors, averaged(dit))
    same(found.raw, dit)
    assert found.nesting == (key, beside) and not found.dropped
    write_authors(tmp_path / "back.pt", found)
    assert torch.load(tmp_path / "back.pt", weights_only=True).keys() == (
        {"ema", "model"} if beside in ("params", "module") or key != "ema" else {"ema", beside}
    )


def test_averages_inside_one_state_dict(dit: Tensors, tmp_path: Path) -> None:
    """As ema-pytorch keeps them: two prefixes and two counters."""
    counters = {"initted": torch.tensor(True), "step": torch.tensor(5)}
    content = prefixed(dit, "online_model.") | prefixed(averaged(dit), "ema_model.") | counters
    found = read(saved(tmp_path, {"ema": content}))
    same(found.tensors, averaged(dit))


@pytest.mark.parametrize("trained_only", [True, False])
def test_averages_in_a_list(trained_only: bool, dit: Tensors, tmp_path: Path) -> None:
    """As torch_ema (trained parameters) and diffusers (all parameters) keep them."""
    left_out = FIXED if trained_only else FIXED[1:]
    listed = [value for name, value in averaged(dit).items() if name not in left_out]
    found = read(saved(tmp_path, {"model": dit, "ema": {"decay": 0.999, "shadow_params": listed}}))
    same(found.tensors, averaged(dit))
    same(found.raw, dit)
    with pytest.raises(ValueError, match=r"averages in ema are a list of \d+ tensors that does not follow"):
        read(saved(tmp_path, {"model": dit, "ema": {"shadow_params": listed[:-1]}}))


def test_averages_without_dots(vae: Tensors, dit: Tensors, tmp_path: Path) -> None:
    """As latent-diffusion keeps them: of the autoencoder itself, and of the diffusion model in a whole."""
    found = read(saved(tmp_path, {"state_dict": {**vae, **litema(averaged(vae))}}))
    same(found.tensors, averaged(vae))
    same(found.raw, vae)
    assert found.nesting == ("state_dict.model_ema", "state_dict")
    inner = prefixed(averaged(dit), "diffusion_model.")
    whole = {**prefixed(dit, "model.diffusion_model."), **prefixed(vae, "first_stage_model."), **litema(inner)}
    path = saved(tmp_path, {"state_dict": whole | {"scale_factor": torch.ones(())}})
    same(read(path, kind="lightningdit").tensors, averaged(dit))
    same(read(path, kind="autoencoder").tensors, vae)
    with pytest.raises(ValueError, match=r"holds lightningdit under .*first_stage_model.*say which one with --kind"):
        read(path)
    broken = {name: value for name, value in litema(averaged(vae)).items() if "quant_conv" not in name}
    with pytest.raises(ValueError, match=r"averages \(model_ema\.\*\) beside state_dict lack"):
        read(saved(tmp_path, {"state_dict": {**vae, **broken}}))


def test_empty_averages_are_none(dit: Tensors, tmp_path: Path) -> None:
    found = read(saved(tmp_path, {"model": dit, "ema": {}, "opt": {}}))
    same(found.tensors, dit)
    assert not found.raw and found.nesting == ("model",)


@pytest.mark.parametrize(
    "prefix",
    ["model.", "net.", "network.", "_forward_module.", "module.model._orig_mod.", "a.b.c.", "_fsdp_wrapped_module."],
)
def test_prefixes_of_wrappers(prefix: str, dit: Tensors, tmp_path: Path) -> None:
    found = read(saved(tmp_path, prefixed(dit, prefix)))
    same(found.tensors, dit)
    assert found.arguments["num_heads"] == 2


@pytest.mark.parametrize("wrapper", ["_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module", "module"])
def test_wrappers_within(wrapper: str, dit: Tensors, tmp_path: Path) -> None:
    wrapped = {name.replace("blocks.0.", f"blocks.0.{wrapper}."): value for name, value in dit.items()}
    same(read(saved(tmp_path, {"model": wrapped})).tensors, dit)


def test_a_whole_network_that_was_pickled(tmp_path: Path) -> None:
    network = small_dit()
    found = read(saved(tmp_path, {"net": network, "step": 3}), semantic_channels=2)
    same(found.tensors, dict(network.state_dict()))
    same(read(saved(tmp_path, network)).tensors, dict(network.state_dict()))


def test_half_precision_legacy_and_shards(dit: Tensors, tmp_path: Path) -> None:
    half = {name: value.half() for name, value in dit.items()}
    same(read(saved(tmp_path, {"ema": half})).tensors, half)
    same(read(saved(tmp_path, {"model": dit}, _use_new_zipfile_serialization=False)).tensors, dit)
    found = read(sharded(tmp_path / "shards", {name: value.clone() for name, value in dit.items()}))
    same(found.tensors, dit)
    assert found.arguments["depth"] == 2


def test_several_networks_of_a_kind_are_not_guessed_at(dit: Tensors, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"w\.pt: holds lightningdit under left, lightningdit under right: keep one"):
        read(saved(tmp_path, {"left": dit, "right": dit}))


def test_what_is_not_understood_is_told_with_the_names_seen(vae: Tensors, dit: Tensors, tmp_path: Path) -> None:
    diffusers = {
        "encoder.conv_in.weight": vae["encoder.conv_in.weight"],
        "encoder.down_blocks.0.resnets.0.conv1.weight": torch.ones(32, 32, 3, 3),
        "quant_conv.weight": torch.ones(8, 8, 1, 1),
    }
    for content, words in (
        (diffusers, "is diffusers' AutoencoderKL, whose tensors have other names"),
        ({"transformer_blocks.0.attn1.to_q.weight": torch.ones(1)}, "a transformer of diffusers"),
        ({"model": {"stem.weight": torch.ones(1)}, "opt": {}}, "top keys model, opt; tensors such as stem.weight"),
        ({"curve": [1, 2]}, "no tensors by name"),
        ({"net": nn.Linear(1, 1)}, r"such as weight, bias; objects that were not built: torch\.nn"),
        ({n: v for n, v in dit.items() if n != "blocks.0.mlp.w12.weight"}, "are of the kind lightningdit, but"),
        ({n: v for n, v in dit.items() if n != "blocks.0.attn.qkv.weight"}, "are of the kind lightningdit, but"),
        (dit | {"blocks.1.gate": torch.ones(1)}, r"1 are unknown \(such as blocks.1.gate\)"),
        ({n: v for n, v in vae.items() if n != "decoder.conv_in.weight"}, "decoder.conv_in.weight is missing"),
    ):
        with pytest.raises(ValueError, match=words) as refusal:
            check_whole(read(saved(tmp_path, content)))
        assert "\n" not in str(refusal.value)


def test_files_as_the_authors_codes_write_them(tmp_path: Path, vae: Tensors) -> None:
    network = small_dit(align_depth=2, qk_norm=True)
    tensors = dict(network.state_dict())
    model = {"model_type": "LightningDiT-XL/1", "in_chans": 6, "semantic_chans": 2, "use_repa": True, "repa_depth": 2}
    found = read(save_sfd(tmp_path / "0400000.pt", averaged(tensors), tensors, model))
    same(found.tensors, averaged(tensors))
    same(found.raw, tensors)
    assert found.arguments["groups"] == {"names": ["texture", "semantic"], "sizes": [4, 2]}
    assert found.arguments["align_depth"] == 2
    build("lightningdit", found.arguments).load_state_dict(found.tensors)
    plain = dict(small_dit(in_channels=4, groups=None, align_depth=None, align_dim=None).state_dict())
    model = {"model_type": "LightningDiT-XL/1", "in_chans": 4}
    found = read(save_lightningdit(tmp_path / "lightningdit.pt", averaged(plain), plain, model))
    same(found.tensors, averaged(plain))
    same(found.raw, plain)
    found = read(save_tokenizer(tmp_path / "ldm.ckpt", vae))
    same(found.tensors, vae)
    assert len(found.dropped) == 3
