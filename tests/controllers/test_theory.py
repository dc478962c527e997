"""Eqs. 23 to 26, the regret bound, the variance proxy's optimum, and the diagnostics."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdro_jax.controllers import allocation, diagnostics, theory

LOSSES = np.array([0.3, 1.2, -0.4, 0.9], np.float32)


@pytest.mark.parametrize("eta", [0.1, 0.65, 5.0, 200.0])
def test_entropic_risk_is_between_its_bounds(eta):
    """Eq. 25, and Eq. 23 by hand where exp does not overflow."""
    risk = float(theory.entropic_risk(LOSSES, eta))
    assert LOSSES.max() - 1e-5 <= risk <= LOSSES.max() + math.log(4) / eta + 1e-5
    if eta < 10:
        assert risk == pytest.approx(math.log(np.exp(eta * LOSSES.astype(np.float64)).sum()) / eta, rel=1e-5)


@pytest.mark.parametrize("eta", [0.1, 0.65, 5.0, 200.0])
def test_gradient_of_the_risk_is_the_best_response(eta):
    """Eq. 26: through losses that depend on parameters, grad R = sum_b q_b grad L_b."""
    matrix = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)

    def losses(theta):
        return jnp.tanh(matrix @ theta)

    theta = jnp.array([0.3, -0.2, 0.5])
    got = jax.grad(lambda theta: theory.entropic_risk(losses(theta), eta))(theta)
    want = theory.best_response(losses(theta), eta) @ jax.jacobian(losses)(theta)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_best_response_solves_the_regularised_game():
    """Eq. 24: q maximises sum q L + H(q)/eta over the simplex, and the maximum is R_eta."""
    eta, rng = 2.0, np.random.default_rng(1)

    def value(q):
        return (q * LOSSES).sum() - (q * np.log(q)).sum() / eta

    best = value(np.asarray(theory.best_response(LOSSES, eta), np.float64))
    assert best == pytest.approx(float(theory.entropic_risk(LOSSES, eta)), rel=1e-5)
    assert all(value(q) <= best + 1e-6 for q in rng.dirichlet(np.ones(4), size=200))


def test_exp3p_bound_by_hand():
    """K = 2, T = 100: 5.15 sqrt(200 ln 2) + sqrt(100 * 2 / ln 2) = 60.637 + 16.986."""
    assert float(theory.exp3p_regret_bound(2, 100)) == pytest.approx(60.637 + 16.986, abs=5e-3)
    assert float(theory.exp3p_regret_bound(1, 100)) == 0.0
    assert theory.exp3p_regret_bound(3, jnp.arange(5)).shape == (5,)


def test_exponential_weights_stay_under_the_bound():
    rng, arms, steps = np.random.default_rng(0), 5, 400
    eta, total, played = math.sqrt(8 * math.log(arms) / steps), np.zeros(arms), 0.0
    losses = rng.random((steps, arms)) * np.linspace(0.5, 1.0, arms)
    for row in losses:
        played += float(np.asarray(theory.best_response(-total, eta)) @ row)
        total += row
    regret = played - total.min()
    assert 0 < regret <= math.sqrt(steps * math.log(arms) / 2) <= float(theory.exp3p_regret_bound(arms, steps))


def test_variance_proxy_and_its_optimum():
    """q = (1/2, 1/2), v = (0.16, 0.04), n_bar 4: uniform 0.025, optimal (0.2 + 0.1)^2 / 4 = 0.0225, gain 10/9."""
    q, v = np.array([0.5, 0.5]), np.array([0.16, 0.04])
    assert float(theory.variance_proxy(q, v, [4.0, 4.0])) == pytest.approx(0.025, rel=1e-6)
    assert float(theory.optimal_variance_proxy(q, v, 4)) == pytest.approx(0.0225, rel=1e-6)
    assert float(theory.gain_over_uniform(q, v)) == pytest.approx(10 / 9, rel=1e-6)
    law = allocation.square_root_law(v, q, 4, 1, 12)
    assert float(theory.variance_proxy(q, v, law)) == pytest.approx(0.0225, rel=1e-5)
    assert float(theory.variance_proxy([1.0, 0.0], [0.2, 0.3], [2.0, 0.0])) == pytest.approx(0.1)


def test_gain_is_at_least_one_and_one_only_for_equal_variances():
    rng = np.random.default_rng(3)
    for _ in range(20):
        q, v = rng.dirichlet(np.ones(5)), rng.random(5)
        assert float(theory.gain_over_uniform(q, v)) > 1.0
        best = float(theory.optimal_variance_proxy(q, v, 4))
        counts = rng.random(5) + 0.1
        assert best <= float(theory.variance_proxy(q, v, 4 * counts / (q * counts).sum())) + 1e-6
    assert float(theory.gain_over_uniform(q, np.full(5, 0.2))) == pytest.approx(1.0, abs=1e-5)
    assert float(theory.gain_over_uniform(q, np.zeros(5))) == 1.0


def test_best_fixed_arms_is_the_linear_programme():
    rng, arms = np.random.default_rng(2), np.array([2.0, 4.0, 7.0], np.float32)
    for _ in range(5):
        losses, mass = rng.random((2, 3)).astype(np.float32) * 9, rng.random(2).astype(np.float32) + 0.2
        got = float(theory.best_fixed_arms_loss(losses, mass, arms, 4.0))
        best = math.inf  # an optimal vertex mixes at most two pairs of arms
        pairs = list(itertools.product(range(3), repeat=2))
        for one, two in itertools.product(pairs, repeat=2):
            points = [
                (sum(mass[b] * (arms[c[b]] - 4) for b in range(2)), sum(losses[b, c[b]] for b in range(2)))
                for c in (one, two)
            ]
            (x, f), (y, g) = points
            if x <= 0 <= y:
                share = 1.0 if x == y else y / (y - x)
                best = min(best, share * f + (1 - share) * g)
        assert got == pytest.approx(best, rel=1e-3)


def test_errors():
    for function in (theory.entropic_risk, theory.best_response):
        with pytest.raises(ValueError, match=r"step_size=0\.0"):
            function(LOSSES, 0.0)
    with pytest.raises(ValueError, match="num_arms=0"):
        theory.exp3p_regret_bound(0, 10)


@pytest.mark.parametrize(
    ("function", "rest"),
    [
        (theory.variance_proxy, [[4.0, 4.0]]),
        (theory.optimal_variance_proxy, [4]),
        (theory.gain_over_uniform, []),
        (diagnostics.lead_lag, []),
        (diagnostics.weighted_standard_error, [[4.0, 4.0]]),
    ],
)
def test_vectors_of_unequal_length(function, rest):
    """One number is not spread over all bins."""
    with pytest.raises(ValueError, match=r"(variances|shares|stds) has shape \(1,\): it must be a vector of length 2"):
        function([0.5, 0.5], [0.2], *rest)


def test_lead_lag_by_hand():
    assert float(diagnostics.lead_lag([0.5, 0.5, 0.0], [0.25, 0.25, 0.5])) == pytest.approx(0.5 - 1.25)
    assert float(diagnostics.lead_lag([2.0, 0.0], [0.0, 3.0])) == pytest.approx(-1.0)


def test_weighted_standard_error_by_hand():
    """0.5 * 0.4/sqrt(4) + 0.5 * 0.2/sqrt(16) = 0.125; the empty bin's NaN does not matter; uniform 4: 0.15."""
    args = [0.5, 0.5, 0.0], [0.4, 0.2, np.nan], [4.0, 16.0, np.nan]
    assert float(diagnostics.weighted_standard_error(*args)) == pytest.approx(0.125)
    assert float(diagnostics.wse_reduction(*args, 4)) == pytest.approx(1 - 0.125 / 0.15, rel=1e-5)
    assert float(diagnostics.wse_reduction([1.0], [0.0], [4.0], 4)) == 0.0


def test_effective_bins_by_hand():
    assert float(diagnostics.effective_bins([0.25] * 4)) == pytest.approx(4.0, rel=1e-6)
    assert float(diagnostics.effective_bins([0.0, 5.0])) == pytest.approx(1.0)
