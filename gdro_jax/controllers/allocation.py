"""Rollout counts under a hard budget: one arm (a count) per bin such that sum over bins of prompts x count = budget.

B bins, A arms, S = budget + 1 amounts spent. The three solvers share one forward `lax.scan` over bins whose carry
holds, for every amount spent so far, the best (`max`) or total (`logsumexp`) log-probability of spending it; a second
scan goes back from the budget. Source of the problem: arXiv 2601.19280, the constrained selection of Rollout-GDRO (its
dynamic programme); drawing from the budget-conditioned distribution, and its exact marginals, are this project's.

Real-valued and per-prompt allocation (`square_root_law`, `round_to_budget`) live in `square_root.py`.
"""

import operator
from functools import reduce
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gdro_jax.controllers import _checks
from gdro_jax.controllers.square_root import round_to_budget as round_to_budget
from gdro_jax.controllers.square_root import square_root_law as square_root_law

_IMPOSSIBLE = -1e30  # log-probability of an arm of probability 0: taken only if nothing else meets the budget


class Problem(NamedTuple):
    """A budget problem with its empty bins settled on the first arm."""

    log_probs: jax.Array  # float32[B, A], the largest of each row 0, clipped below at _IMPOSSIBLE
    costs: jax.Array  # int32[B, A], rollouts that an arm of a bin takes, at most S


class Solution(NamedTuple):
    """Arms chosen, and how likely each was."""

    arms: jax.Array  # int32[B] indices of arms
    log_marginals: jax.Array  # float32[B] log-probability of the bin's arm given the budget; 0 under `best`
    spent: jax.Array  # int32, sum of the costs


def max_probability(log_probs: ArrayLike, bin_counts: ArrayLike, arms: ArrayLike, budget: int) -> jax.Array:
    """The counts n_b that maximise sum_b log p_b(n_b) subject to sum_b m_b n_b = budget; int32[B].

    log_probs float[B, A], bin_counts int[B] prompts per bin m_b, arms int[A] >= 0, budget a Python integer. A bin
    without prompts gets arms[0]. Raises ValueError for wrong shapes, and outside jit when no choice meets the budget.
    """
    counts, arms, budget = _checked(log_probs, bin_counts, arms, budget)
    problem = make_problem(log_probs, counts, arms, budget)
    solution = best(problem, only(budget))
    _raise_if_infeasible(solution.spent, budget)
    return arms[solution.arms]


def sample(key: jax.Array, log_probs: ArrayLike, bin_counts: ArrayLike, arms: ArrayLike, budget: int) -> jax.Array:
    """Counts drawn from prod_b p_b(n_b) conditioned on sum_b m_b n_b = budget, exactly; int32[B].

    Arguments and errors as in `max_probability`.
    """
    counts, arms, budget = _checked(log_probs, bin_counts, arms, budget)
    problem = make_problem(log_probs, counts, arms, budget)
    solution = draw(key, problem, only(budget))
    _raise_if_infeasible(solution.spent, budget)
    return arms[solution.arms]


def marginals(log_probs: ArrayLike, bin_counts: ArrayLike, arms: ArrayLike, budget: int) -> jax.Array:
    """Probability of each arm of each bin under the distribution that `sample` draws from; float32[B, A].

    Rows sum to 1; a bin without prompts has all its mass on arms[0]. Arguments and errors as in `max_probability`.
    """
    counts, arms, budget = _checked(log_probs, bin_counts, arms, budget)
    problem = make_problem(log_probs, counts, arms, budget)
    table, spent = _marginals(problem, only(budget))
    _raise_if_infeasible(spent, budget)
    return table


@jax.jit
def _marginals(problem: Problem, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
    before, total = _forward(problem, ends.shape[0], "logsumexp")
    spent = jnp.where(jnp.isfinite(jnp.max(total + ends)), jnp.argmax(ends), -1)

    def back(after: jax.Array, item: tuple[jax.Array, Problem]) -> tuple[jax.Array, jax.Array]:
        reach, row = item
        rest = _ahead(after, row.costs)
        joint = [jax.nn.logsumexp(reach + values) for values in rest]
        return _combine(rest, row.log_probs, "logsumexp"), jnp.stack(joint) + row.log_probs

    _, log_joint = jax.lax.scan(back, ends, (before, problem), reverse=True)
    return jax.nn.softmax(log_joint, axis=1), spent


def make_problem(log_probs: ArrayLike, bin_counts: jax.Array, arms: jax.Array, budget: int) -> Problem:
    """Normalises the log-probabilities, settles empty bins on arms[0] and prices the arms."""
    logs = jnp.nan_to_num(
        jnp.asarray(log_probs).astype(jnp.float32), nan=-jnp.inf, neginf=-jnp.inf, posinf=-_IMPOSSIBLE
    )
    best_log = jnp.max(logs, axis=1, keepdims=True)
    logs = jnp.maximum(logs - jnp.maximum(best_log, _IMPOSSIBLE), _IMPOSSIBLE)
    settled = jnp.full(arms.shape, -jnp.inf, jnp.float32).at[0].set(0.0)
    empty = bin_counts[:, None] <= 0
    costs = jnp.minimum(bin_counts[:, None] * arms[None, :], budget + 1)
    return Problem(jnp.where(empty, settled[None, :], logs), jnp.where(empty, 0, costs))


def only(budget: int) -> jax.Array:
    """Log-weights of the amounts spent, float32[S], that allow the whole budget alone."""
    return jnp.full(budget + 1, -jnp.inf, jnp.float32).at[budget].set(0.0)


@jax.jit
def best(problem: Problem, ends: jax.Array) -> Solution:
    """The most probable arms; `ends` float32[S] are log-weights of the total spent (-inf: not allowed)."""
    before, total = _forward(problem, ends.shape[0], "max")
    spent = jnp.argmax(total + ends).astype(jnp.int32)

    def back(left: jax.Array, item: tuple[jax.Array, Problem]) -> tuple[jax.Array, jax.Array]:
        reach, row = item
        arm = jnp.argmax(_candidates(reach, row, left)).astype(jnp.int32)
        return left - row.costs[arm], arm

    left, arms = jax.lax.scan(back, spent, (before, problem), reverse=True)
    feasible = jnp.isfinite(jnp.max(total + ends)) & (left == 0)
    return Solution(arms, jnp.zeros(arms.shape, jnp.float32), jnp.where(feasible, spent, -1))


@jax.jit
def draw(key: jax.Array, problem: Problem, ends: jax.Array) -> Solution:
    """Arms drawn from prod_b p_b conditioned on the total spent, weighted by exp(ends), with their exact marginals."""
    before, total = _forward(problem, ends.shape[0], "logsumexp")
    num_bins = problem.costs.shape[0]
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(num_bins + 1, dtype=jnp.uint32))
    spent = jax.random.categorical(keys[num_bins], total + ends).astype(jnp.int32)
    evidence = jax.nn.logsumexp(total + ends)

    def back(
        carry: tuple[jax.Array, jax.Array], item: tuple[jax.Array, Problem, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        left, after = carry
        reach, row, bin_key = item
        arm = jax.random.categorical(bin_key, _candidates(reach, row, left)).astype(jnp.int32)
        rest = _ahead(after, row.costs[arm][None])[0]
        log_marginal = jax.nn.logsumexp(reach + rest) + row.log_probs[arm] - evidence
        return (left - row.costs[arm], _combine(_ahead(after, row.costs), row.log_probs, "logsumexp")), (
            arm,
            jnp.minimum(log_marginal, 0.0),
        )

    (left, _), (arms, logs) = jax.lax.scan(back, (spent, ends), (before, problem, keys[:num_bins]), reverse=True)
    return Solution(arms, logs, jnp.where(jnp.isfinite(evidence) & (left == 0), spent, -1))


def _forward(problem: Problem, size: int, how: Literal["max", "logsumexp"]) -> tuple[jax.Array, jax.Array]:
    """Log-value of every amount spent before each bin, float32[B, S], and after all of them, float32[S]."""

    def step(reach: jax.Array, row: Problem) -> tuple[jax.Array, jax.Array]:
        return _combine(_behind(reach, row.costs), row.log_probs, how), reach

    nothing_spent = jnp.full(size, -jnp.inf, jnp.float32).at[0].set(0.0)
    total, before = jax.lax.scan(step, nothing_spent, problem)
    return before, total


def _behind(values: jax.Array, costs: jax.Array) -> list[jax.Array]:
    """values[s - cost] for every s, -inf before the start, one float32[S] per arm."""
    size = values.shape[0]
    padded = jnp.concatenate([jnp.full(size, -jnp.inf, jnp.float32), values])
    return [jax.lax.dynamic_slice(padded, (size - costs[arm],), (size,)) for arm in range(costs.shape[0])]


def _ahead(values: jax.Array, costs: jax.Array) -> list[jax.Array]:
    """values[s + cost] for every s, -inf past the end, one float32[S] per arm."""
    size = values.shape[0]
    padded = jnp.concatenate([values, jnp.full(size, -jnp.inf, jnp.float32)])
    return [jax.lax.dynamic_slice(padded, (costs[arm],), (size,)) for arm in range(costs.shape[0])]


def _combine(shifted: list[jax.Array], log_probs: jax.Array, how: Literal["max", "logsumexp"]) -> jax.Array:
    terms = [values + log_probs[arm] for arm, values in enumerate(shifted)]
    peak = reduce(jnp.maximum, terms)
    if how == "max":
        return peak
    base = jnp.where(jnp.isfinite(peak), peak, 0.0)
    return base + jnp.log(reduce(operator.add, [jnp.exp(term - base) for term in terms]))


def _candidates(reach: jax.Array, row: Problem, left: jax.Array) -> jax.Array:
    """Log-value of each arm as the last step to `left` spent, float32[A]."""
    start = left - row.costs
    return jnp.where(start >= 0, reach[jnp.maximum(start, 0)], -jnp.inf) + row.log_probs


def _checked(
    log_probs: ArrayLike, bin_counts: ArrayLike, arms: ArrayLike, budget: int
) -> tuple[jax.Array, jax.Array, int]:
    shape = jnp.shape(log_probs)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"log_probs has shape {shape}: it must be [bins, arms]")
    try:
        amount = operator.index(budget)
    except TypeError as error:
        raise ValueError(f"budget={budget!r} is not allowed: it must be a Python integer, known outside jit") from error
    if amount < 0:
        raise _checks.reject("budget", amount, "an integer >= 0")
    counts = _checks.int_vector("bin_counts", bin_counts, shape[0])
    return counts, _checks.int_vector("arms", arms, shape[1]), amount


def _raise_if_infeasible(spent: jax.Array, budget: int) -> None:
    if not isinstance(spent, jax.core.Tracer) and int(spent) != budget:
        raise ValueError(f"no choice of arms spends budget={budget} exactly over these bins")
