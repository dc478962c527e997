"""Orders: pure functions of seed and position, shares exact in every step, no prompt twice, shards that add up."""

import numpy as np
import pytest

from gdro_jax.data import orders, prompts
from gdro_jax.data.files import DataError

PARTS = (range(20), range(20, 27))


def test_the_builtin_order_is_the_one_runs_were_made_in():
    order = orders.make("builtin", 3, [range(50)], [1.0], 8)
    for position in (0, 8, 400):
        np.testing.assert_array_equal(order(position), prompts.order(3, position, 50, 8))


def test_a_mixture_holds_its_shares_exactly_and_goes_round_each_set():
    order = orders.make("grain", 0, PARTS, [3, 1], 8)
    steps = [order(8 * step) for step in range(12)]
    for ids in steps:
        assert ids.dtype == np.int32 and len(set(ids.tolist())) == 8
        assert (ids < 20).sum() == 6 and (ids >= 20).sum() == 2
    first = [set(np.concatenate([ids[ids < 20] for ids in steps[n : n + 3]]).tolist()) for n in (0, 3)]
    assert all(len(epoch) == 18 for epoch in first)  # three whole steps of six make an epoch, no prompt twice
    assert [ids.tolist() for ids in steps[:3]] != [ids.tolist() for ids in steps[3:6]]


def test_any_position_at_any_time_and_another_seed_is_another_order():
    order, again = (orders.make("grain", 5, PARTS, [1, 1], 6) for _ in range(2))
    forward = [order(6 * step).tolist() for step in range(9)]
    assert [again(6 * step).tolist() for step in reversed(range(9))] == forward[::-1]
    assert orders.make("grain", 6, PARTS, [1, 1], 6)(0).tolist() != forward[0]
    with pytest.raises(ValueError, match="position: 3"):
        order(3)


def test_the_grain_order_is_pinned_so_that_another_version_of_it_is_noticed():
    assert orders.make("grain", 0, [range(8)], [1.0], 8)(0).tolist() == [4, 5, 1, 7, 0, 6, 2, 3]


@pytest.mark.parametrize(
    ("per_step", "shares", "counts"),
    [(8, [3, 1], [6, 2]), (10, [1, 1, 1], [4, 3, 3]), (64, [0.7, 0.2, 0.1], [45, 13, 6]), (5, [1], [5])],
)
def test_split(per_step, shares, counts):
    assert orders.split(per_step, shares, [100] * len(shares)) == counts


def test_what_cannot_be_mixed_is_said():
    with pytest.raises(DataError, match="set 2 of the mixture: its share of a step of 8 prompts rounds to no prompt"):
        orders.make("grain", 0, PARTS, [99, 1], 8)
    with pytest.raises(DataError, match=r"set 2 .* is 10 prompts, more than it holds \(7\)"):
        orders.make("grain", 0, PARTS, [1, 1], 20)
    with pytest.raises(ValueError, match="shares"):
        orders.make("grain", 0, PARTS, [1, 0], 8)
    with pytest.raises(ValueError, match="takes one set"):
        orders.make("builtin", 0, PARTS, [1, 1], 8)
    with pytest.raises(ValueError, match="loader: 'other'"):
        orders.make("other", 0, PARTS, [1, 1], 8)
