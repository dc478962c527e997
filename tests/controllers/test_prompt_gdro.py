"""Eqs. 12 to 16 by hand, weight forms, bins without a signal, and extremes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdro_jax.controllers import prompt_gdro

PLAIN = {"ema": 0.5, "step_size": 2.0, "exploration": 0.1, "ema_debias": False}


def test_two_steps_by_hand():
    """Bin means 1, 0.5 then 0 and nothing: S = (0.5, 0.25, 0) then (0.25, 0.25, 0)."""
    cfg = prompt_gdro.Config(3, **PLAIN)
    state = prompt_gdro.update(cfg, prompt_gdro.init(cfg), [0, 0, 1, 1], [1.0, 1.0, 0.2, 0.8])
    np.testing.assert_allclose(state.scores, [0.5, 0.25, 0.0], rtol=1e-6)
    omega = np.exp([1.0, 0.5, 0.0])
    np.testing.assert_allclose(prompt_gdro.distribution(cfg, state), 0.9 * omega / omega.sum() + 0.1 / 3, rtol=1e-6)
    state = prompt_gdro.update(cfg, state, [0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(state.scores, [0.25, 0.25, 0.0], rtol=1e-6)
    assert state.visits.tolist() == [2, 1, 0]
    assert int(state.step) == 2


def test_weight_forms_by_hand():
    """Scores (1, 0, -1), eta 2, batch of bins 0, 0, 1: omega = (e^2, 1, e^-2); bin 2 is not in the batch."""
    state = prompt_gdro.init(prompt_gdro.Config(3))._replace(scores=jnp.array([1.0, 0.0, -1.0]))
    bins, e2 = [0, 0, 1], math.e**2

    def weights(form, **more):
        return np.asarray(prompt_gdro.weights(prompt_gdro.Config(3, weights=form, **PLAIN, **more), state, bins))

    np.testing.assert_allclose(weights("published"), [e2, e2, 1.0], rtol=1e-6)
    np.testing.assert_allclose(weights("published", weight_cap=3.0), [3.0, 3.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(weights("published", score_clip=0.5), [math.e, math.e, 1.0], rtol=1e-6)
    q = 0.9 * np.array([e2, 1.0]) / (e2 + 1.0) + 0.05
    np.testing.assert_allclose(weights("released"), q[[0, 0, 1]], rtol=1e-6)
    np.testing.assert_allclose(weights("released", weight_cap=0.5), [0.5, 0.5, q[1]], rtol=1e-6)
    mean = (2 * e2 + 1.0) / 3
    np.testing.assert_allclose(weights("batch_mean_one"), np.array([e2, e2, 1.0]) / mean, rtol=1e-6)
    np.testing.assert_allclose(weights("batch_mean_one", weight_cap=3.0), np.array([3, 3, 1]) * 3 / 7, rtol=1e-6)


def test_share_correction_by_hand():
    """Shares 3/4, 1/4 and a floor of 0.5: mean losses 0.6, 0.6 become 0.8, 1.2."""
    cfg = prompt_gdro.Config(2, ema=1.0, divide_by_share=True, share_floor=0.5)
    state = prompt_gdro.update(cfg, prompt_gdro.init(cfg), [0, 0, 0, 1], [0.6] * 4)
    np.testing.assert_allclose(state.scores, [0.8, 1.2], rtol=1e-6)


def test_debias_makes_early_scores_plain_means():
    cfg = prompt_gdro.Config(2, ema=0.12)
    state = prompt_gdro.init(cfg)
    for _ in range(3):
        state = prompt_gdro.update(cfg, state, [0, 0], [0.7, 0.5])
    np.testing.assert_allclose(state.scores[0], 0.6 * (1 - 0.88**3), rtol=1e-5)
    np.testing.assert_allclose(prompt_gdro.debiased_scores(cfg, state), [0.6, 0.6], rtol=1e-5)


def test_a_bin_never_visited_takes_the_others_mean():
    """Bins 0 and 2 at 0.9 and 0.3 give bin 1 the score 0.6; without `ema_debias` it keeps 0; 0 before any visit."""
    cfg = prompt_gdro.Config(3, ema=0.5)
    start = prompt_gdro.init(cfg)
    assert prompt_gdro.debiased_scores(cfg, start).tolist() == [0.0, 0.0, 0.0]
    state = prompt_gdro.update(cfg, start, [0, 2], [0.9, 0.3])
    np.testing.assert_allclose(prompt_gdro.debiased_scores(cfg, state), [0.9, 0.6, 0.3], rtol=1e-5)
    first, second, third = np.asarray(prompt_gdro.weights(cfg, state, [0, 1, 2]))
    assert first > second > third
    published = prompt_gdro.Config(3, ema=0.5, ema_debias=False)
    np.testing.assert_allclose(prompt_gdro.debiased_scores(published, state), [0.45, 0.0, 0.15], rtol=1e-5)


def test_non_finite_signals_are_left_out():
    cfg = prompt_gdro.Config(3, ema=1.0)
    state = prompt_gdro.update(cfg, prompt_gdro.init(cfg), [0, 0, 1, 2], [0.4, np.nan, np.inf, -np.inf])
    np.testing.assert_allclose(state.scores, [0.4, 0.0, 0.0], rtol=1e-6)
    assert state.visits.tolist() == [1, 0, 0]
    same = prompt_gdro.update(cfg, state, [0, 1], [np.nan, np.inf])
    jax.tree.map(np.testing.assert_array_equal, state, same)


@pytest.mark.parametrize("scale", [1e4, 3e38, -3e38])
@pytest.mark.parametrize("form", ["published", "released", "batch_mean_one"])
def test_nothing_overflows(scale, form):
    for cap in (None, 15.0, math.inf):
        cfg = prompt_gdro.Config(3, score_clip=math.inf, weights=form, weight_cap=cap, exploration=0.0, step_size=50.0)
        state = prompt_gdro.init(cfg)._replace(scores=jnp.array([1.0, 0.3, -1.0]) * scale, visits=jnp.array([1, 1, 1]))
        assert np.isfinite(prompt_gdro.distribution(cfg, state)).all()
        assert float(prompt_gdro.distribution(cfg, state).sum()) == pytest.approx(1.0, rel=1e-5)
        for bins in ([0, 1, 2], [2, 2, 2], [1, 1, 2]):
            weights = np.asarray(prompt_gdro.weights(cfg, state, bins))
            assert np.isfinite(weights).all() and (weights >= 0).all()
            if form == "batch_mean_one":
                assert weights.mean() == pytest.approx(1.0, rel=1e-5)
        after = prompt_gdro.update(cfg, state, [0, 1, 2], np.float32([scale, scale, -scale]))
        assert all(np.isfinite(leaf).all() for leaf in after)


def test_none_and_infinite_clip_are_the_same():
    scores = jnp.array([30.0, 0.0])
    for clip in (None, math.inf):
        cfg = prompt_gdro.Config(2, score_clip=clip, **PLAIN)
        q = prompt_gdro.distribution(cfg, prompt_gdro.init(cfg)._replace(scores=scores))
        np.testing.assert_allclose(q, [0.95, 0.05], rtol=1e-5)


def test_regret_is_recomputed_from_the_history():
    """Losses of random bins: sum over a bin's visits of its loss minus that of q over the bins present."""
    cfg, rng = prompt_gdro.Config(4, ema=0.3, step_size=1.5), np.random.default_rng(0)
    state, want, update = prompt_gdro.init(cfg), np.zeros(4), jax.jit(lambda *a: prompt_gdro.update(cfg, *a))
    for _ in range(40):
        bins, signal = rng.integers(0, 4, 6).astype(np.int32), rng.random(6).astype(np.float32)
        q = np.asarray(prompt_gdro.distribution(cfg, state), np.float64)
        means = {b: signal[bins == b].mean() for b in set(bins.tolist())}
        played = sum(q[b] * means[b] for b in means) / sum(q[b] for b in means)
        for b, mean in means.items():
            want[b] += mean - played
        state = update(state, bins, signal)
    np.testing.assert_allclose(state.regret, want, atol=1e-4)


def test_an_absent_bin_of_all_the_weight_does_not_hide_the_others():
    """omega = (e^250, 1, 1) without exploration: over bins 1 and 2 q is (1/2, 1/2) all the same."""
    cfg = prompt_gdro.Config(3, step_size=50.0, score_clip=None, exploration=0.0, ema_debias=False)
    state = prompt_gdro.init(cfg)._replace(scores=jnp.array([5.0, 0.0, 0.0]))
    np.testing.assert_allclose(prompt_gdro.update(cfg, state, [1, 2], [0.5, 0.7]).regret, [0.0, -0.1, 0.1], atol=1e-6)
    among = prompt_gdro.distribution_among(cfg, state, jnp.array([False, True, True]))
    np.testing.assert_allclose(among, [0.0, 0.5, 0.5], rtol=1e-6)
    assert prompt_gdro.distribution_among(cfg, state, jnp.zeros(3, bool)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_bins", 0, "integer >= 1"),
        ("step_size", -1.0, r"\[0, inf\)"),
        ("step_size", math.nan, r"\[0, inf\)"),
        ("ema", 0.0, r"\(0, 1\]"),
        ("exploration", 1.5, r"\[0, 1\]"),
        ("score_clip", 0.0, r"\(0, inf\]"),
        ("weight_cap", "15", r"\(0, inf\]"),
        ("share_floor", 0.0, r"\(0, 1\]"),
        ("ema_debias", 1, "True or False"),
        ("divide_by_share", None, "True or False"),
        ("weights", "mean", "'published', 'released', 'batch_mean_one'"),
    ],
)
def test_bad_fields(field, value, said):
    with pytest.raises(ValueError, match=f"{field}=.*{said}"):
        prompt_gdro.Config(**({"num_bins": 3} | {field: value}))


def test_bad_shapes():
    cfg = prompt_gdro.Config(2)
    with pytest.raises(ValueError, match="signal has shape"):
        prompt_gdro.update(cfg, prompt_gdro.init(cfg), [0, 1], [0.5])


@pytest.mark.parametrize("bins", [[0, 2], [-1, 0]])
def test_bins_that_are_not_there(bins):
    cfg = prompt_gdro.Config(2)
    state, said = prompt_gdro.init(cfg), "bins holds (2|-1): each must be in 0 ... 1"
    with pytest.raises(ValueError, match=said):
        prompt_gdro.update(cfg, state, bins, [0.5, 0.5])
    with pytest.raises(ValueError, match=said):
        prompt_gdro.weights(cfg, state, bins)
