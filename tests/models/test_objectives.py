"""Objectives in closed form, and as one module that an engine can wrap."""

from __future__ import annotations

import pytest
import torch

from models.clocks import SemanticFirst, Synchronous
from models.groups import single_group
from models.objectives import (
    TimeDistribution,
    TrainableVelocity,
    VelocityMatching,
    alignment_error,
    direction_error,
    velocity_error,
)
from tests.models.conftest import PAIR, small_dit


def objective(**changes: object) -> VelocityMatching:
    arguments = {"groups": PAIR, "clock": SemanticFirst(0.3), "group_weights": (1.0, 2.0), "align_weight": 0.5}
    return VelocityMatching(**(arguments | changes))  # type: ignore[arg-type]


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "x1_BCHW": torch.randn(4, 6, 4, 4, generator=generator),
        "y_B": torch.tensor([0, 1, 5, 2]),
        "noise_BCHW": torch.randn(4, 6, 4, 4, generator=generator),
        "u_B": torch.rand(4, generator=generator),
        "align_target_BChw": torch.randn(4, 12, 4, 4, generator=generator),
    }


def test_the_perfect_velocity_costs_nothing() -> None:
    data = batch()
    target = data["x1_BCHW"] - data["noise_BCHW"]
    terms = objective(align_weight=0.0).loss(
        lambda x, t, y: target, data["x1_BCHW"], data["y_B"], data["noise_BCHW"], data["u_B"]
    )
    assert terms.total.item() == pytest.approx(0.0, abs=1e-6)


def test_the_path_runs_from_noise_to_data_at_each_groups_time() -> None:
    x1, noise = torch.ones(1, 6, 1, 1), torch.zeros(1, 6, 1, 1)
    x_t = objective().interpolate(x1, noise, torch.tensor([[0.25, 1.0]]))
    assert x_t.flatten().tolist() == [0.25] * 4 + [1.0] * 2


def test_group_weights_act_before_the_mean_over_all_channels() -> None:
    v, target = torch.ones(1, 6, 1, 1), torch.zeros(1, 6, 1, 1)
    assert velocity_error(v, target, PAIR).item() == 1.0
    assert velocity_error(v, target, PAIR, (1.0, 2.0)).item() == pytest.approx((4 + 2 * 2) / 6)


def test_direction_ignores_length() -> None:
    v = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(direction_error(v, 7 * v), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(direction_error(v, -v), torch.full((2,), 2.0))


def test_direction_of_nothing_has_a_bounded_gradient() -> None:
    target = torch.randn(2, 8, 4, 4)
    for floor in (1e-8, 0.5):
        v = torch.zeros(2, 8, 4, 4, requires_grad=True)
        direction_error(v, target, floor).sum().backward()
        torch.testing.assert_close(v.grad.norm(dim=1), torch.full((2, 4, 4), 1 / (16 * floor)), rtol=1e-4, atol=0.0)
    long = 3 * target
    torch.testing.assert_close(direction_error(long, target, 1e-3), torch.zeros(2), atol=1e-6, rtol=0)


def test_alignment_modes() -> None:
    a, b = torch.randn(2, 5, 2, 2), torch.randn(2, 5, 2, 2)
    cosine, squared = alignment_error(a, b, "cos"), alignment_error(a, b, "mse")
    torch.testing.assert_close(squared, (a - b).square().flatten(1).mean(1))
    torch.testing.assert_close(alignment_error(a, b, "cos_mse"), (cosine + squared) / 2)
    torch.testing.assert_close(alignment_error(3 * a, a, "cos"), torch.zeros(2), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="grid of the tokens"):
        alignment_error(a, torch.randn(2, 5, 4, 4))


def test_logit_normal_times_are_the_published_distribution() -> None:
    u = (torch.arange(100_000) + 0.5) / 100_000
    t = TimeDistribution()(u.double())
    logits = torch.logit(t)
    assert logits.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert logits.std().item() == pytest.approx(1.0, abs=1e-3)
    # papers.md 2.5: with delta 0.3, 11.43 % of images have finished semantics, and as many fresh texture.
    times = SemanticFirst(0.3).train_times(t)
    assert (times[:, 1] == 1).double().mean().item() == pytest.approx(0.1143, abs=2e-4)
    assert (times[:, 0] == 0).double().mean().item() == pytest.approx(0.1143, abs=2e-4)


def test_the_switch_to_uniform_times() -> None:
    u = torch.tensor([0.1, 0.9])
    late = TimeDistribution(uniform_after_images=100)
    assert not torch.equal(late(u, 99), u)
    assert torch.equal(late(u, 100), u) and torch.equal(TimeDistribution("uniform")(u), u)
    with pytest.raises(ValueError, match="logit_normal"):
        TimeDistribution("normal")  # type: ignore[arg-type]


def test_extreme_random_numbers_stay_finite() -> None:
    t = objective().train_times(torch.tensor([0.0, 1.0, 1e-30]))
    assert torch.isfinite(t).all() and t.min() >= 0 and t.max() <= 1


def test_terms_are_named_weighted_and_summed_once() -> None:
    module = TrainableVelocity(small_dit(), objective())
    found = module(**batch())
    assert found.keys() == {
        "total",
        "velocity",
        "direction",
        "alignment",
        "velocity_per_image",
        "velocity/texture",
        "velocity/semantic",
        "by_time/texture",
        "by_time/semantic",
    }
    torch.testing.assert_close(
        found["total"].detach(), found["velocity"] + found["direction"] + 0.5 * found["alignment"]
    )
    weighted = (4 * found["velocity/texture"] + 2 * 2 * found["velocity/semantic"]) / 6
    torch.testing.assert_close(found["velocity"], weighted)
    assert found["velocity_per_image"].shape == (4,)
    assert [name for name, value in found.items() if value.requires_grad] == ["total"]


def test_every_trainable_parameter_gets_a_gradient() -> None:
    module = TrainableVelocity(small_dit(), objective())
    module(**batch())["total"].backward()
    without = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert module.model.pos_embed.grad is None


def test_a_loss_is_a_mean_over_images() -> None:
    """Two halves average to the whole: accumulation and data parallelism change nothing."""
    module, data = TrainableVelocity(small_dit(), objective()), batch()
    halves = [
        module(**{name: value[rows] for name, value in data.items()})["total"] for rows in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(module(**data)["total"], sum(halves) / 2)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="clock has 1 groups"):
        objective(clock=Synchronous(1))
    with pytest.raises(ValueError, match="group_weights needs 2"):
        objective(group_weights=(1.0,))
    with pytest.raises(ValueError, match="align_mode"):
        objective(align_mode="l1")
    with pytest.raises(ValueError, match="align_target"):
        TrainableVelocity(small_dit(), objective())(**(batch() | {"align_target_BChw": None}))


def test_training_lowers_the_loss() -> None:
    model = small_dit(groups=None, align_depth=None, align_dim=None)
    module = TrainableVelocity(model, VelocityMatching(single_group(6), Synchronous(1)))
    data = {name: value for name, value in batch().items() if name != "align_target_BChw"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = module(**data)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
