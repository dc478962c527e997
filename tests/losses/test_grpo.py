"""Every variant of the surrogate against numbers worked out by hand, its gradients, its masks and its sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_jax.losses import grpo, reduction

LN2 = np.log(2.0)
ONES = jnp.ones((2, 2), bool)
RATIOS = jnp.array([[1.5, 0.5], [1.5, 0.5]])
SIGNS = jnp.array([1.0, -1.0])
ZERO = jnp.zeros((2, 2))


def loss_at(ratios, advantages, mask=ONES, **options):
    return grpo.policy_loss(jnp.log(ratios), jnp.zeros_like(ratios), advantages, mask, **options)


def grad_at(ratios, advantages, mask=ONES, **options):
    def loss(logp):
        return grpo.policy_loss(logp, jnp.zeros_like(logp), advantages, mask, **options).loss

    return jax.grad(loss)(jnp.log(ratios))


def test_clip_higher():  # Eq. 5 with the two bounds of DAPO, arXiv 2503.14476: [0.8, 1.28]
    out = loss_at(RATIOS, SIGNS)
    # A = 1: min(1.5, 1.28) = 1.28 and 0.5. A = -1: min(-1.5, -1.28) = -1.5 and min(-0.5, -0.8) = -0.8.
    np.testing.assert_allclose(out.per_row, [-(1.28 + 0.5) / 2, (1.5 + 0.8) / 2], rtol=1e-6)
    np.testing.assert_allclose(out.loss, 0.13, rtol=1e-5)
    expected = {
        "ratio": 1.0, "clip_fraction": 0.5, "clip_high_fraction": 0.25, "clip_low_fraction": 0.25,
        "dual_clip_fraction": 0.0, "response_length": 2.0,
        "approx_kl": (1.0 - np.log(1.5) - np.log(0.5) - 1.0) / 2,  # mean of r - 1 - log r
    }  # fmt: skip
    assert out.metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(out.metrics[name], value, rtol=1e-5, err_msg=name)
    # Clipped tokens have no gradient; others -ratio * A / (L R).
    np.testing.assert_allclose(grad_at(RATIOS, SIGNS), [[0, -0.125], [0.375, 0]], rtol=1e-6)


def test_on_policy_gradient_is_reinforce():
    advantages = jnp.array([0.7, -1.3])
    np.testing.assert_allclose(grad_at(jnp.ones((2, 2)), advantages), -advantages[:, None] / 4 * jnp.ones((2, 2)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Row 0 has one token (loss -0.5), row 1 two (losses 1.5 and 0.8).
        ({"aggregate": "sequence"}, (-0.5 + 2.3 / 2) / 2),  # Eq. 5
        ({"aggregate": "token"}, (-0.5 + 2.3) / 3),  # DAPO, arXiv 2503.14476: one mean over all tokens
        ({"aggregate": "constant"}, (-0.5 + 2.3) / 2 / 2),  # Dr. GRPO, arXiv 2503.20783: T = 2 for every row
        ({"aggregate": "constant", "constant": 4.0}, (-0.5 + 2.3) / 4 / 2),
        ({"aggregate": "sequence", "row_weights": jnp.array([0.75, 0.25])}, 0.75 * -0.5 + 0.25 * 1.15),
        ({"aggregate": "token", "row_weights": jnp.array([0.75, 0.25])}, (0.75 * -0.5 + 0.25 * 2.3) / (0.75 + 0.5)),
        ({"aggregate": "constant", "row_weights": jnp.array([0.75, 0.25])}, (0.75 * -0.5 + 0.25 * 2.3) / 2),
    ],
)
def test_aggregation(options, expected):
    mask = jnp.array([[False, True], [True, True]])
    out = loss_at(RATIOS, SIGNS, mask, **options)
    np.testing.assert_allclose(out.loss, expected, rtol=1e-5)
    weights = options.get("row_weights", jnp.full(2, 0.5))
    np.testing.assert_allclose(out.loss, (weights * out.per_row).sum(), rtol=1e-6)
    np.testing.assert_allclose(out.metrics["response_length"], 1.5)


def test_dual_clip():  # arXiv 1912.09729, Eq. 5 there: max(min(rA, clip(r)A), cA) for A < 0
    ratios = jnp.array([[5.0, 2.0], [5.0, 2.0]])
    out = loss_at(ratios, SIGNS, dual_clip=3.0)
    np.testing.assert_allclose(out.per_row, [-1.28, (3.0 + 2.0) / 2], rtol=1e-6)
    np.testing.assert_allclose(out.metrics["dual_clip_fraction"], 0.25)
    np.testing.assert_allclose(out.metrics["clip_fraction"], 0.75)
    np.testing.assert_allclose(grad_at(ratios, SIGNS, dual_clip=3.0), [[0, 0], [0, 0.5]], atol=1e-6)
    np.testing.assert_allclose(loss_at(ratios, SIGNS).per_row[1], 3.5, rtol=1e-6)  # off by default


def test_sequence_ratio():  # GSPO, arXiv 2507.18071: s = (prod of token ratios) ^ (1/L)
    ratios = jnp.array([[4.0, 1.0], [4.0, 1.0]])  # s = 2
    out = loss_at(ratios, SIGNS, ratio_level="sequence")
    np.testing.assert_allclose(out.per_row, [-1.28, 2.0], rtol=1e-6)
    np.testing.assert_allclose(out.metrics["ratio"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(out.metrics["approx_kl"], (4 - 1 - np.log(4.0)) / 2, rtol=1e-6)  # still of tokens
    # d s / d log-prob = s / L, and R = 2.
    got = grad_at(ratios, SIGNS, ratio_level="sequence")
    np.testing.assert_allclose(got, [[0, 0], [0.5, 0.5]], rtol=1e-6)
    one = loss_at(ratios, SIGNS, jnp.array([[True, False], [True, False]]), ratio_level="sequence")
    np.testing.assert_allclose(one.per_row[1], 4.0, rtol=1e-6)  # a masked token is not in the mean


# Schulman's note, with d = ref - logprob = ln 2: value, and derivative with respect to logprob.
@pytest.mark.parametrize(
    ("estimator", "value", "slope"), [("k1", -LN2, 1.0), ("k2", LN2**2 / 2, -LN2), ("k3", 2 - 1 - LN2, -1.0)]
)
def test_kl_estimators(estimator, value, slope):
    def run(logp):
        return grpo.policy_loss(
            logp, ZERO, jnp.zeros(2), ONES, ref_logprobs=ZERO + LN2, kl_coef=0.25, kl_estimator=estimator
        )

    out = run(ZERO)
    np.testing.assert_allclose(out.metrics["kl"], value, rtol=1e-6)
    np.testing.assert_allclose(out.loss, 0.25 * value, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: run(x).loss)(ZERO), np.full((2, 2), 0.25 * slope / 4), rtol=1e-6)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    p, q = jnp.array([0.7, 0.2, 0.1]), jnp.array([0.1, 0.1, 0.8])
    kl = float((p * jnp.log(p / q)).sum())
    means = {k: float((p * grpo.kl_estimate(jnp.log(p), jnp.log(q), k)).sum()) for k in grpo.KL_ESTIMATORS}
    np.testing.assert_allclose([means["k1"], means["k3"]], kl, rtol=1e-5)
    assert abs(means["k2"] - kl) > 0.1


def test_kl_is_measured_without_coefficient_and_absent_without_reference():
    out = loss_at(RATIOS, SIGNS, ref_logprobs=jnp.log(RATIOS) + LN2)
    np.testing.assert_allclose(out.metrics["kl"], 1 - LN2, rtol=1e-5)
    np.testing.assert_allclose(out.loss, 0.13, rtol=1e-5)
    assert "kl" not in loss_at(RATIOS, SIGNS).metrics


def test_gradient_flows_through_logprobs_alone():
    def loss(logp, old, adv, ref, weights):
        return grpo.policy_loss(logp, old, adv, ONES, ref, weights, kl_coef=0.1).loss

    zero = jax.grad(loss, (1, 2, 3, 4))(jnp.log(RATIOS), ZERO, SIGNS, ZERO, jnp.full(2, 0.5))
    assert all(not np.any(g) for g in zero)


@pytest.mark.parametrize(
    ("aggregate", "ratio_level", "estimator"),
    [("sequence", "token", "k3"), ("token", "sequence", "k1"), ("constant", "token", "k2"), ("token", "token", "k3")],
)
def test_gradient_matches_finite_differences(aggregate, ratio_level, estimator):
    keys = jax.random.split(jax.random.key(1), 4)
    logp = -1 + 0.05 * jax.random.normal(keys[0], (3, 4))  # ratios within the clip range: no kinks near
    ref = -1 + 0.3 * jax.random.normal(keys[1], (3, 4))
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    weights = jnp.array([0.2, 0.3, 0.5])

    @jax.jit
    def loss(x):
        return grpo.policy_loss(
            x, jnp.full((3, 4), -1.0), jnp.array([1.0, -2.0, 0.5]), mask, ref, weights,
            kl_coef=0.5, kl_estimator=estimator, aggregate=aggregate, ratio_level=ratio_level,
        ).loss  # fmt: skip

    direction = jax.random.normal(keys[2], (3, 4))
    step = 2e-2
    numeric = (loss(logp + step * direction) - loss(logp - step * direction)) / (2 * step)
    np.testing.assert_allclose((jax.grad(loss)(logp) * direction).sum(), numeric, rtol=5e-3, atol=1e-4)


JUNK = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1e30, -1e30])
OPTIONS = st.fixed_dictionaries(
    {
        "aggregate": st.sampled_from(grpo.AGGREGATES),
        "ratio_level": st.sampled_from(grpo.RATIO_LEVELS),
        "kl_estimator": st.sampled_from(grpo.KL_ESTIMATORS),
        "dual_clip": st.sampled_from([None, 3.0]),
    }
)


@settings(max_examples=30, deadline=None)
@given(
    junk=st.lists(JUNK, min_size=5, max_size=5),
    mask=st.lists(st.booleans(), min_size=12, max_size=12),
    out_row=st.sampled_from([None, 0, 1, 2]),
    options=OPTIONS,
)
def test_masked_values_and_zero_weight_rows_never_matter(junk, mask, out_row, options):
    mask = np.array(mask).reshape(3, 4)
    weights = np.full(3, 1 / 3, np.float32)
    if out_row is not None:
        weights[out_row] = 0.0
    active = mask & (weights != 0)[:, None]
    rng = np.random.default_rng(0)
    clean = [rng.normal(-1, 0.3, (3, 4)).astype(np.float32) for _ in range(4)]
    advantages = np.array([1.0, -1.0, 0.5], np.float32)

    def run(arrays, adv):
        def loss(logp):
            out = grpo.policy_loss(
                logp, arrays[1], adv, mask, arrays[2], weights, kl_coef=0.1, token_metrics={"e": arrays[3]}, **options
            )
            return out.loss, out

        return jax.value_and_grad(loss, has_aux=True)(jnp.asarray(arrays[0]))

    (_, want), want_grad = run(clean, advantages)
    dirty = [np.where(active, a, np.float32(j)) for a, j in zip(clean, junk, strict=False)]
    (_, got), got_grad = run(dirty, np.where(active.any(-1), advantages, np.float32(junk[4])))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.all(np.isfinite(a)) and np.array_equal(a, b)
    assert np.array_equal(got_grad, want_grad)
    assert not np.any(np.asarray(got_grad)[~active])


def test_huge_ratios_stay_finite():
    logp, old = jnp.array([[0.0, 0.0]]), jnp.array([[-1e4, -300.0]])

    def loss(x):
        return grpo.policy_loss(x, old, jnp.array([-1.0]), jnp.ones((1, 2), bool), old + 2e4, kl_coef=0.1).loss

    value, grad = jax.value_and_grad(loss)(logp)
    assert np.isfinite(value) and np.array_equal(grad, np.zeros((1, 2)))
    np.testing.assert_allclose(value, np.exp(20) + 0.1 * (np.expm1(20) - 20), rtol=1e-5)


def test_empty_response_and_empty_step():
    mask = jnp.array([[False, False], [True, True]])
    for aggregate in grpo.AGGREGATES:
        assert loss_at(RATIOS, SIGNS, mask, aggregate=aggregate).per_row[0] == 0
        empty = loss_at(RATIOS, SIGNS, jnp.zeros((2, 2), bool), aggregate=aggregate)
        assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(empty))


def random_batch(rows=10, tokens=6, seed=0):
    rng = np.random.default_rng(seed)
    index = np.sort(rng.integers(0, 4, rows))
    return {
        "logprobs": jnp.float32(rng.normal(-1, 0.4, (rows, tokens))),
        "old": jnp.float32(rng.normal(-1, 0.4, (rows, tokens))),
        "ref": jnp.float32(rng.normal(-1, 0.4, (rows, tokens))),
        "advantages": jnp.float32(rng.normal(0, 1, rows)),
        "mask": jnp.asarray(np.arange(tokens) < rng.integers(0, tokens + 1, (rows, 1))),
        "row_weights": grpo.row_weights(index, 4),
    }


def scaled_sums(aggregate):
    def sums(params, b, _):
        logp = b["logprobs"] * params["a"] + params["b"]
        return grpo.loss_sums(
            logp, b["old"], b["advantages"], b["mask"], b["ref"], b["row_weights"], kl_coef=0.1, aggregate=aggregate
        )

    return sums


@pytest.mark.parametrize("aggregate", grpo.AGGREGATES)
@pytest.mark.parametrize("parts", [3, 16])
def test_microbatches_give_the_same_number(aggregate, parts):
    batch, params = random_batch(), {"a": jnp.float32(1.1), "b": jnp.float32(0.2)}
    fn = scaled_sums(aggregate)
    run = jax.jit(reduction.loss_and_grad, static_argnums=(0, 4))
    want, want_grad = run(fn, params, batch, None, 1)
    got, got_grad = run(fn, params, batch, None, parts)
    assert got.per_row.shape == want.per_row.shape
    for a, b in zip(jax.tree.leaves((got, got_grad)), jax.tree.leaves((want, want_grad)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("aggregate", grpo.AGGREGATES)
def test_parts_add_up_when_the_denominator_is_given(aggregate):
    b = random_batch()
    names = ("logprobs", "old", "advantages", "mask", "ref", "row_weights")
    whole = grpo.policy_loss(*(b[n] for n in names), kl_coef=0.1, aggregate=aggregate)
    total = (b["row_weights"] * b["mask"].sum(-1)).sum()
    parts = [
        grpo.policy_loss(*(b[n][s] for n in names), kl_coef=0.1, aggregate=aggregate, denominator=total)
        for s in (slice(0, 3), slice(3, 10))
    ]
    np.testing.assert_allclose(sum(p.loss for p in parts), whole.loss, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([p.per_row for p in parts]), whole.per_row, rtol=1e-5)


def test_token_metrics_are_token_means():
    mask = jnp.array([[True, False], [True, True]])
    out = loss_at(RATIOS, SIGNS, mask, token_metrics={"entropy": jnp.array([[1.0, 9.0], [2.0, 6.0]])})
    np.testing.assert_allclose(out.metrics["entropy"], 3.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kl_estimator": "k4"}, "kl_estimator='k4'"),
        ({"aggregate": "mean"}, "aggregate='mean'"),
        ({"ratio_level": "row"}, "ratio_level='row'"),
        ({"clip_low": 1.5}, "clip_low=1.5"),
        ({"clip_high": -0.1}, "clip_high=-0.1"),
        ({"kl_coef": float("nan")}, "kl_coef=nan"),
        ({"kl_coef": 0.1}, "needs ref_logprobs"),
        ({"dual_clip": 1.0}, "dual_clip=1.0"),
        ({"constant": 4.0}, "constant=4.0"),
        ({"row_weights": jnp.ones(3)}, "row_weights must have shape"),
        ({"ref_logprobs": jnp.ones((1, 2))}, "ref_logprobs must have shape"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        loss_at(RATIOS, SIGNS, **options)
