"""Group advantages, row weights and prompt surrogates against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_jax.losses import grpo

ROOT2 = np.sqrt(2.0)


def test_eq3_uneven_groups_interleaved():
    # Prompt 0: [1, 0, 0, 1]: mean 1/2, std 1/2. Prompt 1: [1, 0, 0]: mean 1/3, std sqrt(2)/3.
    rewards = jnp.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    index = jnp.array([0, 1, 0, 1, 0, 1, 0])
    got = grpo.group_advantages(rewards, index, 2, eps=0.0)
    np.testing.assert_allclose(got, [1, ROOT2, -1, -1 / ROOT2, -1, -1 / ROOT2, 1], rtol=1e-6)
    assert got.dtype == jnp.float32


def test_eps_is_added_to_the_deviation():
    got = grpo.group_advantages([1.0, 0.0], [0, 0], 1, eps=0.5)  # +-0.5 / (0.5 + 0.5)
    np.testing.assert_allclose(got, [0.5, -0.5], rtol=1e-6)


def test_scale_none_is_dr_grpo():  # arXiv 2503.20783: no division by the deviation
    got = grpo.group_advantages([1.0, 0.0, 0.0], [0, 0, 0], 1, scale="none")
    np.testing.assert_allclose(got, [2 / 3, -1 / 3, -1 / 3], rtol=1e-6)


def test_leave_one_out_is_rloo():  # arXiv 2402.14740: the baseline is the mean of the other rollouts
    got = grpo.group_advantages([1.0, 0.0, 0.0, 0.7], [0, 0, 0, 1], 2, scale="none", baseline="leave_one_out")
    np.testing.assert_allclose(got, [1.0, -0.5, -0.5, 0.0], rtol=1e-6)


def test_clip():
    # One 1 among 37 zeros: (1 - 1/37) / (6/37) = 6.
    rewards = jnp.zeros(37).at[5].set(1.0)
    index = jnp.zeros(37, int)
    np.testing.assert_allclose(grpo.group_advantages(rewards, index, 1, eps=0.0)[5], 6.0, rtol=1e-5)
    assert grpo.group_advantages(rewards, index, 1, clip=5.0).max() == 5.0


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_give_exactly_zero(jit, scale, baseline):
    sizes = list(range(1, 17))  # 0.1 summed n times and divided by n is not 0.1 in float32 for some n
    index = np.repeat(np.arange(len(sizes)), sizes)
    rewards = np.float32([0.1, -0.3, 1e4 + 0.1, 1 / 3])[index % 4]

    def run(r):
        return grpo.group_advantages(r, index, len(sizes), eps=0.0, scale=scale, baseline=baseline)

    got = (jax.jit(run) if jit else run)(rewards)
    assert np.array_equal(np.asarray(got), np.zeros(len(index)))


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30])
def test_unscorable_and_padding_rows_do_not_exist(junk):
    index = np.array([0, 0, 0, 1, 1, 7, -1])
    valid = np.array([1, 0, 1, 0, 0, 1, 1], bool)
    rewards = np.array([1.0, junk, 0.0, junk, junk, junk, junk], np.float32)
    np.testing.assert_allclose(
        grpo.group_advantages(rewards, index, 2, eps=0.0, valid=valid), [1, 0, -1, 0, 0, 0, 0], atol=0
    )
    stats = grpo.group_stats(rewards, index, 2, valid)
    assert stats.num_rollouts.tolist() == [2, 0]
    np.testing.assert_allclose(stats.mean, [0.5, np.nan])
    np.testing.assert_allclose(stats.variance, [0.25, 0.0])
    np.testing.assert_allclose(stats.unbiased_variance, [0.5, np.nan])
    assert stats.all_equal.tolist() == [False, False]
    np.testing.assert_allclose(grpo.row_weights(index, 2, valid=valid), [0.5, 0, 0.5, 0, 0, 0, 0])
    np.testing.assert_allclose(grpo.prompt_surrogate(rewards, index, 2, valid), [0.5, np.nan])


def test_a_nan_reward_that_counts_is_seen():
    got = grpo.group_advantages([1.0, np.nan, 1.0, 0.0], [0, 0, 1, 1], 2)
    assert np.isnan(got[:2]).all() and np.isfinite(got[2:]).all()


def test_group_stats():
    stats = grpo.group_stats([1.0, 0.0, 0.0, 1.0, 0.1, 0.1], [0, 0, 0, 0, 1, 1], 3)
    np.testing.assert_allclose(stats.mean, [0.5, 0.1, np.nan], rtol=1e-6)
    np.testing.assert_allclose(stats.unbiased_variance, [1 / 3, 0.0, np.nan], rtol=1e-6)
    assert stats.all_equal.tolist() == [False, True, False]


def test_row_weights():
    index = jnp.array([0, 1, 1, 1, 0, 2])  # n = 2, 3, 1; P = 3, R = 6
    prompt = grpo.row_weights(index, 3)
    np.testing.assert_allclose(prompt, [1 / 6, 1 / 9, 1 / 9, 1 / 9, 1 / 6, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(grpo.row_weights(index, 3, weighting="rollout"), np.full(6, 1 / 6), rtol=1e-6)
    # A part of the step with the whole step's counts weighs as it does in the whole.
    np.testing.assert_allclose(grpo.row_weights(index[:2], 3, counts=[2, 3, 1]), prompt[:2])
    np.testing.assert_allclose(grpo.row_weights(index[:2], 3, [2, 3, 1], "rollout"), [1 / 6, 1 / 6], rtol=1e-6)


def test_prompt_surrogate_is_eq7_and_zero_on_policy():
    np.testing.assert_allclose(grpo.prompt_surrogate([1.0, 2.0, 6.0], [0, 0, 1], 2), [1.5, 6.0])
    # Exactly on-policy the ratio is 1 and advantages sum to 0 within a prompt, whatever its difficulty.
    index, rewards = jnp.array([0, 0, 0, 1, 1]), jnp.array([1.0, 0.0, 0.0, 1.0, 0.0])
    logp = -jnp.ones((5, 3))
    advantages = grpo.group_advantages(rewards, index, 2)
    per_row = grpo.policy_loss(logp, logp, advantages, jnp.ones((5, 3), bool)).per_row
    np.testing.assert_allclose(grpo.prompt_surrogate(per_row, index, 2), [0.0, 0.0], atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.1, 1.0])), min_size=8, max_size=8), st.randoms())
def test_permuting_rows_permutes_advantages_and_groups_sum_to_zero(rows, random):
    index, rewards = np.array([r[0] for r in rows]), np.float32([r[1] for r in rows])
    order = list(range(8))
    random.shuffle(order)
    got = np.asarray(grpo.group_advantages(rewards, index, 4))
    np.testing.assert_allclose(grpo.group_advantages(rewards[order], index[order], 4), got[order], atol=1e-5)
    np.testing.assert_allclose(np.bincount(index, got, 4), 0.0, atol=1e-5)
    np.testing.assert_allclose(grpo.row_weights(index, 4).sum(), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": "mad"}, "scale='mad'"),
        ({"baseline": "loo"}, "baseline='loo'"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"eps": np.nan}, "eps=nan"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"clip": np.nan}, "clip=nan"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        grpo.group_advantages([1.0], [0], 1, **options)
    with pytest.raises(ValueError, match="weighting='rows'"):
        grpo.row_weights([0], 1, weighting="rows")
