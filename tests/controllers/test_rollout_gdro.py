"""The rollout adversary: exact budgets, the square-root law as its fixed point, feedback, both duals."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdro_jax.controllers import allocation, beta, reporting, rollout_gdro, theory, utilities

VARIANCES = np.array([0.25, 0.12, 0.04, 0.01], np.float32)
BINS = np.repeat(np.arange(4), [10, 22, 13, 19]).astype(np.int32)
allocate = jax.jit(rollout_gdro.allocate, static_argnums=0)
update = jax.jit(rollout_gdro.update, static_argnums=0)


def _learn(cfg, steps=1, bins=BINS, variances=VARIANCES):
    """The state after steps whose reward variances are those of the bins."""
    state, zeros = rollout_gdro.init(cfg), np.zeros(len(bins), np.float32)
    for step in range(steps):
        plan = allocate(cfg, state, bins, jax.random.key(step))
        state = update(cfg, state, bins, plan, zeros, variances[bins])
    return state


def _per_bin(plan, bins=BINS):
    counts = np.asarray(plan.per_prompt)
    return np.array([counts[bins == b].mean() for b in range(bins.max() + 1)])


@pytest.mark.parametrize(
    ("utility", "per_prompt"), [("surrogate", True), ("released", False), ("variance", True), ("variance", False)]
)
def test_without_evidence_argmax_is_uniform(utility, per_prompt):
    cfg = rollout_gdro.Config(4, utility=utility, per_prompt=per_prompt)
    plan = allocate(cfg, rollout_gdro.init(cfg), BINS, jax.random.key(0))
    assert (np.asarray(plan.per_prompt) == 4).all()


def test_the_published_rule_can_be_forced_to_uniform():
    """37 a + 27 b = 256 with 2 <= a, b <= 12 has the one solution (4, 4)."""
    bins, variances = np.repeat([0, 1], [37, 27]).astype(np.int32), np.array([0.25, 0.01], np.float32)
    published = rollout_gdro.Config(2, per_prompt=False)
    state = _learn(published, 2, bins, variances)
    plan = allocate(published, state, bins, jax.random.key(0))
    assert (np.asarray(plan.per_prompt) == 4).all()
    assert int(plan.forced_uniform) == 1 and int(state.forced) == 2
    ours = rollout_gdro.Config(2)
    plan = allocate(ours, _learn(ours, 2, bins, variances), bins, jax.random.key(0))
    first, second = _per_bin(plan, bins)
    assert first > 5 > 2.5 > second
    assert np.asarray(plan.per_prompt).sum() == 256
    assert int(plan.forced_uniform) == 0
    free = allocate(published, state, np.repeat([0, 1], [32, 32]).astype(np.int32), jax.random.key(0))
    assert int(free.forced_uniform) == 0 and free.per_bin.tolist() == [6, 2]


@pytest.mark.parametrize(("step_size", "price"), [(0.65, 0.0), (1e-6, 0.0), (0.65, 100.0)])
def test_square_root_law_is_the_fixed_point(step_size, price):
    """Whatever the step size is, and at a price far above the losses, which every way to spend the budget pays."""
    cfg = rollout_gdro.Config(4, step_size=step_size, mean_rollouts=6, min_rollouts=1, max_rollouts=20)
    state = _learn(cfg, 30)._replace(price=jnp.float32(price))
    plan = allocate(cfg, state, BINS, jax.random.key(7))
    shares = np.bincount(BINS) / len(BINS)
    law = np.asarray(allocation.square_root_law(VARIANCES, shares, 6, 1, 20))
    np.testing.assert_allclose(_per_bin(plan), law, atol=0.75)
    least = float(theory.optimal_variance_proxy(shares, VARIANCES, 6))
    realised = np.mean(VARIANCES[BINS] / np.asarray(plan.per_prompt))
    assert least <= realised <= 1.02 * least


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-30])
def test_large_budgets_and_small_variances_keep_the_optimum(scale):
    """Arms 2 ... 768: neighbouring arms differ in the sixth digit of the loss, and must still be told apart."""
    cfg = rollout_gdro.Config(4, mean_rollouts=256, max_rollouts=768)
    variances = VARIANCES * np.float32(scale)
    table = jnp.asarray(variances[:, None] / np.array(cfg.arms, np.float32))
    state = rollout_gdro.init(cfg)._replace(scores=table, visits=jnp.ones(4, jnp.int32))
    counts = np.asarray(allocate(cfg, state, BINS, jax.random.key(0)).per_prompt)
    assert counts.sum() == 64 * 256
    shares = np.bincount(BINS) / len(BINS)
    least = 256 * (shares @ np.sqrt(VARIANCES)) ** 2 / 256**2
    assert np.mean(VARIANCES[BINS].astype(np.float64) / counts) <= 1.001 * least


def test_a_bin_never_seen_is_allocated_as_the_mean_of_the_others():
    cfg = rollout_gdro.Config(3, mean_rollouts=6, min_rollouts=1, max_rollouts=20)
    bins = np.repeat([0, 1, 2], 8).astype(np.int32)
    seen = np.array([0.24, 0.0, 0.02])
    state = rollout_gdro.init(cfg)._replace(
        scores=jnp.asarray(seen[:, None] / np.array(cfg.arms), jnp.float32),
        variances=jnp.asarray(seen, jnp.float32),
        visits=jnp.array([3, 0, 5]),
        variance_visits=jnp.array([3, 0, 5]),
    )
    mean = (0.24 + 0.02) / 2
    np.testing.assert_allclose(rollout_gdro.or_others_mean(state.variances, state.variance_visits)[1], mean, rtol=1e-6)
    law = allocation.square_root_law(np.array([0.24, mean, 0.02]), np.ones(3), 6, 1, 20)
    plan = allocate(cfg, state, bins, jax.random.key(0))
    np.testing.assert_allclose(_per_bin(plan, bins), law, atol=0.75)
    share = jnp.full(3, 1 / 3)
    logged = reporting.rollout_adversary(cfg, state, plan, {"share": share, "rollouts_per_bin": share})
    np.testing.assert_allclose(logged["square_root_law"], law, rtol=1e-5)


@pytest.mark.parametrize(
    ("bins", "low", "high", "wanted"),
    [([2], 2, 12, [4]), ([1] * 6, 2, 12, [4] * 6), ([0, 1, 2, 2], 4, 4, [4] * 4)],
)
@pytest.mark.parametrize("how", [{}, {"selection": "sample", "utility": "surrogate"}])
def test_nothing_to_choose_is_the_mean(bins, low, high, wanted, how):
    """One prompt, all in one bin, or one arm."""
    cfg = rollout_gdro.Config(3, min_rollouts=low, max_rollouts=high, **how)
    scores = jnp.asarray(np.random.default_rng(0).random((3, high - low + 1)), jnp.float32)
    state = rollout_gdro.init(cfg)._replace(scores=scores, visits=jnp.ones(3, jnp.int32))
    plan = allocate(cfg, state, np.array(bins, np.int32), jax.random.key(0))
    counts = np.asarray(plan.per_prompt)
    assert counts.tolist() == wanted


def test_marginal_gains_by_hand():
    """Sizes 2, 0, 3 and totals 0, 5, 6, 6 | 0, 9, 18, 27 | 0, 4, 7, 8: gains 5 1 0 | - | 4 3 1."""
    values = jnp.array([[0.0, 5.0, 6.0, 6.0], [0.0, 9.0, 18.0, 27.0], [0.0, 4.0, 7.0, 8.0]])
    sizes, first, order = jnp.array([2, 0, 3]), jnp.zeros(3, jnp.int32), jnp.array([0.2, 0.1, 0.3])
    for left, arms, split, some in (
        (0, (0, 0), 0, 0), (1, (0, 0), 0, 1), (2, (1, 0), 2, 0), (4, (1, 0), 2, 2),
        (8, (1, 2), 0, 0), (9, (1, 2), 0, 1), (13, (2, 3), 0, 0), (15, (3, 3), 0, 0),
    ):  # fmt: skip
        got, which, rest = utilities.marginal_gains(values, sizes, first, jnp.int32(left), order)
        assert (int(got[0]), int(got[2]), int(rest)) == (*arms, some), left
        assert int(which) == split or some == 0
        assert int(got[1]) == 0


def test_marginal_gains_break_ties_by_arm_then_by_order():
    values, sizes = jnp.zeros((3, 4)), jnp.array([2, 2, 2])
    first = jnp.zeros(3, jnp.int32)
    got, which, rest = utilities.marginal_gains(values, sizes, first, jnp.int32(9), jnp.array([0.9, 0.1, 0.5]))
    assert (got.tolist(), int(which), int(rest)) == ([1, 2, 1], 2, 1)


def test_marginal_gains_evenly():
    """Bin 0 gains 9 a time, bin 1 only 1: evenly bin 1 gets its first before bin 0 gets a second."""
    values, sizes = jnp.array([[0.0, 9.0, 18.0, 27.0], [0.0, 1.0, 2.0, 3.0]]), jnp.array([1, 2])
    first, order = jnp.array([1, 0], jnp.int32), jnp.array([0.1, 0.2])
    for left, evenly, arms in ((3, True, [2, 1]), (2, False, [3, 0]), (4, True, [3, 1])):
        got, _, rest = utilities.marginal_gains(values, sizes, first, jnp.int32(left), order, evenly=evenly)
        assert (got.tolist(), int(rest)) == (arms, 0)


@pytest.mark.parametrize("selection", ["argmax", "sample"])
def test_bandit_leftovers_are_one_rollout_each(selection):
    """29 prompts in one bin and single ones in others: what the large bin leaves is no windfall for the small ones."""
    bins = np.array([0] * 29 + [1, 2, 3], np.int32)
    cfg = rollout_gdro.Config(4, utility="surrogate", selection=selection, exploration=0.1)
    scores = np.random.default_rng(1).normal(size=(6, 4, 11)).astype(np.float32) * 2
    states = jax.vmap(lambda table: rollout_gdro.init(cfg)._replace(scores=table))(jnp.asarray(scores))
    keys = jax.random.split(jax.random.key(0), 6)
    plans = jax.jit(jax.vmap(lambda state, key: rollout_gdro.allocate(cfg, state, bins, key)))(states, keys)
    counts, drawn = np.asarray(plans.per_prompt), np.asarray(plans.arm)[:, bins] + 2
    assert (counts.sum(1) == 4 * 32).all()
    assert (counts - drawn >= 0).all() and (counts - drawn <= 1).all() and (counts > drawn).any()


def test_selection_per_prompt_is_nearly_the_best_of_all_whole_counts():
    """Four prompts in two bins: against every vector of counts that meets the budget."""
    bins, variances = np.array([0, 1, 1, 1], np.int32), np.array([0.2, 0.05], np.float32)
    cfg = rollout_gdro.Config(2, max_rollouts=8)
    plan = allocate(cfg, _learn(cfg, 1, bins, variances), bins, jax.random.key(0))
    every = [c for c in itertools.product(range(2, 9), repeat=4) if sum(c) == 16]
    least = min(sum(variances[bins] / np.array(c)) for c in every)
    assert np.sum(variances[bins] / np.asarray(plan.per_prompt)) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("utility", ["informative", "coverage"])
def test_concave_utilities_reach_the_best_whole_counts(utility):
    bins = np.array([0, 1, 1, 2, 2], np.int32)
    alpha, failures = np.float32([0.6, 2.0, 2.0, 5.0, 5.0]), np.float32([8.0, 3.0, 3.0, 0.7, 0.7])
    cfg = rollout_gdro.Config(3, utility=utility, max_rollouts=7)
    state, zeros = rollout_gdro.init(cfg), np.zeros(5, np.float32)
    plan = allocate(cfg, state, bins, jax.random.key(0))
    state = update(cfg, state, bins, plan, zeros, zeros, posterior=(alpha, failures))
    curve = beta.informative if utility == "informative" else beta.coverage
    table = np.asarray(curve(alpha, failures, cfg.arms))
    np.testing.assert_allclose(state.scores, -table[[0, 1, 3]], rtol=1e-5)
    plan = allocate(cfg, state, bins, jax.random.key(1))

    def total(counts):
        return sum(table[i, n - 2] for i, n in enumerate(counts))

    best = max(total(c) for c in itertools.product(range(2, 8), repeat=5) if sum(c) == 20)
    assert total(np.asarray(plan.per_prompt)) == pytest.approx(best, rel=1e-5)
    assert np.asarray(plan.per_prompt).sum() == 20


def test_without_a_posterior_concave_utilities_come_from_the_variance():
    """v = 3/16 is p = 1/4 or 3/4: 1 - p^n - (1-p)^n at n = 2, 3 is 3/8, 9/16; coverage of p = 1/4 is 7/16, 37/64."""
    for utility, wanted in (("informative", [-3 / 8, -9 / 16]), ("coverage", [-7 / 16, -37 / 64])):
        cfg = rollout_gdro.Config(1, utility=utility, mean_rollouts=2, max_rollouts=3)
        state = _learn(cfg, 1, np.zeros(3, np.int32), np.array([3 / 16], np.float32))
        np.testing.assert_allclose(state.scores, [wanted], rtol=1e-5)


def test_variance_statistics_by_hand():
    """ema 0.4: 0.2, then 0.6 * 0.2 + 0.4 * 0.1 = 0.16; NaN entries and absent bins change nothing; scores are v/n."""
    cfg = rollout_gdro.Config(2, mean_rollouts=2, max_rollouts=3)
    bins, zeros = np.array([0, 0], np.int32), np.zeros(2, np.float32)
    state = rollout_gdro.init(cfg)
    plan = allocate(cfg, state, bins, jax.random.key(0))
    for seen in ([0.3, 0.1], [0.1, np.nan], [np.nan, np.inf], [-np.inf, np.nan]):
        state = update(cfg, state, bins, plan, zeros, np.float32(seen))
    np.testing.assert_allclose(state.variances, [0.16, 0.0], rtol=1e-5)
    np.testing.assert_allclose(state.scores, [[0.08, 0.16 / 3], [0.0, 0.0]], rtol=1e-5)
    assert state.visits.tolist() == [2, 0] and int(state.step) == 2


@pytest.mark.parametrize(("utility", "sign"), [("surrogate", 1.0), ("released", -1.0)])
def test_bandit_feedback_by_hand(utility, sign):
    """One bin plays arm 4 of 2 ... 6, of probability 1/5: its score becomes ema * loss * 5 = 0.4 * 0.3 * 5 = 0.6."""
    cfg = rollout_gdro.Config(1, max_rollouts=6, utility=utility)
    bins, state = np.zeros(4, np.int32), rollout_gdro.init(cfg)
    plan = allocate(cfg, state, bins, jax.random.key(0))
    assert float(plan.probability[0]) == pytest.approx(0.2)
    signal = np.float32([0.2, 0.4, 0.3, np.nan])
    state = update(cfg, state, bins, plan, signal, np.zeros(4, np.float32))
    np.testing.assert_allclose(state.scores, [[0, 0, 0.6 * sign, 0, 0]], rtol=1e-5)
    assert float(state.played) == pytest.approx(0.3 * sign * 0.75, rel=1e-5)  # three of four prompts were scored


@pytest.mark.parametrize("per_prompt", [True, False])
def test_sampled_feedback_is_unbiased(per_prompt):
    """Mean over draws of 1[arm drawn] / probability is 1 for every arm that the budget allows."""
    bins = np.repeat([0, 1, 2], [2, 3, 4]).astype(np.int32)
    cfg = rollout_gdro.Config(
        3, max_rollouts=7, selection="sample", utility="surrogate", per_prompt=per_prompt, exploration=0.1
    )
    scores = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    state = rollout_gdro.init(cfg)._replace(scores=jnp.asarray(scores))
    keys = jax.random.split(jax.random.key(3), 8_000)
    plans = jax.jit(jax.vmap(lambda key: rollout_gdro.allocate(cfg, state, bins, key)))(keys)
    assert (np.asarray(plans.per_prompt).sum(1) == 36).all()
    drawn, probability = np.asarray(plans.arm), np.asarray(plans.probability)
    checked = 0
    for b, arm in itertools.product(range(3), range(6)):
        hit = drawn[:, b] == arm
        if hit.mean() > 0.01:
            estimate = hit / probability[:, b]
            assert estimate.mean() == pytest.approx(1.0, abs=5 * estimate.std() / np.sqrt(len(keys)))
            assert np.ptp(probability[hit, b]) < 1e-5  # a marginal does not depend on the draw
            checked += 1
    assert checked >= 8


def test_exact_dual_never_moves_and_relaxed_finds_the_shadow_price():
    cfg = partial(rollout_gdro.Config, 4, mean_rollouts=6, min_rollouts=1, max_rollouts=24)
    assert float(_learn(cfg(dual="exact"), 20).price) == 0.0
    shares = np.bincount(BINS) / len(BINS)
    shadow = ((shares * np.sqrt(VARIANCES)).sum() / 6) ** 2  # n_b = sqrt(v_b / mu) meets the budget
    prices = [float(_learn(cfg(dual="relaxed"), steps).price) for steps in (200, 220)]
    np.testing.assert_allclose(prices, shadow, rtol=0.2)


def test_exact_dual_never_moves_where_the_compiled_mean_is_not_whole():
    """164 * float32(1 / 41) is not 4."""
    bins = (np.arange(41) % 4).astype(np.int32)
    assert float(_learn(rollout_gdro.Config(4), 2, bins).price) == 0.0


def test_relaxed_price_brings_the_published_rule_to_the_law():
    """One integer per bin and equal counts per bin: with the price, sum_b L_b is least at sqrt(v_b / mu)."""
    bins = np.repeat(np.arange(4), 16).astype(np.int32)
    variances = np.array([0.16, 0.04, 0.01, 0.01], np.float32)  # roots 4 : 2 : 1 : 1
    cfg = rollout_gdro.Config(4, per_prompt=False, dual="relaxed", min_rollouts=1, mean_rollouts=4, max_rollouts=12)
    plan = allocate(cfg, _learn(cfg, 100, bins, variances), bins, jax.random.key(0))
    assert plan.per_bin.tolist() == [8, 4, 2, 2]


def test_bin_weights_move_rollouts_by_their_square_root():
    """q proportional to share x 9 for bin 1: the law sees v_1 nine times as large."""
    cfg = rollout_gdro.Config(4, mean_rollouts=6, min_rollouts=1, max_rollouts=20)
    shares = np.bincount(BINS) / len(BINS)
    q = shares * np.array([1.0, 1.0, 9.0, 1.0])
    plan = allocate(cfg, _learn(cfg), BINS, jax.random.key(0), bin_weights=jnp.asarray(q / q.sum(), jnp.float32))
    law = allocation.square_root_law(VARIANCES * np.array([1, 1, 9, 1]), shares, 6, 1, 20)
    np.testing.assert_allclose(_per_bin(plan), law, atol=0.75)
    np.testing.assert_allclose(plan.weights, q / shares / q.sum(), rtol=1e-5)


def test_the_arm_of_marginal_gains_is_the_count_given_and_its_probability_its_own():
    cfg = rollout_gdro.Config(4)
    state = _learn(cfg)
    plan = allocate(cfg, state, BINS, jax.random.key(0))
    assert (plan.arm + cfg.min_rollouts).tolist() == plan.per_bin.tolist() and len(set(plan.per_bin.tolist())) > 1
    table = np.exp(rollout_gdro.log_arm_distribution(cfg, state))
    np.testing.assert_allclose(plan.probability, table[np.arange(4), np.asarray(plan.arm)], rtol=1e-5)


def test_leftovers_go_to_prompts_by_key_and_follow_ids():
    cfg, ids = rollout_gdro.Config(4), np.random.default_rng(0).permutation(1000)[:64].astype(np.int32)
    state = _learn(cfg)
    plans = [np.asarray(allocate(cfg, state, BINS, jax.random.key(s), prompt_ids=ids).per_prompt) for s in range(6)]
    assert any((plans[0] != other).any() for other in plans[1:])
    assert all((np.bincount(BINS, plan) == np.bincount(BINS, plans[0])).all() for plan in plans)
    order = np.random.default_rng(1).permutation(64)
    moved = allocate(cfg, state, BINS[order], jax.random.key(0), prompt_ids=ids[order]).per_prompt
    np.testing.assert_array_equal(moved, plans[0][order])


@pytest.mark.parametrize(
    ("utility", "selection"), [("surrogate", "argmax"), ("variance", "sample"), ("informative", "argmax")]
)
def test_extreme_values_keep_everything_finite(utility, selection):
    cfg = rollout_gdro.Config(4, utility=utility, selection=selection, exploration=0.0, dual="relaxed", step_size=9.0)
    state, big = rollout_gdro.init(cfg), np.float32(3e38)
    for step, (low, high) in enumerate([(-big, big), (big, big), (0.0, -big), (np.float32(1e-38), big)]):
        plan = allocate(cfg, state, BINS, jax.random.key(step))
        counts = np.asarray(plan.per_prompt)
        assert counts.sum() == 4 * 64 and counts.min() >= 2 and counts.max() <= 12
        values = np.where(BINS % 2 == 0, low, high).astype(np.float32)
        state = update(cfg, state, BINS, plan, values, np.abs(values))
        assert all(np.isfinite(leaf).all() for leaf in state), state


def test_arm_regret_is_that_of_the_history():
    """Played: v_b / n_i averaged over prompts; best fixed: no worse than the law's counts, so the regret is small."""
    cfg = rollout_gdro.Config(4, mean_rollouts=6, min_rollouts=1, max_rollouts=20)
    state = _learn(cfg, 12)
    shares = np.bincount(BINS) / len(BINS)
    first = np.mean(VARIANCES[BINS] / 6)  # the first plan is uniform
    later = np.mean(VARIANCES[BINS] / np.asarray(allocate(cfg, _learn(cfg), BINS, jax.random.key(0)).per_prompt))
    assert float(state.played) == pytest.approx(first + 11 * later, rel=1e-4)
    best = float(theory.best_fixed_arms_loss(state.arm_losses, state.mass, jnp.array(cfg.arms, jnp.float32), 6.0))
    assert best == pytest.approx(12 * float(theory.optimal_variance_proxy(shares, VARIANCES, 6)), rel=0.02)
    assert first - later <= float(state.played) - best + 1e-4 <= first


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("min_rollouts", 5, "at most mean_rollouts=4"),
        ("max_rollouts", 3, "at least mean_rollouts=4"),
        ("min_rollouts", 0, "integer >= 1"),
        ("mean_rollouts", 2.5, "integer >= 1"),
        ("utility", "reward", "'variance'"),
        ("selection", "best", "'argmax', 'sample'"),
        ("dual", "none", "'exact', 'relaxed'"),
        ("per_prompt", "yes", "True or False"),
        ("ema", 0.0, r"\(0, 1\]"),
        ("dual_step_size", -1.0, r"\[0, inf\)"),
    ],
)
def test_bad_fields(field, value, said):
    with pytest.raises(ValueError, match=f"{field}=.*{said}"):
        rollout_gdro.Config(**({"num_bins": 4} | {field: value}))


def test_bad_shapes():
    cfg = rollout_gdro.Config(4)
    state = rollout_gdro.init(cfg)
    with pytest.raises(ValueError, match="bins has dtype"):
        rollout_gdro.allocate(cfg, state, np.zeros(3, np.float32), jax.random.key(0))
    with pytest.raises(ValueError, match="prompt_ids has shape"):
        rollout_gdro.allocate(cfg, state, BINS, jax.random.key(0), prompt_ids=np.arange(3))
    plan = allocate(cfg, state, BINS, jax.random.key(0))
    with pytest.raises(ValueError, match="signal has shape"):
        rollout_gdro.update(cfg, state, BINS, plan, np.zeros(3), np.zeros(64))


@pytest.mark.parametrize("bad", [4, -1])
def test_bins_that_are_not_there(bad):
    """Their prompts would get rollouts that no budget counts."""
    cfg = rollout_gdro.Config(4)
    state, bins, zeros = rollout_gdro.init(cfg), np.array([0, 1, bad], np.int32), np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=f"bins holds {bad}: each must be in 0 ... 3"):
        rollout_gdro.allocate(cfg, state, bins, jax.random.key(0))
    plan = allocate(cfg, state, np.array([0, 1, 2], np.int32), jax.random.key(0))
    with pytest.raises(ValueError, match=f"bins holds {bad}: each must be in 0 ... 3"):
        rollout_gdro.update(cfg, state, bins, plan, zeros, zeros)
