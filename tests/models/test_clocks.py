"""Clocks in closed form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.clocks import Clock, Offsets, SemanticFirst, Synchronous

TEXTURE, SEMANTIC = 0, 1
deltas = st.floats(0.0, 1.0, allow_nan=False, width=32)


def test_no_offset_is_synchronous() -> None:
    u, g = torch.rand(50), torch.linspace(0, 1, 21)
    ahead, together = SemanticFirst(0.0), Synchronous(2)
    assert ahead.span == together.span == 1.0
    assert torch.equal(ahead.train_times(u), together.train_times(u))
    assert torch.equal(together.train_times(u), u[:, None].expand(-1, 2))
    for found, expected in zip(ahead.at(g), together.at(g), strict=True):
        assert torch.equal(found, expected)
    assert together.at(g)[1].all()


@given(deltas)
@settings(max_examples=30, deadline=None)
def test_times_stay_within_bounds_and_semantics_lead_by_at_most_delta(delta: float) -> None:
    clock = SemanticFirst(delta)
    t = clock.train_times(torch.linspace(0, 1, 201))
    assert t.min() >= 0 and t.max() <= 1
    lead = t[:, SEMANTIC] - t[:, TEXTURE]
    assert lead.min() >= -1e-6 and lead.max() <= delta + 1e-6
    grid, _ = clock.at(torch.linspace(0, 1, 201) * clock.span)
    assert grid.min() >= 0 and grid.max() <= 1
    assert grid[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(grid[-1], torch.ones(2))


def test_three_phases_cover_the_span_exactly() -> None:
    clock = SemanticFirst(0.25)  # a binary fraction, so that bounds are exact
    g = torch.linspace(0, 1.25, 1281)
    t, mask = clock.at(g)
    assert clock.span == 1.25
    assert torch.equal(mask[:, TEXTURE], g >= 0.25) and torch.equal(mask[:, SEMANTIC], g <= 1.0)
    assert mask.any(dim=1).all(), "at every moment somebody moves"
    # Each group moves for one unit of global time, at unit speed.
    for group in (TEXTURE, SEMANTIC):
        moving = g[mask[:, group]]
        assert moving.max() - moving.min() == 1.0
        torch.testing.assert_close(t[mask[:, group], group], moving - moving.min())


def test_published_times() -> None:
    t = SemanticFirst(0.3).train_times(torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(t, torch.tensor([[0.0, 0.13], [0.35, 0.65], [0.87, 1.0]]))


def test_scalar_and_per_image_global_times_agree() -> None:
    clock = Offsets((0.5, 0.0, 0.2))
    g = torch.tensor([0.1, 0.6, 1.4])
    t, mask = clock.at(g)
    assert t.shape == mask.shape == (3, 3) and clock.groups == 3
    for i in range(3):
        one, active = clock.at(g[i])
        assert torch.equal(one, t[i]) and torch.equal(active, mask[i])


def test_only_the_last_group_runs_on_beyond_the_span() -> None:
    t, mask = SemanticFirst(0.3).at(torch.tensor(1.5))
    torch.testing.assert_close(t, torch.tensor([1.2, 1.0]))
    assert mask.tolist() == [True, False]


def test_clocks_are_clocks_and_somebody_must_start() -> None:
    assert all(isinstance(clock, Clock) for clock in (Synchronous(1), SemanticFirst(0.3), Offsets((0.0, 2.0))))
    for offsets in ((0.1, 0.2), (-0.1, 0.0), ()):
        with pytest.raises(ValueError, match="offsets"):
            Offsets(offsets)
