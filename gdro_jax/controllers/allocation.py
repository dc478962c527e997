"""Rollout counts under a hard budget: one arm (a count) per bin such that sum over bins of prompts x count = budget.

B bins, A arms, S = budget + 1 amounts spent. The three solvers share one forward `lax.scan` over bins whose carry
holds, for every amount spent so far, the best (`max`) or total (`logsumexp`) log-probability of spending it; a second
scan goes back from the budget. An arm of probability 0 is a last resort: choices are ranked by how few of them they
hold first, by the probability of their other arms second (each relative to the likeliest of its bin). Finite
log-probabilities may span any range in which float32 sums resolve them: one of -1e6 swamps differences of 0.1.

Source of the problem: arXiv 2601.19280, the constrained selection of Rollout-GDRO (its dynamic programme); drawing from
the budget-conditioned distribution, and its exact marginals, are this project's.

Real-valued and per-prompt allocation (`square_root_law`, `round_to_budget`) live in `square_root.py`.
"""

import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gdro_jax.controllers import _checks
from gdro_jax.controllers.square_root import round_to_budget as round_to_budget
from gdro_jax.controllers.square_root import square_root_law as square_root_law

_BLOCK = 2048  # amounts whose arms are joined at once; a bin's values of so many stay in a core's cache
Tree = TypeVar("Tree")
_IMPOSSIBLE = -1e30  # an arm whose log-probability is this far below its bin's largest has probability 0


class Problem(NamedTuple):
    """A budget problem with its empty bins settled on the first arm."""

    log_probs: jax.Array  # float32[B, A], the largest of each row 0, and 0 for arms of probability 0
    impossible: jax.Array  # float32[B, A], 1 for arms of probability 0: taken only if nothing else meets the budget
    costs: jax.Array  # int32[B, A], rollouts that an arm of a bin takes, at most S


class Reach(NamedTuple):
    """The choices that spend each amount, best first by rank: float32[S] each, -inf where there are none."""

    rank: jax.Array  # minus the number of arms of probability 0
    logs: jax.Array  # best or total log-probability of the other arms, over the choices of that rank


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
    spent = jnp.where(jnp.isfinite(jnp.max(_finished(total, ends))), jnp.argmax(ends), -1)

    def back(after: Reach, item: tuple[Reach, Problem]) -> tuple[Reach, jax.Array]:
        reach, row = item
        rest = _slices(after, row.costs, ends.shape[0])
        joint = _best_rank(
            jnp.stack([jnp.max(reach.rank + values.rank) for values in rest]) - row.impossible,
            jnp.stack([_log_total(reach, values) for values in rest]) + row.log_probs,
        )
        return _back(after, row), joint

    _, log_joint = jax.lax.scan(back, _after(ends), (before, problem), reverse=True)
    return jax.nn.softmax(log_joint, axis=1), spent


def make_problem(log_probs: ArrayLike, bin_counts: jax.Array, arms: jax.Array, budget: int) -> Problem:
    """Normalises the log-probabilities, settles empty bins on arms[0] and prices the arms."""
    logs = jnp.nan_to_num(
        jnp.asarray(log_probs).astype(jnp.float32), nan=-jnp.inf, neginf=-jnp.inf, posinf=-_IMPOSSIBLE
    )
    best_log = jnp.max(logs, axis=1, keepdims=True)
    logs = logs - jnp.maximum(best_log, _IMPOSSIBLE)
    impossible = logs <= _IMPOSSIBLE
    settled = jnp.full(arms.shape, -jnp.inf, jnp.float32).at[0].set(0.0)
    empty = bin_counts[:, None] <= 0
    impossible = impossible & ~empty
    costs = jnp.minimum(bin_counts[:, None] * arms[None, :], budget + 1)
    logs = jnp.where(empty, settled[None, :], jnp.where(impossible, 0.0, logs))
    return Problem(logs, impossible.astype(jnp.float32), jnp.where(empty, 0, costs))


def only(budget: int) -> jax.Array:
    """Log-weights of the amounts spent, float32[S], that allow the whole budget alone."""
    return jnp.full(budget + 1, -jnp.inf, jnp.float32).at[budget].set(0.0)


@partial(jax.jit, static_argnames=("num_arms", "uniform", "budget"))
def only_choice(num_arms: int, uniform: int, bin_counts: jax.Array, budget: int) -> jax.Array:
    """Whether no bin with prompts can leave arm `uniform`; bool.

    The arms are 0 ... num_arms - 1 rollouts a prompt, bin_counts int32[B] prompts m_b, sum_b m_b uniform = budget. Of
    what can be spent only its being possible is asked, so the arms of a bin are joined by doubling, not one by one.
    """
    doublings, joined = [], 1
    while joined < num_arms:
        doublings.append(min(joined, num_arms - joined))
        joined += doublings[-1]
    before = jnp.zeros(budget + 1, bool)

    def spread(possible: jax.Array, count: jax.Array) -> jax.Array:
        def join(possible: jax.Array, more: jax.Array) -> tuple[jax.Array, None]:
            start = budget + 1 - jnp.minimum(more * count, budget + 1)
            shifted = jax.lax.dynamic_slice(jnp.concatenate([before, possible]), (start,), (budget + 1,))
            return possible | shifted, None

        return jax.lax.scan(join, possible, jnp.array(doublings, jnp.int32))[0]

    def step(carry: tuple[jax.Array, jax.Array], count: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        uniformly, otherwise = carry  # spent by the bins so far where all, and where not all, are at `uniform`
        leaves = jnp.arange(num_arms, dtype=jnp.int32) != uniform
        first = uniformly + count * jnp.arange(num_arms, dtype=jnp.int32)
        otherwise = spread(otherwise, count).at[first].max(leaves & (count > 0), mode="drop")
        return (uniformly + count * uniform, otherwise), None

    (_, otherwise), _ = jax.lax.scan(step, (jnp.zeros((), jnp.int32), before), bin_counts)
    return ~otherwise[budget]


@jax.jit
def best(problem: Problem, ends: jax.Array) -> Solution:
    """The most probable arms; `ends` float32[S] are log-weights of the total spent (-inf: not allowed)."""
    before, total = _forward(problem, ends.shape[0], "max")
    finished = _finished(total, ends)
    spent = jnp.argmax(finished).astype(jnp.int32)

    def back(left: jax.Array, item: tuple[Reach, Problem]) -> tuple[jax.Array, jax.Array]:
        reach, row = item
        arm = jnp.argmax(_candidates(reach, row, left)).astype(jnp.int32)
        return left - row.costs[arm], arm

    left, arms = jax.lax.scan(back, spent, (before, problem), reverse=True)
    feasible = jnp.isfinite(jnp.max(finished)) & (left == 0)
    return Solution(arms, jnp.zeros(arms.shape, jnp.float32), jnp.where(feasible, spent, -1))


@jax.jit
def draw(key: jax.Array, problem: Problem, ends: jax.Array) -> Solution:
    """Arms drawn from prod_b p_b conditioned on the total spent, weighted by exp(ends), with their exact marginals."""
    before, total = _forward(problem, ends.shape[0], "logsumexp")
    num_bins = problem.costs.shape[0]
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(num_bins + 1, dtype=jnp.uint32))
    finished = _finished(total, ends)
    spent = jax.random.categorical(keys[num_bins], finished).astype(jnp.int32)
    evidence = jax.nn.logsumexp(finished)

    def back(
        carry: tuple[jax.Array, Reach], item: tuple[Reach, Problem, jax.Array]
    ) -> tuple[tuple[jax.Array, Reach], tuple[jax.Array, jax.Array]]:
        left, after = carry
        reach, row, bin_key = item
        arm = jax.random.categorical(bin_key, _candidates(reach, row, left)).astype(jnp.int32)
        rest = _slices(after, row.costs[arm][None], ends.shape[0])[0]
        log_marginal = _log_total(reach, rest) + row.log_probs[arm] - evidence
        return (left - row.costs[arm], _back(after, row)), (
            arm,
            jnp.minimum(log_marginal, 0.0),
        )

    start = (spent, _after(ends))
    (left, _), (arms, logs) = jax.lax.scan(back, start, (before, problem, keys[:num_bins]), reverse=True)
    return Solution(arms, logs, jnp.where(jnp.isfinite(evidence) & (left == 0), spent, -1))


def _forward(problem: Problem, size: int, how: Literal["max", "logsumexp"]) -> tuple[Reach, Reach]:
    """What reaches every amount spent before each bin, [B, S] a leaf, and after all of them.

    Without arms of probability 0, the usual case, every rank is 0: the maximum then costs half as much.
    """
    nothing_spent = _padded(jnp.full(size, -jnp.inf, jnp.float32).at[0].set(0.0), after=False)
    room = nothing_spent.shape[0] // 2

    def values(padded: Tree) -> Tree:
        return jax.tree.map(lambda leaf: leaf[room : room + size], padded)

    def ranked(problem: Problem) -> tuple[Reach, Reach]:
        def step(padded: Reach, row: Problem) -> tuple[Reach, Reach]:
            joined = _in_blocks(padded, room - row.costs, lambda shifted: _combine(shifted, row, how))
            return _put(padded, joined, room), values(padded)

        total, before = jax.lax.scan(step, Reach(nothing_spent, nothing_spent), problem)
        return before, values(total)

    def plain(problem: Problem) -> tuple[Reach, Reach]:
        def step(padded: jax.Array, row: Problem) -> tuple[jax.Array, jax.Array]:
            def join(shifted: list[jax.Array]) -> jax.Array:
                return _total([logs + row.log_probs[arm] for arm, logs in enumerate(shifted)], how)

            return _put(padded, _in_blocks(padded, room - row.costs, join), room), values(padded)

        total, before = jax.lax.scan(step, nothing_spent, problem)
        return _ending(before), _ending(values(total))

    return jax.lax.cond(jnp.any(problem.impossible > 0), ranked, plain, problem)


def _ending(ends: jax.Array) -> Reach:
    """Log-values without arms of probability 0, with their ranks: the amounts allowed, as what follows the last bin."""
    return Reach(jnp.where(jnp.isfinite(ends), 0.0, -jnp.inf).astype(jnp.float32), ends)


def _after(ends: jax.Array) -> Reach:
    """What follows the last bin, padded."""
    return jax.tree.map(partial(_padded, after=True), _ending(ends))


def _back(after: Reach, row: Problem) -> Reach:
    """What follows a bin's predecessor, from what follows the bin; both padded."""
    return _put(after, _in_blocks(after, row.costs, lambda rest: _combine(rest, row, "logsumexp")), 0)


def _finished(total: Reach, ends: jax.Array) -> jax.Array:
    """Log-value of every total spent that is allowed and of the best rank, float32[S]."""
    return _best_rank(total.rank + _ending(ends).rank, total.logs + ends)


def _log_total(reach: Reach, rest: Reach) -> jax.Array:
    """Log of the total probability of joining what reaches an amount to what follows it, at the best rank."""
    return jax.nn.logsumexp(_best_rank(reach.rank + rest.rank, reach.logs + rest.logs))


def _best_rank(rank: jax.Array, logs: jax.Array) -> jax.Array:
    return jnp.where(rank == jnp.max(rank), logs, -jnp.inf)


def _padded(values: jax.Array, *, after: bool) -> jax.Array:
    """Values of the amounts from 0 up, to a whole number of blocks, with as many -inf before or after them."""
    size = values.shape[0]
    room = -(-size // _BLOCK) * _BLOCK if size > _BLOCK else size
    ends = (0, 2 * room - size) if after else (room, room - size)
    return jnp.pad(values, ends, constant_values=-jnp.inf)


def _put(padded: Tree, values: Tree, start: int) -> Tree:
    return jax.tree.map(lambda whole, part: jax.lax.dynamic_update_slice(whole, part, (start,)), padded, values)


def _slices(padded: Tree, starts: jax.Array, size: int) -> list[Tree]:
    """`size` values of every leaf from each of `starts` on."""

    def at(start: jax.Array) -> Tree:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice(leaf, (start,), (size,)), padded)

    return [at(starts[arm]) for arm in range(starts.shape[0])]


def _in_blocks(padded: Tree, starts: jax.Array, join: Callable[[list[Tree]], Tree]) -> Tree:
    """What `join` makes of the values from each of `starts` on, an arm each: half as many as `padded` holds.

    A block at a time: of slices this long, joined in one piece, XLA's code for a CPU handles one element after another.
    """
    room = jax.tree.leaves(padded)[0].shape[0] // 2
    block = min(_BLOCK, room)
    offsets = jnp.arange(0, room, block, dtype=jnp.int32)
    blocks = jax.lax.map(lambda offset: join(_slices(padded, starts + offset, block)), offsets)
    return jax.tree.map(lambda leaf: leaf.reshape(-1), blocks)


def _combine(shifted: list[Reach], row: Problem, how: Literal["max", "logsumexp"]) -> Reach:
    ranks = [values.rank - row.impossible[arm] for arm, values in enumerate(shifted)]
    top = reduce(jnp.maximum, ranks)
    terms = [
        jnp.where(rank == top, values.logs + row.log_probs[arm], -jnp.inf)
        for arm, (rank, values) in enumerate(zip(ranks, shifted, strict=True))
    ]
    return Reach(top, _total(terms, how))


def _total(terms: list[jax.Array], how: Literal["max", "logsumexp"]) -> jax.Array:
    peak = reduce(jnp.maximum, terms)
    if how == "max":
        return peak
    base = jnp.where(jnp.isfinite(peak), peak, 0.0)
    return base + jnp.log(reduce(operator.add, [jnp.exp(term - base) for term in terms]))


def _candidates(reach: Reach, row: Problem, left: jax.Array) -> jax.Array:
    """Log-value of each arm of the best rank as the last step to `left` spent, float32[A]."""
    start = left - row.costs
    rank, logs = (jnp.where(start >= 0, leaf[jnp.maximum(start, 0)], -jnp.inf) for leaf in reach)
    return _best_rank(rank - row.impossible, logs + row.log_probs)


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
    numbers = _checks.int_vector("arms", arms, shape[1])
    if not isinstance(numbers, jax.core.Tracer) and int(jnp.min(numbers)) < 0:
        raise _checks.reject("arms", numbers.tolist(), "counts >= 0")
    return counts, numbers, amount


def _raise_if_infeasible(spent: jax.Array, budget: int) -> None:
    if not isinstance(spent, jax.core.Tracer) and int(spent) != budget:
        raise ValueError(f"no choice of arms spends budget={budget} exactly over these bins")
