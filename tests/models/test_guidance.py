"""Guidance in closed form; the golden cases compare it with the published numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.groups import ChannelGroups
from models.guidance import AutoGuidance, ClassifierFree, NoGuidance

PAIR = ChannelGroups(("texture", "semantic"), (2, 1))
NULL = 9


class Counted:
    """A velocity that depends on everything, and counts its calls."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.calls = factor, 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.factor * (x + t.mean(dim=1)[:, None, None, None] + y[:, None, None, None])


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, 2, 2), torch.tensor([[0.2, 0.5], [0.2, 0.5]]), torch.tensor([1, 4])


def guided(model: Counted, batch: tuple[Tensor, Tensor, Tensor], **options: object) -> Tensor:
    return ClassifierFree(null_label=NULL, groups=PAIR, **options)(model)(*batch)  # type: ignore[arg-type]


def expected(batch: tuple[Tensor, Tensor, Tensor], scale: float) -> Tensor:
    x, t, y = batch
    conditional, unconditional = Counted()(x, t, y), Counted()(x, t, torch.full_like(y, NULL))
    return unconditional + scale * (conditional - unconditional)


def test_scale_one_and_no_guidance_are_the_network_itself(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    model = Counted()
    assert NoGuidance()(model) is model
    assert torch.equal(guided(model, batch, scale=1.0), Counted()(*batch))
    assert torch.equal(AutoGuidance(Counted(3.0), 1.0)(model)(*batch), Counted()(*batch))
    assert model.calls == 2, "one pass each: the guide is not run"


def test_all_channels_are_guided_by_default(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    torch.testing.assert_close(guided(Counted(), batch, scale=3.0), expected(batch, 3.0))


def test_first_channels_only(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    found = guided(Counted(), batch, scale=3.0, channels=1)
    torch.testing.assert_close(found[:, :1], expected(batch, 3.0)[:, :1])
    assert torch.equal(found[:, 1:], Counted()(*batch)[:, 1:])


def test_each_group_has_its_scale(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    found = guided(Counted(), batch, scale=(2.0, 1.0))
    torch.testing.assert_close(found[:, :2], expected(batch, 2.0)[:, :2])
    assert torch.equal(found[:, 2:], Counted()(*batch)[:, 2:])


@pytest.mark.parametrize(
    ("interval", "texture_on", "semantic_on"),
    [
        ((0.0, 1.0), True, True),
        ((0.3, 1.0), False, True),
        ((0.0, 0.3), True, False),
        ((0.2, 0.5), True, True),  # bounds included
        (((0.0, 0.1), (0.4, 0.6)), False, True),
        (((0.0, 0.1), (0.6, 0.8)), False, False),
    ],
)
def test_interval_is_by_each_groups_own_clock(
    batch: tuple[Tensor, Tensor, Tensor], interval: tuple, texture_on: bool, semantic_on: bool
) -> None:
    model = Counted()
    found = guided(model, batch, scale=3.0, interval=interval)
    plain, full = Counted()(*batch), expected(batch, 3.0)
    torch.testing.assert_close(found[:, :2], (full if texture_on else plain)[:, :2])
    torch.testing.assert_close(found[:, 2:], (full if semantic_on else plain)[:, 2:])
    assert model.calls == (2 if texture_on or semantic_on else 1), "an inactive guide is not run"


def test_the_skipped_pass_changes_nothing(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """An image outside the interval gets the same bits alone (pass skipped) and beside a guided one."""
    x, t, y = batch
    mixed = t.clone()
    mixed[1] = 0.9
    options = {"scale": 3.0, "interval": (0.8, 1.0)}
    together = guided(Counted(), (x, mixed, y), **options)
    skipping = Counted()
    alone = guided(skipping, (x[:1], mixed[:1], y[:1]), **options)
    assert skipping.calls == 1
    assert torch.equal(together[:1], alone)
    assert not torch.equal(together[1:], Counted()(x[1:], mixed[1:], y[1:]))


def test_autoguidance_extrapolates_from_the_weak_network(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    main, weak = Counted()(*batch), Counted(0.5)(*batch)
    found = AutoGuidance(Counted(0.5), (1.5, 2.0), groups=PAIR)(Counted())(*batch)
    torch.testing.assert_close(found[:, :2], (weak + 1.5 * (main - weak))[:, :2])
    torch.testing.assert_close(found[:, 2:], (weak + 2.0 * (main - weak))[:, 2:])


def test_wrong_number_of_scales_is_refused() -> None:
    with pytest.raises(ValueError, match="scale needs one value or one per channel group"):
        ClassifierFree((1.0, 2.0), NULL)(Counted())
    with pytest.raises(ValueError, match="interval"):
        AutoGuidance(Counted(), 2.0, interval=((0.0, 1.0),), groups=PAIR)(Counted())
