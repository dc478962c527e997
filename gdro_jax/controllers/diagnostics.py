"""Summaries of a step's bins, for logs. B bins, bin 0 the hardest; all arguments float[B], all results float32.

Vectors of unequal length are a ValueError.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gdro_jax.controllers import _checks

_TINY = 1e-30


def lead_lag(q: ArrayLike, shares: ArrayLike) -> jax.Array:
    """Mean bin under q minus mean bin under the shares: negative when the weight leans to harder bins than the data."""
    weights = _checks.float_vector("q", q)
    return _mean_bin(weights) - _mean_bin(_checks.float_vector("shares", shares, weights.shape[0]))


def weighted_standard_error(shares: ArrayLike, stds: ArrayLike, counts: ArrayLike) -> jax.Array:
    """WSE = sum_b share_b std_b / sqrt(n_b); bins without share, or without rollouts, are left out."""
    share = _checks.float_vector("shares", shares)
    std = _checks.float_vector("stds", stds, share.shape[0])
    n = _checks.float_vector("counts", counts, share.shape[0])
    used = (share > 0) & (n > 0)
    return jnp.sum(jnp.where(used, share * jnp.where(used, std, 0.0) / jnp.sqrt(jnp.where(used, n, 1.0)), 0.0))


def wse_reduction(shares: ArrayLike, stds: ArrayLike, counts: ArrayLike, mean_rollouts: float) -> jax.Array:
    """1 - WSE / WSE of uniform counts; 0 where uniform's is 0."""
    n = _checks.float_vector("counts", counts)
    uniform = weighted_standard_error(shares, stds, jnp.where(n > 0, jnp.float32(mean_rollouts), 0.0))
    ratio = weighted_standard_error(shares, stds, n) / jnp.where(uniform > 0, uniform, 1.0)
    return jnp.where(uniform > 0, 1.0 - ratio, 0.0)


def effective_bins(q: ArrayLike) -> jax.Array:
    """exp of the entropy of q: B when uniform, 1 when all in one bin."""
    p = _checks.float_vector("q", q)
    p = p / jnp.maximum(jnp.sum(p), _TINY)
    return jnp.exp(-jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0)))


def _mean_bin(weights: jax.Array) -> jax.Array:
    index = jnp.arange(weights.shape[0], dtype=jnp.float32)
    return jnp.sum(index * weights) / jnp.maximum(jnp.sum(weights), _TINY)
