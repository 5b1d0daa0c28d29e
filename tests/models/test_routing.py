"""Token routing and the other switches of the objective: what they compute, and that cuts of a batch do not matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.cascade_dit import CascadeDiT
from models.clocks import SemanticFirst, Synchronous
from models.flops import forward_flops, training_flops_per_image
from models.groups import ChannelGroups, single_group
from models.lightningdit import LightningDiT
from models.objectives import TrainableVelocity, VelocityMatching, strangers
from models.routing import Route, RoutedPass, kept_tokens
from models.sizes import kept_count

PAIR = ChannelGroups(("texture", "semantic"), (3, 1))
SMALL = {"hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 10, "in_channels": 4}
ALIGNED = {"align_depth": 3, "align_dim": 8, "align_hidden": 16}


def alive(model: nn.Module) -> nn.Module:
    """Zero-initialised layers would hide what goes through the blocks."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def one_clock() -> nn.Module:
    return alive(LightningDiT(input_size=4, **SMALL, **ALIGNED))


def two_clocks() -> nn.Module:
    return alive(LightningDiT(input_size=4, groups=PAIR, **SMALL, **ALIGNED))


def cascade() -> nn.Module:
    return alive(CascadeDiT(resolutions=(2, 4), **SMALL, **ALIGNED))


def with_value_residual() -> nn.Module:
    return alive(LightningDiT(input_size=4, value_residual=True, **SMALL, **ALIGNED))


MODELS = pytest.mark.parametrize("build", [one_clock, two_clocks, cascade])
RESIDUAL = pytest.mark.parametrize("build", [one_clock, two_clocks, cascade, with_value_residual])


def arguments(model: nn.Module, images: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, 4, 4, 4, generator=generator)
    t = torch.rand(images, len(model.groups), generator=generator)
    return x, t, torch.arange(images)


@RESIDUAL
def test_a_route_that_drops_nothing_is_the_plain_network_in_every_bit(
    build: Callable[[], nn.Module],
) -> None:
    model = build()
    x, t, y = arguments(model)
    every = torch.arange(16).expand(4, -1)
    plain = model(x, t, y, with_alignment=True)
    routed = model(x, t, y, with_alignment=True, route=Route(2, 3, every))
    for found, expected in zip(routed, plain, strict=True):
        assert torch.equal(found, expected)


@MODELS
def test_only_kept_tokens_pass_and_the_others_keep_what_they_were(
    build: Callable[[], nn.Module],
) -> None:
    model = build()
    x, t, y = arguments(model)
    kept = kept_tokens(torch.randn(4, 16), 0.5)
    inside: list[Tensor] = []
    between = [model.blocks[1].register_forward_hook(lambda _m, args, out: inside.extend([args[0], out]))]
    before: list[Tensor] = []
    after: list[Tensor] = []
    between.append(model.blocks[0].register_forward_hook(lambda _m, _args, out: before.append(out)))
    between.append(model.blocks[2].register_forward_hook(lambda _m, args, _out: after.append(args[0])))
    model(x, t, y, route=Route(2, 2, kept))
    for hook in between:
        hook.remove()
    index = kept.unsqueeze(-1).expand(-1, -1, 32)
    assert inside[0].shape == (4, 8, 32) and torch.equal(inside[0], before[0].gather(1, index))
    assert torch.equal(after[0].gather(1, index), inside[1])
    around = torch.ones(4, 16, dtype=torch.bool).scatter(1, kept, False)
    assert torch.equal(after[0][around], before[0][around])


def test_a_kept_token_is_turned_by_its_own_place() -> None:
    """Attention over one kept token sees itself alone, whatever its place; over two, their distance counts."""
    model = one_clock()
    q = torch.randn(1, 2, 3, 16)
    rope = model.feat_rope
    tokens = torch.tensor([[1, 6, 11]])
    whole = torch.zeros(1, 2, 16, 16)
    whole[:, :, tokens[0]] = q
    assert torch.equal(rope(q, tokens), rope(whole)[:, :, tokens[0]])


def test_a_value_residual_halves_the_first_blocks_values_into_every_other() -> None:
    """Against attention written out, of the kept tokens alone where some go around."""
    model = with_value_residual()
    x, t, y = arguments(model)
    kept = kept_tokens(torch.randn(4, 16), 0.5)
    seen: list[tuple[Any, ...]] = []
    for block in list(model.blocks)[:3]:
        block.attn.register_forward_hook(lambda module, args, out: seen.append((args[0], *out)))
    with torch.no_grad():
        model(x, t, y, route=Route(2, 2, kept))
        (at_first, _, values), (routed, found, held), (again, _, _) = seen
        attention, index = model.blocks[1].attn, kept[:, None, :, None].expand(-1, 2, -1, 16)
        q, k, v = attention.qkv(routed).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (model.feat_rope(each, kept) for each in (q, k))
        weights = (q @ k.transpose(-1, -2) / 4).softmax(dim=-1)
        expected = attention.proj((weights @ ((v + values.gather(2, index)) / 2)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, expected)
    own = model.blocks[0].attn.qkv(at_first).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)[2]
    assert torch.equal(values, own) and again.shape == at_first.shape
    assert held is None, "only the first block's are kept"
    with pytest.raises(ValueError, match="route from block 2 on"):
        model(x, t, y, route=Route(1, 2, kept))


def test_kept_tokens_belong_to_the_image_and_rise() -> None:
    draws = torch.randn(6, 16)
    kept = kept_tokens(draws, 0.75)
    assert kept.shape == (6, 4) and bool((kept.diff(dim=1) > 0).all())
    assert torch.equal(kept[2:4], kept_tokens(draws[2:4], 0.75))
    assert kept_count(16, 0.99) == 1


@RESIDUAL
def test_flops_of_a_routed_pass_are_torchs(build: Callable[[], nn.Module]) -> None:
    model = build()
    x, t, y = arguments(model, images=1)
    kept = kept_tokens(torch.randn(1, 16), 0.5)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x, t, y, with_alignment=True, route=Route(2, 3, kept))
    formula = training_flops_per_image(model, alignment=True, routed=(2, 3, 0.5))
    assert 3 * counter.get_total_flops() == formula
    assert formula < 0.85 * training_flops_per_image(model, alignment=True)
    again = training_flops_per_image(model, recompute=True, routed=(2, 3, 0.5))
    assert again < training_flops_per_image(model, recompute=True)


@RESIDUAL
def test_a_routed_guide_knows_no_label_and_costs_what_torch_counts(build: Callable[[], nn.Module]) -> None:
    model = build()
    x, t, y = arguments(model)
    guide = RoutedPass(model, 2, 3, 0.5)
    with torch.no_grad():
        found = guide(x, t, y)
        assert torch.equal(found, guide(x, t, torch.zeros_like(y)))
        torch.testing.assert_close(found[:1], guide(x[:1], t[:1], y[:1]))
        nobody = torch.full_like(y, model.null_label)
        everybody = model(x, t, nobody)
        assert not torch.allclose(found, everybody)
        whole = torch.arange(16).expand(4, -1)
        guide._kept[16, x.device] = whole[:1]
        assert torch.equal(guide(x, t, y), everybody), "with all tokens it is the unconditional pass"
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        RoutedPass(model, 2, 3, 0.5)(x[:1], t[:1], y[:1])
    assert counter.get_total_flops() == forward_flops(guide) < forward_flops(model)


# ------------------------------------------------------------------------------------ contrastive, stopped alignment


def objective(**options: object) -> VelocityMatching:
    return VelocityMatching(single_group(4), Synchronous(1), direction_weight=0.0, **options)  # type: ignore[arg-type]


def test_the_contrastive_term_is_the_distance_to_the_neighbours_target() -> None:
    v, target = torch.randn(4, 4, 2, 2), torch.randn(4, 4, 2, 2)
    found = objective(contrastive_weight=0.05).terms(v, target)
    expected = (v - target[[1, 0, 3, 2]]).square().mean()
    torch.testing.assert_close(found.terms["contrastive"], expected)
    torch.testing.assert_close(found.total, (v - target).square().mean() - 0.05 * expected)
    with pytest.raises(ValueError, match="found 3 of them"):
        strangers(target[:3])


def test_alignment_stops_and_its_head_gets_gradients_of_zero() -> None:
    model = one_clock().train()
    x, _, y = arguments(model)
    settings = {"align_weight": 0.5, "align_until": 100}
    module = TrainableVelocity(model, objective(**settings))
    targets = torch.randn(4, 8, 4, 4)
    given = {"x1_BCHW": x, "y_B": y, "noise_BCHW": torch.randn_like(x), "u_B": torch.rand(4)}
    head = model.repa_projector[0].weight
    for images_seen, counts in ((99, True), (100, False)):
        model.zero_grad()
        terms = module(**given, align_target_BChw=targets, images_seen=images_seen)
        terms["total"].backward()
        assert head.grad is not None and bool(head.grad.any()) == counts
        weighed = terms["velocity"] + (0.5 * terms["alignment"] if counts else 0.0)
        torch.testing.assert_close(terms["total"].detach(), weighed)


@pytest.mark.parametrize("clock", [Synchronous(2), SemanticFirst(0.3)])
def test_a_batch_may_be_cut_in_two(clock: object) -> None:
    """With routing, a contrastive term and alignment at once: gradients of halves add up to the whole's."""
    model = two_clocks().train()
    options = {"contrastive_weight": 0.05, "routed": (2, 3), "align_weight": 0.5}
    module = TrainableVelocity(model, VelocityMatching(PAIR, clock, **options))  # type: ignore[arg-type]
    x, _, y = arguments(model, 8)
    given = {
        "x1_BCHW": x,
        "y_B": y,
        "noise_BCHW": torch.randn_like(x),
        "u_B": torch.rand(8),
        "align_target_BChw": torch.randn(8, 8, 4, 4),
        "kept_BK": kept_tokens(torch.randn(8, 16), 0.5),
    }
    module(**given)["total"].backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for rows in (slice(0, 4), slice(4, 8)):
        piece = {name: values[rows] for name, values in given.items()}
        (module(**piece)["total"] / 2).backward()
    halves = [p.grad for p in model.parameters() if p.grad is not None]
    for found, expected in zip(halves, whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
