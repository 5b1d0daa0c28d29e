"""The wide head: the published network's size and names, what it computes, and its place in a recipe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from configs import Recipe, UserError, load_recipe
from infra.weights import check_pretrained, load_pretrained
from models import flops
from models.lightningdit import parameter_count
from models.wide_head_dit import WideHeadDiT
from tasks.networks import build_dit, build_objective
from tasks.plan import networks
from tests.helpers.builders import small_recipe

SMALL: dict[str, Any] = {
    "input_size": 4, "in_channels": 12, "hidden_size": 24, "depth": 3, "num_heads": 2, "num_classes": 5,
    "head_hidden": 40, "head_depth": 2, "head_heads": 2,
}  # fmt: skip


def network(**changes: Any) -> WideHeadDiT:
    torch.manual_seed(0)
    built = WideHeadDiT(**(SMALL | changes))
    for parameter in built.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return built.eval()


def test_the_published_size_has_the_published_numbers() -> None:
    """838,675,796 parameters, position table and Fourier rates among them: those of the authors' DiT-DH-XL."""
    recipe = load_recipe("ditdh_xl_rae")
    with torch.device("meta"):
        built = build_dit(recipe, recipe.train_dit.model)  # type: ignore[arg-type]
    assert parameter_count(built) == 838_675_796
    names = built.state_dict().keys()
    assert {"s_embedder.proj.weight", "s_projector.weight", "t_embedder.W", "enc_feat_rope.freqs_cos"} <= names
    assert {"dec_feat_rope.freqs_sin", "blocks.29.attn.qkv.weight", "final_layer.linear.bias"} <= names
    assert len(names) == 382 and "feat_rope.freqs_cos" not in names
    backbone, head = networks.diffusion(recipe, recipe.train_dit.model)
    assert (backbone.tensors, head.values) == (382, 0)
    assert backbone.values == sum(value.numel() for value in built.state_dict().values())
    assert backbone.flops == flops.forward_flops(built)
    assert networks.blocks_flops(recipe, recipe.train_dit.model) == flops.blocks_flops(built)


@torch.no_grad()
def test_it_computes_as_written_in_the_paper() -> None:
    """The trunk makes a condition of every token; the head sees the noisy latent under it. Times run to noise, and the
    velocity from data, so both are turned here."""
    model, x, t, y = network(), torch.randn(3, 12, 4, 4), torch.rand(3), torch.tensor([0, 3, 5])
    angles = 2 * math.pi * (1 - t)[:, None] * model.t_embedder.W
    times = model.t_embedder.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))
    told = F.silu(times + model.y_embedder(y))
    tokens = model.s_embedder.proj(x).flatten(2).transpose(1, 2) + model.pos_embed
    for block in list(model.blocks)[:3]:
        tokens = block(tokens, F.silu(told), model.enc_feat_rope)
    condition = model.s_projector(F.silu(times[:, None] + tokens))
    seen = model.x_embedder.proj(x).flatten(2).transpose(1, 2)
    for block in list(model.blocks)[3:]:
        one = [block(seen[b : b + 1], F.silu(condition[b : b + 1]), model.dec_feat_rope) for b in range(3)]
        seen = torch.cat(one)
    out = model.final_layer(seen, F.silu(condition)).transpose(1, 2).unflatten(-1, (4, 4))
    torch.testing.assert_close(model(x, t, y), -out, rtol=0, atol=1e-5)


def test_a_fresh_one_predicts_nothing_and_every_weight_can_learn() -> None:
    fresh = WideHeadDiT(**SMALL)
    x, t, y = torch.randn(2, 12, 4, 4), torch.rand(2), torch.tensor([0, 3])
    assert not fresh(x, t, y).any()
    model = network()
    model(x, t, y).square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name, _ in model.named_parameters()} - trained == {"pos_embed", "t_embedder.W"}


@pytest.mark.parametrize("changes", [{}, {"rope": False, "rmsnorm": False, "swiglu": False}, {"head_hidden": 24}])
def test_its_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = WideHeadDiT(**(SMALL | changes))
        given = torch.empty(1, 12, 4, 4), torch.empty(1), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(*given)
    assert flops.forward_flops(model) == counter.get_total_flops()


def recipe_with(*overrides: str) -> Recipe:
    return small_recipe(
        "train_semvae=null",
        "train_dit.clock={kind: synchronous}",
        "sample.guidance={method: none}",
        "train_dit.objective.semantic_weight=1.0",
        "train_dit.model.head={hidden_size: 32, depth: 1, heads: 2}",
        *overrides,
    )


def test_a_recipe_trains_it_and_reads_its_weights(tmp_path: Path) -> None:
    recipe = recipe_with()
    model = build_dit(recipe, recipe.train_dit.model)  # type: ignore[arg-type]
    assert isinstance(model, WideHeadDiT)
    objective: Any = build_objective(recipe)
    latents, u = torch.randn(2, recipe.latent_channels, 4, 4), torch.rand(2)
    terms = objective.loss(model, latents, torch.tensor([0, 1]), torch.randn_like(latents), u)
    assert float(terms.total if hasattr(terms, "total") else terms["total"]) > 0
    torch.save(model.state_dict(), tmp_path / "stage2_model.pt")
    other = build_dit(recipe, recipe.train_dit.model)  # type: ignore[arg-type]
    check_pretrained(lambda: other, str(tmp_path / "stage2_model.pt"), "train_dit.pretrained")
    load_pretrained(other, str(tmp_path / "stage2_model.pt"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train_dit.model.align_depth=1", "head has no place for align_depth 1"),
        ("train_dit.model.head.heads=3", "hidden_size 32 is not a multiple of 4 × heads 3"),
        ("train_dit.routing={first: 1, last: 2, drop: 0.5}", "head has one clock, one resolution and all tokens"),
    ],
)
def test_what_it_cannot_be_beside_is_refused(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe_with(override)
