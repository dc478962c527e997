"""What a bin loses by getting n rollouts, for every arm n at once: the full-information utilities of Rollout-GDRO.

B bins, A arms. Each table float32[B, A] is convex in n (a loss; the utility is concave), so that under a budget the
best whole counts are reached by marginal gains.
"""

import jax
import jax.numpy as jnp

from gdro_jax.controllers import beta

FULL_INFORMATION = ("variance", "informative", "coverage")


def variance_loss(variances: jax.Array, arms: tuple[int, ...]) -> jax.Array:
    """v_b / n: the variance of the mean reward of n rollouts."""
    return variances[:, None] / jnp.array(arms, jnp.float32)[None, :]


def posterior_loss(utility: str, alpha: jax.Array, failures: jax.Array, arms: tuple[int, ...]) -> jax.Array:
    """Minus `utility` ("informative" or "coverage") under Beta posteriors; float32[P, A] for float32[P] parameters."""
    curve = beta.informative if utility == "informative" else beta.coverage
    return -curve(alpha, failures, arms)


def plug_in_loss(utility: str, variances: jax.Array, arms: tuple[int, ...]) -> jax.Array:
    """The same from the variance alone, when no posterior is given, for rewards 0 and 1; float32[B, A].

    p (1 - p) = v has two roots; `informative` is the same at both, `coverage` takes the lower one (a hard bin).
    """
    rate = 0.5 * (1.0 - jnp.sqrt(jnp.maximum(1.0 - 4.0 * variances, 0.0)))[:, None]
    n = jnp.array(arms, jnp.float32)[None, :]
    if utility == "informative":
        return rate**n + (1.0 - rate) ** n - 1.0
    return (1.0 - rate) ** n - 1.0


def marginal_gains(
    values: jax.Array,
    sizes: jax.Array,
    first: jax.Array,
    budget_left: jax.Array,
    tie_break: jax.Array,
    *,
    evenly: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Spends what is left, one rollout at a time, where one more gains most.

    values float32[B, A]: what one prompt of a bin gains in total by each arm (arms are consecutive counts).
    sizes int32[B] prompts per bin; first int32[B] index of the arm each bin already has; tie_break float32[B].
    evenly: every bin gets its first one more before any gets a second. Among equal gains lower arms come first, then
        bins by tie_break.
    Returns the new arm indices int32[B], the one bin of which only some prompts get one more, and how many of them.
    Exact where `values` is concave along arms; elsewhere a later gain never counts for more than an earlier one.
    """
    num_bins, num_arms = values.shape
    gains = jnp.diff(values, axis=1)
    taken = jnp.arange(num_arms - 1, dtype=jnp.int32)[None, :] < first[:, None]
    gains = jax.lax.cummin(jnp.where(taken, jnp.inf, gains), axis=1)
    cost = jnp.where(taken, 0, sizes[:, None])
    bin_order = jnp.argsort(tie_break).astype(jnp.int32)
    flat_gains, flat_cost = gains[bin_order].T.reshape(-1), cost[bin_order].T.reshape(-1)  # arm first, then bin
    order = jnp.argsort(-flat_gains, stable=True)
    if evenly:
        again = jnp.arange(num_arms - 1, dtype=jnp.int32)[None, :] > first[:, None]
        order = order[jnp.argsort(again[bin_order].T.reshape(-1)[order], stable=True)]
    ends = jnp.cumsum(flat_cost[order], dtype=jnp.int32)
    whole = (ends <= budget_left) & (flat_cost[order] > 0)
    owner = jnp.tile(bin_order, num_arms - 1)[order]
    arms = first + jnp.zeros(num_bins, jnp.int32).at[owner].add(whole.astype(jnp.int32))
    split = jnp.argmax((ends > budget_left) & (flat_cost[order] > 0))
    rest = budget_left - (ends[split] - flat_cost[order][split])
    some = jnp.any(ends > budget_left)
    return arms, owner[split], jnp.where(some, rest, 0)
