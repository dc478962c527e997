"""The quantities the method's analysis is about, as functions.

B bins, A arms. Source: arXiv 2601.19280, Eqs. 23 to 26 (entropic risk) and its variance proxy; Bubeck and Cesa-Bianchi,
*Regret Analysis of Stochastic and Nonstochastic Multi-armed Bandit Problems* (2012), Theorem 3.3 (EXP3.P).
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gdro_jax.controllers import _checks


def entropic_risk(losses: ArrayLike, step_size: float) -> jax.Array:
    """R_eta = (1/eta) log sum_b exp(eta L_b) (Eq. 23), float32; max_b L_b <= R_eta <= max_b L_b + log(B)/eta (Eq. 25).

    losses float[B], step_size eta > 0, else ValueError.
    """
    _checks.number("step_size", step_size, 0.0, open_low=True, open_high=True)
    return jax.nn.logsumexp(step_size * _checks.float_vector("losses", losses)) / step_size


def best_response(losses: ArrayLike, step_size: float) -> jax.Array:
    """The adversary's best response q_b ~ exp(eta L_b) (Eq. 24), float32[B]; the gradient of the risk (Eq. 26)."""
    _checks.number("step_size", step_size, 0.0, open_low=True, open_high=True)
    return jax.nn.softmax(step_size * _checks.float_vector("losses", losses))


def exp3p_regret_bound(num_arms: int, steps: ArrayLike) -> jax.Array:
    """Bound on EXP3.P's expected regret, float32 of the shape of `steps`: 5.15 sqrt(TK log K) + sqrt(TK / log K).

    For `steps` T losses in [0, 1] and K arms; a bound for losses in [0, c] is c times this. One arm has no regret.
    """
    _checks.integer("num_arms", num_arms, 1)
    steps = jnp.asarray(steps).astype(jnp.float32)
    if num_arms == 1:
        return jnp.zeros_like(steps)
    log_arms = math.log(num_arms)
    return 5.15 * jnp.sqrt(steps * (num_arms * log_arms)) + jnp.sqrt(steps * (num_arms / log_arms))


def variance_proxy(weights: ArrayLike, variances: ArrayLike, counts: ArrayLike) -> jax.Array:
    """sum_b q_b v_b / n_b, float32; arguments float[B]; a bin of weight 0 may have any count."""
    q = _checks.float_vector("weights", weights)
    v = _checks.float_vector("variances", variances, q.shape[0])
    n = _checks.float_vector("counts", counts, q.shape[0])
    return jnp.sum(jnp.where(q > 0, q * v / jnp.where(q > 0, n, 1.0), 0.0))


def optimal_variance_proxy(weights: ArrayLike, variances: ArrayLike, mean_rollouts: float) -> jax.Array:
    """Its minimum (sum_b q_b sqrt(v_b))^2 / n_bar over real n_b with sum_b q_b n_b = n_bar, q summing to 1."""
    q = _checks.float_vector("weights", weights)
    v = _checks.float_vector("variances", variances, q.shape[0])
    return jnp.square(jnp.sum(q * jnp.sqrt(v))) / mean_rollouts


def gain_over_uniform(weights: ArrayLike, variances: ArrayLike) -> jax.Array:
    """Uniform's variance proxy over the optimal, sum q v / (sum q sqrt(v))^2 >= 1 (Cauchy-Schwarz); 1 if v = 0."""
    q = _checks.float_vector("weights", weights)
    v = _checks.float_vector("variances", variances, q.shape[0])
    q, v = q / jnp.sum(q), v / jnp.maximum(jnp.max(v), jnp.finfo(jnp.float32).tiny)
    least = jnp.square(jnp.sum(q * jnp.sqrt(v)))
    return jnp.where(least > 0, jnp.maximum(jnp.sum(q * v) / jnp.where(least > 0, least, 1.0), 1.0), 1.0)


@jax.jit
def best_fixed_arms_loss(losses: jax.Array, mass: jax.Array, arms: jax.Array, mean_rollouts: float) -> jax.Array:
    """Least total loss of one fixed distribution over arms per bin that meets the budget on average; float32.

    losses float32[B, A] summed over steps, mass float32[B] summed shares, arms float32[A]. The linear programme is
    solved by its dual, max over lambda of sum_b min_a [loss_b(a) + lambda mass_b (a - mean)], by bisection.
    """
    cost = mass[:, None] * (arms[None, :] - mean_rollouts)
    span = jnp.max(losses) - jnp.min(losses)
    least = jnp.min(jnp.where(mass > 0, mass, jnp.inf))
    bound = jnp.where(jnp.any(mass > 0), span / jnp.where(jnp.isfinite(least), least, 1.0), 0.0) + 1.0

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        chosen = jnp.argmin(losses + middle * cost, axis=1)
        over = jnp.sum(jnp.take_along_axis(cost, chosen[:, None], axis=1)) > 0
        return jnp.where(over, middle, low), jnp.where(over, high, middle)

    low, high = jax.lax.fori_loop(0, 40, halve, (-bound, bound))
    values = [jnp.sum(jnp.min(losses + price * cost, axis=1)) for price in (low, high)]
    return jnp.maximum(values[0], values[1])
