"""The budgeted solvers against enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdro_jax.controllers import allocation

ARMS = np.array([2, 3, 4, 6], np.int32)
BLOCKS = ((600, 300, 900), 7200)  # amounts of four blocks, the last not whole
CASES = [((3, 2, 4), 32), ((1, 1, 1), 10), ((5, 0, 3), 33), ((7, 7, 7), 84), ((2, 5, 1, 3), 40), BLOCKS]


def _enumerate(log_probs: np.ndarray, counts: np.ndarray, budget: int) -> dict[tuple[int, ...], float]:
    """Every feasible tuple of arm indices and its probability given the budget."""
    found = {}
    for choice in itertools.product(range(len(ARMS)), repeat=len(counts)):
        if any(count == 0 and arm != 0 for count, arm in zip(counts, choice, strict=True)):
            continue
        if sum(int(count) * int(ARMS[arm]) for count, arm in zip(counts, choice, strict=True)) == budget:
            found[choice] = sum(log_probs[b, arm] for b, arm in enumerate(choice) if counts[b] > 0)
    top = max(found.values())
    total = sum(np.exp(value - top) for value in found.values())
    return {choice: float(np.exp(value - top) / total) for choice, value in found.items()}


def _marginals(log_probs: np.ndarray, counts: np.ndarray, budget: int) -> np.ndarray:
    """By enumeration."""
    want = np.zeros(log_probs.shape)
    for choice, probability in _enumerate(log_probs, counts, budget).items():
        want[np.arange(len(choice)), list(choice)] += probability
    return want


def _case(counts: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    logits = np.random.default_rng(seed).normal(size=(len(counts), len(ARMS))) * 1.5
    return logits - np.log(np.exp(logits).sum(1, keepdims=True)), np.array(counts, np.int32)


@pytest.mark.parametrize(("counts", "budget"), CASES)
def test_max_probability_is_the_best_of_all(counts, budget):
    for seed in range(3):
        logs, number = _case(counts, seed)
        everything = _enumerate(logs, number, budget)
        got = np.asarray(allocation.max_probability(logs, number, ARMS, budget))
        assert got.dtype == np.int32
        assert (got * number).sum() == budget
        chosen = tuple(int(np.where(n == ARMS)[0][0]) for n in got)
        assert everything[chosen] == pytest.approx(max(everything.values()), rel=1e-4)
        assert all(n == ARMS[0] for n, count in zip(got, number, strict=True) if count == 0)


def test_whether_a_bin_can_leave_the_uniform_count_is_enumerated():
    rng, found = np.random.default_rng(0), []
    for _ in range(30):
        num_arms = int(rng.integers(1, 8))
        uniform = int(rng.integers(num_arms))
        counts = rng.integers(0, 14, 3).astype(np.int32)
        budget = int(counts.sum()) * uniform
        present = counts[counts > 0]
        others = sum(
            sum(int(m) * a for m, a in zip(present, choice, strict=True)) == budget
            for choice in itertools.product(range(num_arms), repeat=len(present))
        )
        got = bool(allocation.only_choice(num_arms, uniform, jnp.asarray(counts), budget))
        assert got == (others == 1), (num_arms, uniform, counts)
        found.append(got)
    assert 5 < sum(found) < 25


@pytest.mark.parametrize(("counts", "budget"), CASES)
def test_marginals_equal_enumeration(counts, budget):
    logs, number = _case(counts, 11)
    want = _marginals(logs, number, budget)
    np.testing.assert_allclose(allocation.marginals(logs, number, ARMS, budget), want, atol=2e-6)


def test_blocks_are_joined_with_arms_of_probability_0_too():
    counts, budget = BLOCKS
    logs, number = _case(counts, 2)
    logs[0, 2] = -np.inf
    want = _marginals(logs, number, budget)
    assert want[0, 2] == 0 < want[0, 3]
    np.testing.assert_allclose(allocation.marginals(logs, number, ARMS, budget), want, atol=2e-6)
    problem = allocation.make_problem(logs, jnp.asarray(number), jnp.asarray(ARMS), budget)
    drawn = jax.vmap(lambda key: allocation.draw(key, problem, allocation.only(budget)))(
        jax.random.split(jax.random.key(0), 400)
    )
    assert (drawn.spent == budget).all()
    for arm in range(len(ARMS)):
        assert abs(float((drawn.arms[:, 0] == arm).mean()) - want[0, arm]) < 0.1
    np.testing.assert_allclose(np.exp(drawn.log_marginals[:, 0]), want[0, drawn.arms[:, 0]], rtol=1e-4)


@pytest.mark.parametrize(("counts", "budget"), [((3, 2, 4), 32), ((2, 5, 1, 3), 40)])
def test_sample_has_the_exact_distribution(counts, budget):
    logs, number = _case(counts, 5)
    want = _enumerate(logs, number, budget)
    draws, repeats = {}, 20_000
    keys = jax.random.split(jax.random.key(0), repeats)
    got = np.asarray(jax.jit(jax.vmap(lambda key: allocation.sample(key, logs, number, ARMS, budget)))(keys))
    assert ((got * number).sum(1) == budget).all()
    for row in np.searchsorted(ARMS, got):
        draws[tuple(row)] = draws.get(tuple(row), 0) + 1
    assert set(draws) <= set(want)
    likely = {choice: p for choice, p in want.items() if p * repeats >= 10}
    chi2 = sum((draws.get(choice, 0) - p * repeats) ** 2 / (p * repeats) for choice, p in likely.items())
    degrees = len(likely) - 1
    assert degrees >= 3
    assert chi2 < degrees + 5.0 * np.sqrt(2.0 * degrees)  # about 5 standard deviations


def test_log_marginals_of_a_draw_are_the_marginals():
    logs, number = _case((3, 2, 4), 7)
    problem = allocation.make_problem(logs, jnp.asarray(number), jnp.asarray(ARMS), 32)
    table = np.asarray(allocation.marginals(logs, number, ARMS, 32))
    for seed in range(5):
        got = allocation.draw(jax.random.key(seed), problem, allocation.only(32))
        np.testing.assert_allclose(np.exp(got.log_marginals), table[np.arange(3), np.asarray(got.arms)], rtol=1e-4)


def test_one_bin_must_take_the_mean():
    logs = np.log(np.array([[0.7, 0.1, 0.1, 0.1]]))
    assert allocation.max_probability(logs, [8], ARMS, 32).tolist() == [4]
    np.testing.assert_allclose(allocation.marginals(logs, [8], ARMS, 32), [[0, 0, 1, 0]])


def test_an_arm_of_probability_zero_is_a_last_resort():
    logs = np.array([[-np.inf, 0.0, -np.inf, -np.inf], [0.0, -1.0, -2.0, -3.0]])
    assert allocation.max_probability(logs, [2, 2], ARMS, 10).tolist() == [3, 2]
    assert allocation.max_probability(logs, [2, 2], ARMS, 8).tolist() == [2, 2]
    np.testing.assert_allclose(allocation.marginals(logs, [2, 2], ARMS, 14), [[0, 1, 0, 0], [0, 0, 1, 0]], atol=1e-6)


def test_a_last_resort_does_not_hide_the_other_arms_probabilities():
    """4 a + b + c = 11 with a, b, c in {1, 2} needs a = 2, of probability 0; (b, c) is (1, 2) or (2, 1)."""
    logs = [[0.0, -np.inf], [np.log(0.01), np.log(0.99)], [np.log(0.99), np.log(0.01)]]
    arms, counts, odds = [1, 2], [4, 1, 1], 0.99**2 + 0.01**2
    want = [[0.0, 1.0], [0.01**2 / odds, 0.99**2 / odds], [0.99**2 / odds, 0.01**2 / odds]]
    np.testing.assert_allclose(allocation.marginals(logs, counts, arms, 11), want, atol=1e-6)
    assert allocation.max_probability(logs, counts, arms, 11).tolist() == [2, 2, 1]
    keys = jax.random.split(jax.random.key(0), 200)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: allocation.sample(key, logs, counts, arms, 11)))(keys))
    assert (draws == [2, 2, 1]).all(1).mean() > 0.98


def test_as_few_last_resorts_as_possible():
    """Against enumeration by rank: only the choices with the fewest arms of probability 0 count."""
    rng = np.random.default_rng(4)
    for counts, budget in (((3, 2, 4), 32), ((2, 5, 1, 3), 40)):
        logs, number = _case(counts, 2)
        zero = rng.random(logs.shape) < 0.7
        everything = _enumerate(np.zeros_like(logs), number, budget)
        fewest = min(sum(zero[b, a] for b, a in enumerate(choice)) for choice in everything)
        assert fewest >= 1
        want, mass = np.zeros(logs.shape), 0.0
        for choice in everything:
            if sum(zero[b, a] for b, a in enumerate(choice)) == fewest:
                odds = np.exp(sum(logs[b, a] - logs[b][~zero[b]].max() for b, a in enumerate(choice) if not zero[b, a]))
                want[np.arange(len(choice)), list(choice)] += odds
                mass += odds
        got = allocation.marginals(np.where(zero, -np.inf, logs), number, ARMS, budget)
        np.testing.assert_allclose(got, want / mass, atol=2e-6)


def test_huge_log_probabilities_stay_finite():
    logs = np.array([[3e38, -3e38, 0.0, 1.0], [-3e38, 3e38, 1.0, 0.0]], np.float32)
    got = np.asarray(allocation.max_probability(logs, [3, 4], ARMS, 28))
    assert (got * [3, 4]).sum() == 28
    table = np.asarray(allocation.marginals(logs, [3, 4], ARMS, 28))
    assert np.isfinite(table).all()
    np.testing.assert_allclose(table.sum(1), 1.0, rtol=1e-5)


def test_rare_budgets_do_not_underflow():
    """Twelve bins that all want the largest arm, and a budget that only the smallest arms meet."""
    logs = np.tile(np.log(np.array([[1e-12, 1e-12, 1e-12, 1.0]])), (12, 1))
    table = np.asarray(allocation.marginals(logs, np.ones(12, np.int32), ARMS, 25))
    np.testing.assert_allclose(table[:, :2], np.tile([11 / 12, 1 / 12], (12, 1)), rtol=1e-4)


def test_errors():
    logs = np.zeros((2, 4))
    with pytest.raises(ValueError, match="no choice of arms spends budget=7"):
        allocation.max_probability(logs, [2, 2], ARMS, 7)
    with pytest.raises(ValueError, match="no choice of arms"):
        allocation.marginals(logs, [2, 2], ARMS, 1000)
    with pytest.raises(ValueError, match="no choice of arms"):
        allocation.sample(jax.random.key(0), logs, [2, 2], ARMS, 7)
    with pytest.raises(ValueError, match="bin_counts has shape"):
        allocation.max_probability(logs, [2, 2, 2], ARMS, 8)
    with pytest.raises(ValueError, match=r"arms=\[-1, 3, 4, 6\] is not allowed: it must be counts >= 0"):
        allocation.max_probability(logs, [2, 2], [-1, 3, 4, 6], 8)
    with pytest.raises(ValueError, match="log_probs has shape"):
        allocation.max_probability(logs[0], [2, 2], ARMS, 8)
    with pytest.raises(ValueError, match="must be an integer array"):
        allocation.max_probability(logs, [2.0, 2.0], ARMS, 8)
    with pytest.raises(ValueError, match="known outside jit"):
        jax.jit(lambda budget: allocation.max_probability(logs, [2, 2], ARMS, budget))(8)
