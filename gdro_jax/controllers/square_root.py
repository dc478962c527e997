"""The square-root law with bounds, and rounding to whole rollouts that meet a budget exactly.

Source: arXiv 2601.19280, Rollout-GDRO's variance proxy sum_b q_b v_b / n_b, whose minimiser under sum_b q_b n_b = n_bar
is n_b = n_bar sqrt(v_b) / sum_j q_j sqrt(v_j). The active set and the rounding are this project's.
"""

import operator
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gdro_jax.controllers import _checks

_FAR = 1e38  # ideals are kept within it
_FLOOR = 1e-12  # smallest variance, relative to the largest: decides who gets what others cannot take


def square_root_law(
    variances: ArrayLike, weights: ArrayLike, mean_rollouts: float, min_rollouts: float, max_rollouts: float
) -> jax.Array:
    """Minimises sum_b w_b v_b / n_b subject to sum_b w_b n_b = mean_rollouts sum_b w_b, min <= n_b <= max; float32[B].

    What clipping at a bound frees or takes is spent again on the others (active set): n_b = clip(c sqrt(v_b)), with the
    one c that meets the budget, found to a neighbouring float32 by bisection. variances and weights float[B], >= 0
    (anything else counts as 0). Raises ValueError unless 0 < min <= mean <= max.
    """
    _checks.number("min_rollouts", min_rollouts, 0.0, open_low=True, open_high=True)
    _checks.number("max_rollouts", max_rollouts, min_rollouts, open_high=True)
    _checks.number("mean_rollouts", mean_rollouts, min_rollouts, max_rollouts)
    v = _clean(_checks.float_vector("variances", variances))
    w = _clean(_checks.float_vector("weights", weights, v.shape[0]))
    w = jnp.where(jnp.max(w) > 0, w / jnp.maximum(jnp.max(w), jnp.finfo(jnp.float32).tiny), 1.0)
    root = jnp.where(jnp.max(v) > 0, v / jnp.maximum(jnp.max(v), jnp.finfo(jnp.float32).tiny), 1.0)
    root = jnp.sqrt(jnp.maximum(root, _FLOOR))

    def excess(scale: jax.Array) -> jax.Array:
        return jnp.sum(w * (jnp.clip(scale * root, min_rollouts, max_rollouts) - mean_rollouts))

    # Between all at the minimum and all at the maximum. Running sums over the scales at which bins reach their bounds
    # would lose the budget: those scales are up to 1e6 apart, and each sum's rounding error is multiplied by that.
    least, most = min_rollouts / jnp.max(root), 2.0 * max_rollouts / jnp.min(root)
    scale, _ = _bisect(lambda scale: excess(scale) > 0, _rank_of(least), _rank_of(most))
    return jnp.clip(scale * root, min_rollouts, max_rollouts).astype(jnp.float32)


def round_to_budget(ideal_per_prompt: ArrayLike, budget: int, min_rollouts: int, max_rollouts: int) -> jax.Array:
    """Whole rollouts nearest to the ideal (least squares) within the bounds that add up to the budget; int32[P].

    Nearest means n_i = clip(round(ideal_i + shift)) for one common shift, ties by position; non-finite ideals count as
    the mean. Raises ValueError unless 0 <= min <= max and P min <= budget <= P max (a traced budget is not checked).
    """
    ideal = _checks.float_vector("ideal_per_prompt", ideal_per_prompt)
    _checks.integer("min_rollouts", min_rollouts, 0)
    _checks.integer("max_rollouts", max_rollouts, min_rollouts)
    prompts = ideal.shape[0]
    amount = budget if isinstance(budget, jax.core.Tracer) else operator.index(budget)
    if not isinstance(amount, jax.core.Tracer) and not prompts * min_rollouts <= amount <= prompts * max_rollouts:
        allowed = f"between {prompts} x min_rollouts={min_rollouts} and {prompts} x max_rollouts={max_rollouts}"
        raise _checks.reject("budget", amount, allowed)
    return _nearest(ideal, jnp.asarray(amount).astype(jnp.int32), min_rollouts, max_rollouts)


@partial(jax.jit, static_argnums=(2, 3))
def _nearest(ideal: jax.Array, budget: jax.Array, min_rollouts: int, max_rollouts: int) -> jax.Array:
    prompts = ideal.shape[0]
    mean = budget.astype(jnp.float32) / max(prompts, 1)
    ideal = jnp.clip(jnp.where(jnp.isfinite(ideal), ideal, mean), -_FAR, _FAR)

    def counts(shift: jax.Array) -> jax.Array:
        return jnp.clip(jnp.floor(ideal + shift + 0.5), min_rollouts, max_rollouts).astype(jnp.int32)

    def over(shift: jax.Array) -> jax.Array:
        return jnp.sum(counts(shift), dtype=jnp.int32) > budget

    span = _rank_of(jnp.float32(3.0 * _FAR))
    low, high = _bisect(over, -span, span)
    base = counts(low)
    spare = counts(high) - base  # at the next shift up; over 1 only where floats are sparser than counts
    threshold = base.astype(jnp.float32) + 0.5 - ideal
    order = jnp.argsort(jnp.where(spare > 0, threshold, jnp.inf))
    before = jnp.cumsum(spare[order], dtype=jnp.int32) - spare[order]
    given = jnp.clip(budget - jnp.sum(base, dtype=jnp.int32) - before, 0, spare[order])
    return base.at[order].add(given)


def _bisect(over: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The neighbouring float32 between which a number begins to be `over`, from the ranks of two around them."""

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        too_far = over(_float_of(middle))
        return jnp.where(too_far, low, middle), jnp.where(too_far, middle, high)

    low, high = jax.lax.fori_loop(0, 33, halve, (low, high))  # enough for all floats there are
    return _float_of(low), _float_of(high)


def _rank_of(value: jax.Array) -> jax.Array:
    """The rank of a float32 that is not negative."""
    return jax.lax.bitcast_convert_type(value, jnp.int32)


def _float_of(rank: jax.Array) -> jax.Array:
    """The float32 of an int32 rank; ranks are in the order of the floats, without gaps."""
    size = jax.lax.bitcast_convert_type(jnp.abs(rank), jnp.float32)
    return jnp.where(rank < 0, -size, size)


def _clean(values: jax.Array) -> jax.Array:
    return jnp.clip(jnp.where(jnp.isfinite(values), values, 0.0), 0.0, 1e30)
