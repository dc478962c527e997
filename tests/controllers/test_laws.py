"""The laws that every rule obeys, as a table over `controllers.names()` and the variants of settings that matter."""

import math
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdro_jax import controllers

N, P, MEAN = 40, 12, 4
VARIANTS = {
    **{name: (name, ()) for name in controllers.names()},
    "sampled": ("rollout_gdro", (("selection", "sample"), ("utility", "surrogate"))),
    "coverage": ("rollout_gdro", (("utility", "coverage"), ("statistic", "pass_at_k"), ("k", 2))),
    "joint_relaxed": ("joint", (("dual", "relaxed"), ("utility", "informative"), ("signal", "pass_error"))),
    "current_batch": ("prompt_gdro", (("use_current_batch", True), ("weights", "published"), ("statistic", "any"))),
}


class Case(NamedTuple):
    rule: controllers.Rule
    plan: object
    update: object
    metrics: object


@cache
def _case(variant):
    name, settings = VARIANTS[variant]
    rule = controllers.make(name, num_prompts=N, prompts_per_step=P, mean_rollouts=MEAN, **dict(settings))
    return Case(rule, jax.jit(rule.plan), jax.jit(rule.update), jax.jit(rule.metrics))


def _ids(step, extra=0):
    return np.random.default_rng(100 + step).permutation(N)[: P + extra].astype(np.int32)


def _outcome(plan, seed, unscorable=True):
    """Rewards of prompts whose success rate rises with the id; some rollouts, and all of one prompt, unscorable."""
    rng, rollouts, ids = np.random.default_rng(seed), np.asarray(plan.rollouts), np.asarray(plan.prompt_ids)
    lost = np.where(rng.random(P) < 0.2, 1, 0) if unscorable else np.zeros(P, int)
    lost[0] = rollouts[0] if unscorable else 0
    n = rollouts - lost
    c = rng.binomial(n, (ids / N) ** 2)
    rate = c / np.maximum(n, 1)
    variance = np.where(n > 1, rate * (1 - rate) * n / np.maximum(n - 1, 1), np.nan)
    signal = np.where(n > 0, rng.normal(size=P), np.nan)
    return controllers.Outcome(
        *(jnp.asarray(x, jnp.int32) for x in (c, n, lost)), jnp.float32(signal), jnp.float32(variance)
    )


@cache
def _trained(variant, steps=4):
    case = _case(variant)
    state = case.rule.init(jax.random.key(0))
    for step in range(steps):
        plan, state = case.plan(state, _ids(step), jax.random.key(step))
        state = case.update(state, plan, _outcome(plan, step))
    return state


def _same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def _finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(np.asarray(leaf)).all(), tree


def _some(*quick):
    """All variants; those not named take long without jit, or to compile, and are left to the slow run."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]


@pytest.fixture(params=list(VARIANTS))
def variant(request):
    return request.param


def test_budget_is_exact_and_within_bounds(variant):
    case, state = _case(variant), _trained(variant)
    for start in (case.rule.init(jax.random.key(0)), state):
        for seed in range(5):
            plan, _ = case.plan(start, _ids(seed), jax.random.key(seed))
            counts = np.asarray(plan.rollouts)
            assert counts.sum() == P * MEAN
            assert counts.min() >= 2 and counts.max() <= 3 * MEAN
            np.testing.assert_array_equal(plan.prompt_ids, _ids(seed))
            assert plan.weights.shape == plan.bins.shape == (P,)
            _finite(plan)


def test_permuting_the_batch_permutes_the_plan(variant):
    case, state, ids = _case(variant), _trained(variant), _ids(9)
    order = np.random.default_rng(0).permutation(P)
    plan, _ = case.plan(state, ids, jax.random.key(3))
    moved, _ = case.plan(state, ids[order], jax.random.key(3))
    for field in ("prompt_ids", "bins", "weights", "rollouts"):
        np.testing.assert_array_equal(getattr(moved, field), np.asarray(getattr(plan, field))[order], field)


def test_the_first_of_more_candidates_are_taken(variant):
    case, state, ids = _case(variant), _trained(variant), _ids(5, extra=7)
    taken = jax.eval_shape(lambda *args: case.rule.plan(*args)[0], state, ids, jax.random.key(1))
    assert taken.prompt_ids.shape == (P,)
    with pytest.raises(ValueError, match=r"candidate_ids.*at least 12"):
        case.rule.plan(state, ids[: P - 1], jax.random.key(1))


@pytest.mark.parametrize("variant", _some("prompt_gdro"))
def test_candidates_past_the_first_do_not_matter(variant):
    case, state, ids = _case(variant), _trained(variant), _ids(5, extra=7)
    _same(case.rule.plan(state, ids, jax.random.key(1)), case.rule.plan(state, ids[:P], jax.random.key(1)))


@pytest.mark.parametrize("variant", _some("prompt_gdro"))
def test_jit_equals_no_jit(variant):
    case, state, ids = _case(variant), _trained(variant), _ids(9)
    plan, _ = case.plan(state, ids, jax.random.key(3))
    outcome = _outcome(plan, 9)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)  # noqa: E731
    with jax.disable_jit():
        loose, _ = case.rule.plan(state, ids, jax.random.key(3))
        after = case.rule.update(state, plan, outcome)
    jax.tree.map(close, plan, loose)
    jax.tree.map(close, case.update(state, plan, outcome), after)


def test_no_recompile_and_stable_types(variant):
    case, state = _case(variant), _trained(variant)
    fresh = case.rule.init(jax.random.key(1))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    sizes = case.plan._cache_size(), case.update._cache_size()
    plan, after = case.plan(state, _ids(7), jax.random.key(7))
    case.update(after, plan, _outcome(plan, 7))
    assert (case.plan._cache_size(), case.update._cache_size()) == sizes == (1, 1)


def test_state_round_trips_and_may_be_donated(variant):
    case, state = _case(variant), _trained(variant)
    leaves, tree = jax.tree.flatten(state)
    back = jax.tree.unflatten(tree, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    plan, _ = case.plan(state, _ids(2), jax.random.key(2))
    _same(plan, case.plan(back, _ids(2), jax.random.key(2))[0])
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(case.rule.init(jax.random.key(0)))]
    sizes = [leaf.size for leaf in jax.tree.leaves(case.rule.init(jax.random.key(0)))]
    used = [pointer for pointer, size in zip(buffers, sizes, strict=True) if size]
    assert len(set(used)) == len(used)  # no buffer twice, so that the state can be donated


def test_a_prompt_without_scored_rollouts_changes_nothing(variant):
    case, state = _case(variant), _trained(variant)
    plan, _ = case.plan(state, _ids(3), jax.random.key(3))
    nothing = jnp.zeros(P, jnp.int32)
    junk = jnp.full(P, 7.0, jnp.float32)
    _same(state, case.update(state, plan, controllers.Outcome(nothing, nothing, plan.rollouts, junk, junk)))
    some = _outcome(plan, 3)
    loud = some._replace(
        num_correct=some.num_correct.at[0].set(3),
        signal=some.signal.at[0].set(1e9),
        reward_variance=some.reward_variance.at[0].set(1e9),
    )
    assert int(some.num_rollouts[0]) == 0
    _same(case.update(state, plan, some), case.update(state, plan, loud))


@pytest.mark.parametrize("value", [3e38, -3e38, 0.0, np.nan, np.inf])
def test_any_input_leaves_the_state_finite(variant, value):
    case, state = _case(variant), _trained(variant)
    for step in range(2):
        plan, state = case.plan(state, _ids(step), jax.random.key(step))
        outcome = _outcome(plan, step)
        mask = jnp.arange(P) % 3 == step
        outcome = outcome._replace(
            signal=jnp.where(mask, jnp.float32(value), outcome.signal),
            reward_variance=jnp.where(mask, jnp.float32(value), outcome.reward_variance),
        )
        state = case.update(state, plan, outcome)
        _finite(state)
    plan, _ = case.plan(state, _ids(2), jax.random.key(2))
    _finite(plan)
    assert int(plan.rollouts.sum()) == P * MEAN


def test_metrics_are_flat_scalars_and_bins(variant):
    case, state = _case(variant), _trained(variant)
    plan, _ = case.plan(state, _ids(1), jax.random.key(1))
    metrics = case.metrics(state, plan)
    bins = metrics["share"].shape
    assert {value.shape for value in metrics.values()} <= {(), bins}
    assert float(metrics["share"].sum()) == pytest.approx(1.0, abs=1e-5)
    seen = np.asarray(metrics["share"]) > 0
    means = np.asarray(metrics["rollouts_per_bin"])
    assert (np.isnan(means) == ~seen).all()
    assert (means[seen] * np.asarray(metrics["share"])[seen]).sum() == pytest.approx(MEAN, rel=1e-5)
    for name, value in metrics.items():
        if not name.endswith("_per_bin"):
            assert np.isfinite(value).all(), name
    name = VARIANTS[variant][0]
    if name == "joint" or "prompt" in name:
        assert {"q", "scores", "regret", "regret_bound", "effective_bins"} <= set(metrics)
    if name == "joint" or "rollout" in name:
        assert {"price", "variances", "forced_uniform", "arm_regret", "square_root_law"} <= set(metrics)


@pytest.mark.parametrize("variant", _some("uniform", "joint"))
def test_scan_and_vmap(variant):
    case = _case(variant)
    rates = jnp.linspace(0.0, 1.0, N)
    ids = jnp.stack([jnp.asarray(_ids(step)) for step in range(3)])

    def one(key):
        def step(state, item):
            ids, key = item
            plan, state = case.rule.plan(state, ids, key)
            c = jnp.round(rates[ids] * plan.rollouts).astype(jnp.int32)
            rate = c / plan.rollouts
            outcome = controllers.Outcome(c, plan.rollouts, 0 * c, 1.0 - rate, rate * (1.0 - rate))
            return case.rule.update(state, plan, outcome), plan.rollouts

        return jax.lax.scan(step, case.rule.init(key), (ids, jax.random.split(key, 3)))

    states, rollouts = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 2))
    assert (np.asarray(rollouts).sum(-1) == P * MEAN).all()
    _finite(states)


def test_types_are_the_same_under_x64(variant):
    name, settings = VARIANTS[variant]
    with jax.enable_x64(True):
        rule = controllers.make(name, num_prompts=N, prompts_per_step=P, mean_rollouts=MEAN, **dict(settings))
        state = jax.eval_shape(rule.init, jax.random.key(0))
        plan, state = jax.eval_shape(rule.plan, state, np.arange(P), jax.random.key(0))
        half = np.full(P, 2, np.int64)
        outcome = controllers.Outcome(half, half + 2, 0 * half, np.ones(P), np.full(P, 0.2))
        after = jax.eval_shape(rule.update, state, plan, outcome)
        kinds = {leaf.dtype.name for leaf in jax.tree.leaves((state, plan, after))}
        assert kinds <= {"float32", "int32", "uint8"}
        metrics = jax.eval_shape(rule.metrics, after, plan)
        assert {value.dtype.name for value in metrics.values()} <= {"float32", "int32"}


def test_strict_promotion(variant):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        name, settings = VARIANTS[variant]
        rule = controllers.make(name, num_prompts=N, prompts_per_step=P, mean_rollouts=MEAN, **dict(settings))
        state = rule.init(jax.random.key(0))
        plan, _ = jax.eval_shape(rule.plan, state, _ids(0), jax.random.key(0))
        zeros = jnp.zeros(P, jnp.int32)
        outcome = controllers.Outcome(zeros, zeros + 4, zeros, jnp.zeros(P), jnp.zeros(P))
        after = jax.eval_shape(rule.update, state, plan, outcome)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        jax.eval_shape(rule.metrics, state, plan)


# What sets the rules apart -------------------------------------------------------------------------------------


def test_uniform_is_uniform_and_still_classifies():
    plan, _ = _case("uniform").plan(_trained("uniform"), _ids(4), jax.random.key(0))
    assert (np.asarray(plan.rollouts) == MEAN).all() and (np.asarray(plan.weights) == 1.0).all()
    assert len(set(np.asarray(plan.bins).tolist())) > 1


def test_permuted_budgets_keep_the_histogram_and_lose_the_information():
    state, ids = _trained("permuted_budgets"), _ids(4)
    steep = jnp.where(jnp.arange(6)[:, None] == 5, 0.25, 0.01) / jnp.arange(2.0, 13.0)[None, :]
    rollout = state.rollout._replace(scores=steep, visits=jnp.ones(6, jnp.int32))
    state, shuffled = state._replace(rollout=rollout), {}
    for seed in range(4):
        plan, _ = _case("permuted_budgets").plan(state, ids, jax.random.key(seed))
        honest, _ = _case("rollout_gdro").plan(state, ids, jax.random.key(seed))
        assert sorted(plan.rollouts.tolist()) == sorted(honest.rollouts.tolist())
        assert len(set(honest.rollouts.tolist())) > 1
        shuffled[seed] = plan.rollouts.tolist()
    assert len({tuple(counts) for counts in shuffled.values()}) > 1


def test_random_weights_are_prompt_gdros_weights_of_other_bins():
    state, ids, moved = _trained("random_weights"), _ids(4), set()
    for seed in range(6):
        plan, _ = _case("random_weights").plan(state, ids, jax.random.key(seed))
        assert float(np.mean(plan.weights)) == pytest.approx(1.0, rel=1e-5)
        bins, weights = np.asarray(plan.bins), np.asarray(plan.weights, np.float64)
        honest = np.asarray(_case("prompt_gdro").plan(state, ids, jax.random.key(seed))[0].weights, np.float64)
        table = {b: weights[bins == b][0] for b in set(bins.tolist())}
        true = {b: honest[bins == b][0] for b in table}
        assert all((weights[bins == b] == table[b]).all() for b in table)
        scale = sum(table.values()) / sum(true.values())  # the batch mean is 1 in both; the same weights up to a factor
        np.testing.assert_allclose(sorted(table.values()), np.array(sorted(true.values())) * scale, rtol=1e-4)
        moved.add(tuple(np.argsort([table[b] for b in sorted(table)]).tolist()))
    assert len(moved) > 1


def test_weights_of_the_current_batch_come_after_the_update():
    case, state = _case("current_batch"), _trained("current_batch")
    plan, _ = case.plan(state, _ids(4), jax.random.key(0))
    after = case.update(state, plan, _outcome(plan, 4))
    cfg = controllers.prompt_gdro.Config(num_bins=6, weights="published")
    wanted = controllers.prompt_gdro.weights(cfg, after.prompt, plan.bins)
    np.testing.assert_allclose(case.rule.reweigh(after, plan), wanted, rtol=1e-5)
    assert (np.asarray(wanted) != np.asarray(plan.weights)).any()
    usual = _case("prompt_gdro")
    plan, _ = usual.plan(_trained("prompt_gdro"), _ids(4), jax.random.key(0))
    later = usual.update(_trained("prompt_gdro"), plan, _outcome(plan, 4))
    np.testing.assert_array_equal(usual.rule.reweigh(later, plan), plan.weights)


def test_random_weights_of_the_current_batch_keep_the_plans_shuffle():
    rule = controllers.make(
        "random_weights", num_prompts=N, prompts_per_step=P, mean_rollouts=MEAN, use_current_batch=True
    )
    state, ids = _trained("random_weights"), _ids(4)
    plan, _ = rule.plan(state, ids, jax.random.key(1))
    np.testing.assert_allclose(rule.reweigh(state, plan), plan.weights, rtol=1e-5)
    after = rule.update(state, plan, _outcome(plan, 4))
    lent = after.prompt._replace(scores=after.prompt.scores[plan.lender], visits=after.prompt.visits[plan.lender])
    wanted = controllers.prompt_gdro.weights(controllers.prompt_gdro.Config(num_bins=6), lent, plan.bins)
    np.testing.assert_allclose(rule.reweigh(after, plan), wanted, rtol=1e-5)
    assert (np.asarray(wanted) != np.asarray(plan.weights)).any()
    assert sorted(plan.lender.tolist()) == list(range(6)) and plan.lender.tolist() != list(range(6))


def test_signals_are_what_their_names_say():
    """Two prompts, 1 of 4 and 4 of 4 right; bins by the prior: one bin, so its score is the mean of the signals.

    Posteriors Beta(1.5, 3.5) and Beta(4.5, 0.5): 1 - pass@2 is b (b+1) / ((a+b) (a+b+1)), 15.75/30 and 0.75/30.
    """
    wanted = {"error": (0.75 + 0.0) / 2, "pass_error": (15.75 + 0.75) / 60, "surrogate": (0.3 - 0.1) / 2}
    for signal, mean in wanted.items():
        rule = controllers.make(
            "prompt_gdro", num_prompts=2, prompts_per_step=2, mean_rollouts=4, k=2, signal=signal, ema=1.0
        )
        plan, state = rule.plan(rule.init(jax.random.key(0)), np.arange(2), jax.random.key(0))
        c, n = np.array([1, 4]), np.array([4, 4])
        state = rule.update(state, plan, controllers.Outcome(c, n, 0 * n, np.array([0.3, -0.1]), np.zeros(2)))
        assert float(state.prompt.scores[plan.bins[0]]) == pytest.approx(mean, rel=1e-5)


def test_pass_error_does_not_fall_because_a_bin_got_more_rollouts():
    """Success rate 1/6, k = 8: over all outcomes of n rollouts the signal's mean is the same for every n.

    (1 - c/n)^8 would fall from 0.70 at n = 2 to 0.37 at n = 8.
    """
    rule = controllers.make(
        "prompt_gdro", num_prompts=9, prompts_per_step=9, mean_rollouts=4, signal="pass_error", ema=1.0, k=8
    )
    seen, step = {}, jax.jit(rule.update)
    plan, start = jax.jit(rule.plan)(rule.init(jax.random.key(0)), np.arange(9), jax.random.key(0))
    for n in (2, 4, 7, 8):
        likely = np.array([math.comb(n, c) * 5.0 ** (n - c) / 6.0**n for c in range(n + 1)])
        scores = []
        for c in range(n + 1):
            count = np.full(9, n, np.int32)
            state = step(start, plan, controllers.Outcome(np.full(9, c), count, 0 * count, np.zeros(9), np.zeros(9)))
            scores.append(float(state.prompt.scores[plan.bins[0]]))
        seen[n] = float(likely @ np.array(scores))
    assert max(seen.values()) - min(seen.values()) < 0.03, seen
    assert seen[2] == pytest.approx(0.34702, rel=1e-3)  # by Beta(1/2 + c, 1/2 + 2 - c)


def test_one_rollout_is_no_trap():
    """min_rollouts = 1 and variances NaN below two rollouts: bins taken to one rollout come back.

    For 6 steps nothing varies but bin 1, then every prompt is right half of the time.
    """
    rule = controllers.make(
        "rollout_gdro",
        num_prompts=8,
        prompts_per_step=8,
        mean_rollouts=4,
        min_rollouts=1,
        edges=(0.5,),
        statistic="any",
        hysteresis=0.0,
        window=4,
    )
    state = rule.init(jax.random.key(0))
    bins = jnp.array([0, 0, 0, 0, 1, 1, 1, 1], jnp.int32)
    state = state._replace(difficulty=state.difficulty._replace(visits=state.difficulty.visits + 1, bin=bins))
    rollout = state.rollout._replace(
        variances=jnp.array([0.0, 0.25]), variance_visits=jnp.ones(2, jnp.int32), visits=jnp.ones(2, jnp.int32),
        scores=jnp.array([0.0, 0.25])[:, None] / jnp.arange(1.0, 13.0),
    )  # fmt: skip
    start = state._replace(rollout=rollout)
    plan, _ = jax.jit(rule.plan)(start, np.arange(8), jax.random.key(0))
    counts = np.asarray(plan.rollouts)
    assert (counts[:4] == 1).all() and (counts[4:] == 7).all()
    c = np.where(counts == 1, np.arange(8) % 2, counts // 2)
    rate = c / counts
    variance = np.where(counts > 1, rate * (1 - rate) * counts / np.maximum(counts - 1, 1), np.nan)
    state = jax.jit(rule.update)(
        start, plan, controllers.Outcome(c, counts, 0 * c, np.zeros(8, np.float32), variance.astype(np.float32))
    )
    got = float(state.rollout.variances[0])  # Beta(1.5, 0.5) and Beta(0.5, 1.5): E[p (1-p)] = 0.75 / (2 * 3)
    assert got == pytest.approx(0.4 * 0.125, rel=1e-4)
    assert got > 0.0


def test_joint_gives_more_to_bins_the_adversary_favours():
    """Same variances, same shares: the bin with the larger error has the larger q, and gets more rollouts."""
    rule = controllers.make(
        "joint",
        num_prompts=N,
        prompts_per_step=P,
        mean_rollouts=MEAN,
        edges=(0.5,),
        prompt_step_size=4.0,
        statistic="any",
        hysteresis=0.0,
        window=1,
    )
    state, ids = rule.init(jax.random.key(0)), np.arange(P)
    step_plan, step_update = jax.jit(rule.plan), jax.jit(rule.update)
    hard = np.arange(P) < P // 2
    for step in range(3):
        plan, state = step_plan(state, ids, jax.random.key(step))
        c = np.where(hard, 0, 4)
        state = step_update(
            state, plan, controllers.Outcome(c, np.full(P, 4), 0 * c, np.zeros(P), np.full(P, 0.2, np.float32))
        )
    plan, _ = step_plan(state, ids, jax.random.key(9))
    counts = np.asarray(plan.rollouts)
    assert counts[hard].min() > counts[~hard].max()
    assert np.asarray(plan.weights)[hard].min() > np.asarray(plan.weights)[~hard].max()
