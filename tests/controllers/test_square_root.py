"""The square-root law with bounds, and rounding to a budget, against brute force and optimality conditions."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_jax.controllers import allocation

LAW = jax.jit(lambda v, w: allocation.square_root_law(v, w, 4.0, 2.0, 12.0))
ROUND = jax.jit(lambda ideal, budget: allocation.round_to_budget(ideal, budget, 2, 12))
positive = st.floats(0.0, 4.0, width=32, allow_subnormal=False)  # XLA on a CPU counts subnormal numbers as 0


def test_without_active_bounds_it_is_the_closed_form():
    v, q = np.array([0.25, 0.16, 0.09]), np.array([0.2, 0.5, 0.3])
    want = 4.0 * np.sqrt(v) / (q * np.sqrt(v)).sum()
    np.testing.assert_allclose(LAW(v, q), want, rtol=1e-6)


def test_active_set_spends_again_what_clipping_takes():
    """v = (1, 0, 0), equal weights, mean 4 in [2, 12]: zeros sit at 2, the first gets the 12 - 4 = 8 that are left."""
    np.testing.assert_allclose(LAW(np.array([1.0, 0.0, 0.0]), np.ones(3)), [8.0, 2.0, 2.0], rtol=1e-6)


def test_what_the_best_cannot_take_goes_to_the_others():
    """One tenth of the weight, at most 12: 0.1 * 12 = 1.2, so the others get (4 - 1.2) / 0.9 although their v is 0."""
    got = LAW(np.array([1.0, 0.0]), np.array([0.1, 0.9]))
    np.testing.assert_allclose(got, [12.0, 2.8 / 0.9], rtol=1e-5)


def test_bins_without_variance_take_what_is_left_over_however_many_are_full():
    """Eight bins full at 12 and four of variance 0 that must take (11 - 12 * 0.75) / 0.25 = 8 each."""
    rng, weights = np.random.default_rng(0), np.repeat([0.75 / 8, 0.25 / 4], [8, 4])
    law = jax.jit(lambda v, w: allocation.square_root_law(v, w, 11.0, 2.0, 12.0))
    for _ in range(300):
        v = np.where(np.arange(12) < 8, rng.uniform(0.03, 0.25, 12), 0.0)
        np.testing.assert_allclose(law(v, weights), np.where(v > 0, 12.0, 8.0), rtol=1e-5)
        w = rng.dirichlet(np.ones(12))
        assert (w * np.asarray(law(v, w))).sum() == pytest.approx(11.0, rel=1e-5)


@pytest.mark.parametrize("v", [np.zeros(3), np.full(3, 7.0), np.full(3, 3e38), np.full(3, np.nan)])
def test_nothing_to_choose_is_uniform(v):
    np.testing.assert_allclose(LAW(v.astype(np.float32), np.array([0.5, 0.2, 0.3])), 4.0, rtol=1e-6)


@given(v=st.lists(positive, min_size=6, max_size=6), w=st.lists(positive, min_size=6, max_size=6))
@settings(max_examples=150, deadline=None)
def test_law_meets_budget_and_optimality_conditions(v, w):
    v, w = np.array(v), np.array(w)
    n = np.asarray(LAW(v, w), np.float64)
    assert (n >= 2.0).all() and (n <= 12.0).all()
    used = w if w.max() > 0 else np.ones(6)
    assert (used * n).sum() / used.sum() == pytest.approx(4.0, rel=1e-4)
    price = v / n**2  # at the optimum equal where free, at most that at the minimum, at least that at the maximum
    free, low, high = (n > 2.001) & (n < 11.99), n <= 2.001, n >= 11.99
    if free.any() and v.max() > 0:
        scale = v.max()
        assert np.ptp(price[free]) <= 1e-3 * scale
        assert (price[low] <= price[free].mean() + 1e-3 * scale).all()
        assert (price[high] >= price[free].mean() - 1e-3 * scale).all()


def test_law_errors():
    with pytest.raises(ValueError, match="mean_rollouts=1"):
        allocation.square_root_law(np.ones(2), np.ones(2), 1, 2, 12)
    with pytest.raises(ValueError, match="weights has shape"):
        allocation.square_root_law(np.ones(2), np.ones(3), 4, 2, 12)


@given(ideal=st.lists(st.floats(-5.0, 20.0, width=32), min_size=7, max_size=7), budget=st.integers(14, 84))
@settings(max_examples=150, deadline=None)
def test_rounding_is_exact_bounded_and_monotone(ideal, budget):
    got = np.asarray(ROUND(np.array(ideal, np.float32), budget))
    assert got.sum() == budget
    assert got.min() >= 2 and got.max() <= 12
    order = np.argsort(np.array(ideal, np.float32), kind="stable")
    assert (np.diff(got[order]) >= -1).all()


@given(ideal=st.lists(st.floats(1.0, 6.0, width=32), min_size=4, max_size=4), budget=st.integers(8, 24))
@settings(max_examples=60, deadline=None)
def test_rounding_is_nearest(ideal, budget):
    got = np.asarray(ROUND(np.array(ideal, np.float32), budget))
    ideal = np.array(ideal)
    every = np.array([c for c in itertools.product(range(2, 13), repeat=3) if 2 <= budget - sum(c) <= 12])
    every = np.concatenate([every, budget - every.sum(1, keepdims=True)], axis=1)
    assert ((got - ideal) ** 2).sum() <= ((every - ideal) ** 2).sum(1).min() + 1e-4


def test_rounding_an_ideal_that_meets_the_budget_moves_nobody_by_one():
    ideal = np.asarray(LAW(np.random.default_rng(0).random(100), np.ones(100)))
    got = np.asarray(allocation.round_to_budget(ideal, 400, 2, 12))
    assert got.sum() == 400
    assert np.abs(got - ideal).max() < 1.0


@pytest.mark.parametrize(
    ("ideal", "budget", "wanted"),
    [
        ([5000, 6000], 14, [2, 12]),
        ([-6000, -5000], 15, [3, 12]),
        ([1e9, 5, 6], 20, [12, 4, 4]),
        ([3e38, 1e30, 0], 17, [12, 3, 2]),
        ([1e7, 1e7 + 4, 1e7 + 2], 18, [4, 8, 6]),
    ],
)
def test_rounding_of_distant_ideals_is_nearest(ideal, budget, wanted):
    """Only their differences count; [1e9, 5, 6]: 8 are left for 5 and 6, and (4, 4) ties with (3, 5)."""
    got = np.asarray(ROUND(np.array(ideal, np.float32), budget)).tolist()
    if wanted == [12, 4, 4]:
        assert got in (wanted, [12, 3, 5])
    else:
        assert got == wanted


def test_rounding_ties_and_junk():
    assert np.asarray(allocation.round_to_budget(np.full(5, 3.0), 17, 2, 12)).tolist() == [4, 4, 3, 3, 3]
    got = np.asarray(allocation.round_to_budget(np.array([np.nan, np.inf, -np.inf, 1e38]), 20, 2, 12))
    assert got.sum() == 20 and got.min() >= 2
    with pytest.raises(ValueError, match="budget=9 is not allowed: it must be between 5 x min_rollouts=2"):
        allocation.round_to_budget(np.ones(5), 9, 2, 12)
    with pytest.raises(ValueError, match="max_rollouts=1"):
        allocation.round_to_budget(np.ones(5), 9, 2, 1)
