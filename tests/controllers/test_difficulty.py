"""The classifier: statistics, hysteresis, unseen prompts, and what the number of rollouts does to each statistic."""

import math

import jax
import numpy as np
import pytest

from gdro_jax import controllers
from gdro_jax.controllers import beta, difficulty


def _run(cfg, visits, num_prompts=3, prompt=1):
    """Bins and rates of one prompt after each (correct, rollouts) visit."""
    state, bins, rates = difficulty.init(cfg, num_prompts), [], []
    ids = np.array([prompt], np.int32)
    for correct, rollouts in visits:
        state = difficulty.update(cfg, state, ids, np.array([correct]), np.array([rollouts]))
        bins.append(int(difficulty.bins(cfg, state, ids)[0]))
        rates.append(float(difficulty.pass_rate(cfg, state, ids)[0]))
    return state, bins, rates


def test_any_hysteresis_by_hand():
    """Rates 1, 1/2, 1/3, 1/2, 3/5 around the edge 0.5 with delta 0.1: down at <= 0.4, up at >= 0.6."""
    cfg = difficulty.Config(edges=(0.5,), hysteresis=0.1)
    _, bins, rates = _run(cfg, [(1, 4), (0, 4), (0, 4), (2, 4), (4, 4)])
    np.testing.assert_allclose(rates, [1, 1 / 2, 1 / 3, 1 / 2, 3 / 5], rtol=1e-6)
    assert bins == [1, 1, 0, 0, 1]


def test_hysteresis_past_the_ends_leaves_every_bin_reachable():
    """0.98 + 0.03 > 1 and 0.02 - 0.03 < 0: rates 1 and 0 must do."""
    high = difficulty.Config(edges=(0.98,), hysteresis=0.03, window=2)
    assert _run(high, [(0, 1), (1, 1), (1, 1)])[1] == [0, 0, 1]
    low = difficulty.Config(edges=(0.02,), hysteresis=0.03, window=2)
    assert _run(low, [(1, 1), (0, 1), (0, 1)])[1] == [1, 1, 0]


def test_tiny_bins_are_not_swallowed():
    cfg = difficulty.Config(edges=(1e-7, 0.5, 0.5 + 5e-7), hysteresis=0.0)
    rates = np.float32([0.0, 1e-7, 0.4, 0.5, 0.5 + 1e-7, 0.5 + 5e-7, 1.0])
    assert difficulty.bin_of(cfg, rates).tolist() == [0, 1, 1, 2, 2, 3, 3]


def test_a_jump_goes_straight_to_the_right_bin():
    cfg = difficulty.Config(edges=(0.25, 0.5, 0.75), hysteresis=0.1, window=1)
    _, bins, _ = _run(cfg, [(1, 1), (0, 1), (1, 1)])
    assert bins == [3, 0, 3]


def test_first_visit_has_no_hysteresis_and_edges_are_left_closed():
    cfg = difficulty.Config(edges=(0.3, 0.6), hysteresis=0.2, statistic="pass_at_k", k=1)
    for correct, wanted in ((0, 0), (2, 0), (3, 1), (5, 1), (6, 2), (10, 2)):
        assert _run(cfg, [(correct, 10)])[1] == [wanted]


def test_window_forgets():
    cfg = difficulty.Config(edges=(0.5,), window=2, hysteresis=0.0)
    _, bins, rates = _run(cfg, [(1, 1), (1, 1), (0, 1), (0, 1), (0, 1)])
    assert rates == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert bins == [1, 1, 1, 0, 0]


def test_unseen_prompts():
    ids = np.arange(3, dtype=np.int32)
    for statistic in ("any", "pass_at_k", "beta"):
        hardest = difficulty.Config(unseen="hardest", statistic=statistic)
        state = difficulty.init(hardest, 3)
        assert difficulty.bins(hardest, state, ids).tolist() == [0, 0, 0]
        assert difficulty.pass_rate(hardest, state, ids).tolist() == [0.0, 0.0, 0.0]
        prior = difficulty.Config(unseen="prior", statistic=statistic, prior=(1.0, 1.0))
        rate = difficulty.pass_rate(prior, state, ids)
        np.testing.assert_allclose(rate, 1.0 - 1.0 / 9.0, rtol=1e-6)  # uniform prior: E[(1-p)^8] = 1/9
        assert difficulty.bins(prior, state, ids).tolist() == [8, 8, 8]


@pytest.mark.parametrize("k", [1, 4, 8])
def test_pass_at_k_is_the_unbiased_estimator(k):
    n, c = (grid.ravel() for grid in np.meshgrid(np.arange(k, 25), np.arange(0, 25)))
    n, c = n[c <= n], c[c <= n]
    want = [1.0 - math.comb(int(a - b), k) / math.comb(int(a), k) for a, b in zip(n, c, strict=True)]
    got = difficulty.unbiased_pass_at_k(np.asarray(c, np.int32), np.asarray(n, np.int32), k)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_pass_at_k_does_not_overflow_and_knows_small_n():
    got = difficulty.unbiased_pass_at_k(np.array([1, 5000, 1, 0]), np.array([100_000, 100_000, 4, 0]), 8)
    np.testing.assert_allclose(got[:2], [8e-5, 1.0 - math.comb(95_000, 8) / math.comb(100_000, 8)], rtol=1e-4)
    assert np.isnan(got[2]) and np.isnan(got[3])


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (3.5, 5.5), (0.5, 4000.5), (4000.5, 0.5), (1e-3, 1e6), (2e5, 3e5)])
def test_beta_predictive_is_accurate_in_float32(a, b):
    for k in (1, 8, 64):
        fail = math.fsum(math.log1p(-a / (a + b + i)) for i in range(k))
        got = beta.pass_at_k(np.float32([a]), np.float32([b]), k)
        assert float(got[0]) == pytest.approx(-math.expm1(fail), rel=3e-5)


def test_beta_curves():
    arms = (1, 2, 3, 5)
    a, b = np.float32([1.0]), np.float32([1.0])  # uniform p: E[(1-p)^n] = E[p^n] = 1/(n+1)
    np.testing.assert_allclose(beta.coverage(a, b, arms)[0], [1 - 1 / (n + 1) for n in arms], rtol=1e-5)
    np.testing.assert_allclose(beta.informative(a, b, arms)[0], [1 - 2 / (n + 1) for n in arms], atol=1e-6)


def test_credible_interval_by_hand():
    """Beta(1, 1) is uniform: 80 % of p lies in (0.1, 0.9)."""
    cfg = difficulty.Config(statistic="beta", k=2, prior=(1.0, 1.0), credible=0.8)
    low, high = difficulty.credible_interval(cfg, difficulty.init(cfg, 1), np.array([0]))
    np.testing.assert_allclose([float(low[0]), float(high[0])], [1 - 0.9**2, 1 - 0.1**2], rtol=1e-4)


def test_beta_forgets_by_window():
    """H = 2 halves the evidence at each visit: 4 right of 4, then 0 of 4 leaves (2, 4), under every statistic."""
    for statistic in ("beta", "any", "pass_at_k"):
        cfg = difficulty.Config(statistic=statistic, window=2, prior=(1.0, 1.0))
        state, _, _ = _run(cfg, [(4, 4), (0, 4)])
        alpha, failures = difficulty.posterior(cfg, state, np.array([1]))
        assert (float(alpha[0]), float(failures[0])) == (3.0, 5.0)


def test_beta_moves_only_when_the_interval_has_left_the_bin():
    cfg = difficulty.Config(edges=(0.2, 0.5, 0.8), statistic="beta", window=10)
    rng, ids = np.random.default_rng(0), np.arange(64, dtype=np.int32)
    state, edges = difficulty.init(cfg, 64), np.array([0.0, 0.2, 0.5, 0.8, 1.0])
    update = jax.jit(lambda state, c, n: difficulty.update(cfg, state, ids, c, n))
    target_of = jax.jit(lambda state: difficulty.bin_of(cfg, difficulty.pass_rate(cfg, state, ids)))
    interval_of = jax.jit(lambda state: difficulty.credible_interval(cfg, state, ids))
    moves = stays = 0
    for visit in range(25):
        rate = np.where(visit < 12, rng.random(64) * 0.3, rng.random(64) * 0.05)
        before = np.asarray(difficulty.bins(cfg, state, ids))
        state = update(state, rng.binomial(6, rate).astype(np.int32), np.full(64, 6, np.int32))
        after = np.asarray(difficulty.bins(cfg, state, ids))
        target = np.asarray(target_of(state))
        low, high = (np.asarray(end) for end in interval_of(state))
        if visit == 0:
            np.testing.assert_array_equal(after, target)
            continue
        left = np.where(target > before, low - edges[before + 1], edges[before] - high)
        wants, clear = target != before, np.abs(left) > 1e-3
        np.testing.assert_array_equal(after[~wants], before[~wants])
        np.testing.assert_array_equal(after[wants & clear & (left > 0)], target[wants & clear & (left > 0)])
        np.testing.assert_array_equal(after[wants & clear & (left < 0)], before[wants & clear & (left < 0)])
        moves += (wants & clear & (left > 0)).sum()
        stays += (wants & clear & (left < 0)).sum()
    assert moves > 20 and stays > 20


def test_beta_depends_on_the_evidence_not_on_how_it_was_split():
    cfg = difficulty.Config(statistic="beta", window=10**6)
    once, _, _ = _run(cfg, [(5, 24)])
    many, _, _ = _run(cfg, [(1, 4), (2, 8), (0, 2), (2, 10)])
    ids = np.array([1], np.int32)
    np.testing.assert_allclose(difficulty.pass_rate(cfg, once, ids), difficulty.pass_rate(cfg, many, ids), rtol=1e-4)


def test_any_drifts_with_the_number_of_rollouts_and_others_do_not():
    """1,000 prompts of success rate 0.1, 40 visits of 2 or of 12 rollouts; pass@8 is 1 - 0.9^8 = 0.570."""
    rng, ids, means = np.random.default_rng(1), np.arange(1000, dtype=np.int32), {}
    for statistic, k in (("any", 8), ("beta", 8), ("pass_at_k", 2)):  # k at most n: see the next test for the others
        cfg = difficulty.Config(statistic=statistic, k=k, window=100)
        update = jax.jit(lambda state, c, n, cfg=cfg: difficulty.update(cfg, state, ids, c, n))
        for n in (2, 12):
            state = difficulty.init(cfg, 1000)
            for _ in range(40):
                state = update(state, rng.binomial(n, 0.1, 1000).astype(np.int32), np.full(1000, n, np.int32))
            means[statistic, n] = float(np.mean(difficulty.pass_rate(cfg, state, ids)))
    assert means["any", 2] == pytest.approx(1 - 0.9**2, abs=0.01)
    assert means["any", 12] == pytest.approx(1 - 0.9**12, abs=0.01)
    assert means["beta", 2] == pytest.approx(means["beta", 12], abs=0.015)
    assert means["beta", 12] == pytest.approx(1 - 0.9**8, abs=0.01)
    assert means["pass_at_k", 2] == pytest.approx(1 - 0.9**2, abs=0.01)
    assert means["pass_at_k", 12] == pytest.approx(1 - 0.9**2, abs=0.01)


def test_fewer_rollouts_than_k_take_the_posterior():
    """1 right of 4, k = 8, uniform prior: Beta(2, 4), 1 - E[(1-p)^8] = 1 - (4 * 5)/(12 * 13); not 1 - 0.75^8."""
    cfg = difficulty.Config(statistic="pass_at_k", k=8, prior=(1.0, 1.0))
    _, _, rates = _run(cfg, [(1, 4)])
    assert rates[0] == pytest.approx(1 - 20 / 156, rel=1e-5)


def test_nothing_scored_and_foreign_ids_change_nothing():
    for statistic in ("any", "pass_at_k", "beta"):
        cfg = difficulty.Config(statistic=statistic)
        state = _run(cfg, [(1, 4)])[0]
        ids = np.array([1, 2, -1, 3], np.int32)
        same = difficulty.update(cfg, state, ids, np.array([0, 3, 4, 4]), np.array([0, 0, 4, 4]))
        jax.tree.map(np.testing.assert_array_equal, state, same)
        bins = np.asarray(difficulty.bins(cfg, state, ids))
        assert bins[2] == bins[3] == bins[1]  # outside the data set: as never seen


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("edges", (0.5, 0.2), "strictly increasing"),
        ("edges", (0.0, 0.2), r"\(0, 1\)"),
        ("edges", 0.5, "tuple of numbers"),
        ("window", 0, "integer >= 1"),
        ("window", 2.5, "integer >= 1"),
        ("hysteresis", -0.1, r"\[0, 1\)"),
        ("statistic", "al", "'any', 'pass_at_k', 'beta'"),
        ("k", 0, "integer >= 1"),
        ("unseen", "easy", "'hardest', 'prior'"),
        ("prior", (0.0, 1.0), r"\(0, inf\)"),
        ("prior", (1.0,), "pair"),
        ("credible", 1.0, r"\(0, 1\)"),
    ],
)
def test_bad_fields(field, value, said):
    with pytest.raises(ValueError, match=f"{field}=.*{said}"):
        difficulty.Config(**{field: value})


def test_an_id_twice_is_refused_and_so_is_one_that_int32_would_wrap():
    cfg = difficulty.Config()
    state, two = difficulty.init(cfg, 4), np.array([1, 0])
    with pytest.raises(ValueError, match="prompt_ids holds 1 twice: an id may not repeat"):
        difficulty.update(cfg, state, [1, 1], two, two)
    rule = controllers.make("uniform", num_prompts=4, prompts_per_step=2, mean_rollouts=2)
    with pytest.raises(ValueError, match="candidate_ids holds 3 twice"):
        rule.plan(rule.init(jax.random.key(0)), np.array([3, 3, 1]), jax.random.key(0))
    with pytest.raises(ValueError, match="prompt_ids holds 4294967297: it must fit into int32"):
        difficulty.bins(cfg, state, np.array([2**32 + 1]))  # would be prompt 1
    jax.tree.map(np.testing.assert_array_equal, state, difficulty.update(cfg, state, [-1, -1], two, two))


def test_bad_arguments():
    cfg = difficulty.Config(edges=[0.1, 0.2])  # a list, as YAML gives it, is fine
    assert hash(cfg) == hash(difficulty.Config(edges=(0.1, 0.2)))
    state = difficulty.init(cfg, 4)
    with pytest.raises(ValueError, match="num_rollouts has shape"):
        difficulty.update(cfg, state, np.array([1, 2]), np.array([1, 2]), np.array([1]))
    with pytest.raises(ValueError, match="prompt_ids has dtype"):
        difficulty.bins(cfg, state, np.array([1.0]))
    with pytest.raises(ValueError, match="num_prompts=0"):
        difficulty.init(cfg, 0)
