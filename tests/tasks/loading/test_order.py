from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.loading.order import Order
from tests.helpers.streams import served

orders = st.builds(
    Order,
    group_rows=st.lists(st.integers(1, 40), min_size=1, max_size=40).map(tuple),
    seed=st.integers(0, 3),
    shuffled_rows=st.sampled_from([32, 64, 500, 16_384]),  # many lanes with small windows, or one of each
)


@given(orders, st.integers(0, 2))
@settings(deadline=None, max_examples=60)
def test_every_row_exactly_once_an_epoch(order: Order, epoch: int) -> None:
    assert sorted(served(order, epoch, 0, order.rows)) == list(range(order.rows))
    groups, begins = order.tape(epoch)
    assert sorted(groups.tolist()) == list(range(len(order.group_rows))) and begins[-1] == order.rows


@given(orders, st.data())
@settings(deadline=None, max_examples=60)
def test_any_slice_is_that_slice_of_the_epoch(order: Order, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, order.rows))
    stop = data.draw(st.integers(start, order.rows))
    assert served(order, 1, start, stop) == served(order, 1, 0, order.rows)[start:stop]


def test_orders_differ_between_seeds_and_epochs() -> None:
    orders = [served(Order((16,) * 8, seed), epoch, 0, 128) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_large_epoch_is_shuffled_well() -> None:
    order = Order((256,) * 400, 0)
    assert order.lanes > 1
    tape_rows = np.array(served(order, 0, 0, order.rows))
    found = order.tape(0)[0][tape_rows // 256] * 256 + tape_rows % 256  # groups are of one size
    for batch in found[: 256 * 100].reshape(-1, 256):  # every batch draws from all over the data
        assert len(np.unique(batch // 256)) > 8
        assert abs(batch.mean() / order.rows - 0.5) < 0.3


def test_places_of_squares_are_uniform_and_belong_to_the_image() -> None:
    order = Order((256,), 0)
    places = order.places(np.arange(100_000))
    assert places.shape == (100_000, 2) and places.min() >= 0 and places.max() < 1
    counts = [np.histogram(each, 10, (0, 1))[0] / 10_000 for each in places.T]
    assert np.abs(np.array(counts) - 1).max() < 0.05
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.02 and abs(np.corrcoef(places[1:, 0], places[:-1, 0])[0, 1]) < 0.02
    assert np.array_equal(order.places(np.arange(500, 600)), places[500:600])
    assert not np.array_equal(Order((256,), 1).places(np.arange(100)), places[:100])


def test_flips_are_fair_and_belong_to_the_position() -> None:
    order = Order((256,), 0)
    flips = order.flips(0, np.arange(100_000))
    assert abs(flips.mean() - 0.5) < 0.01
    assert abs((flips[1:] == flips[:-1]).mean() - 0.5) < 0.01
    assert np.array_equal(order.flips(0, np.arange(500, 600)), flips[500:600])
    assert not np.array_equal(order.flips(1, np.arange(1000)), flips[:1000])
