"""Beta posteriors over a prompt's success rate: what n rollouts of it would show.

All expectations are products of ratios, taken in log space with `log1p` and `expm1`, so that they keep their relative
accuracy in float32 for evidence of any size. `alpha` and `beta` are positive, of any one shape.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.special import betainc

from gdro_jax.controllers import _checks


def log_all_fail(alpha: jax.Array, beta: jax.Array, n: int) -> jax.Array:
    """log E[(1-p)^n] = log B(alpha, beta+n)/B(alpha, beta), as sum over i < n of log(1 - alpha/(alpha+beta+i))."""
    steps = jnp.arange(n, dtype=jnp.float32).reshape((n,) + (1,) * alpha.ndim)
    return jnp.sum(jnp.log1p(-alpha[None] / (alpha[None] + beta[None] + steps)), axis=0)


def pass_at_k(alpha: jax.Array, beta: jax.Array, k: int) -> jax.Array:
    """Posterior predictive pass@k, 1 - E[(1-p)^k]; float32 of the shape of `alpha`."""
    return -jnp.expm1(log_all_fail(alpha, beta, k))


def coverage(alpha: jax.Array, beta: jax.Array, arms: tuple[int, ...]) -> jax.Array:
    """Posterior probability of at least one success in n rollouts, for each n of `arms`; float32[..., A]."""
    return -jnp.expm1(_at_arms(alpha, beta, arms))


def informative(alpha: jax.Array, beta: jax.Array, arms: tuple[int, ...]) -> jax.Array:
    """Posterior probability that n rollouts are not all alike, 1 - E[p^n] - E[(1-p)^n]; float32[..., A]."""
    none_right, all_right = _at_arms(alpha, beta, arms), _at_arms(beta, alpha, arms)
    return jnp.maximum(-jnp.expm1(none_right) - jnp.exp(all_right), 0.0)


def _at_arms(alpha: jax.Array, beta: jax.Array, arms: tuple[int, ...]) -> jax.Array:
    """log E[(1-p)^n] for each n of `arms`, from one cumulative sum; float32[..., A]."""
    steps = jnp.arange(max(arms), dtype=jnp.float32).reshape((1,) * alpha.ndim + (max(arms),))
    terms = jnp.log1p(-alpha[..., None] / (alpha[..., None] + beta[..., None] + steps))
    sums = jnp.concatenate([jnp.zeros_like(terms[..., :1]), jnp.cumsum(terms, axis=-1)], axis=-1)
    return sums[..., jnp.array(arms, jnp.int32)]


def below(alpha: jax.Array, beta: jax.Array, rate: jax.Array) -> jax.Array:
    """Posterior probability that the success rate is below `rate`, all of one shape."""
    return betainc(alpha, beta, rate)


@partial(jax.jit, static_argnames="credible")
def interval(alpha: jax.Array, beta: jax.Array, credible: float) -> tuple[jax.Array, jax.Array]:
    """Equal-tailed credible interval of the success rate, each end of the shape of `alpha`, by bisection."""
    _checks.number("credible", credible, 0.0, 1.0, open_low=True, open_high=True)
    tail = (1.0 - credible) / 2.0

    def quantile(level: float) -> jax.Array:
        def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = ends
            middle = 0.5 * (low + high)
            left = below(alpha, beta, middle) < level
            return jnp.where(left, middle, low), jnp.where(left, high, middle)

        low, high = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(alpha), jnp.ones_like(alpha)))
        return 0.5 * (low + high)

    return quantile(tail), quantile(1.0 - tail)


def rate_of_pass(pass_rate: float, k: int) -> float:
    """The success rate p whose pass@k, 1 - (1-p)^k, is `pass_rate`."""
    return -math.expm1(math.log1p(-pass_rate) / k)
