"""Rollout-GDRO: how many rollouts each prompt gets, by bin, under sum_i n_i = P * mean_rollouts exactly.

P prompts, B bins, A arms (the counts min_rollouts ... max_rollouts). Source: arXiv 2601.19280, Eqs. 20 and 21 and its
constrained selection. Full-information utilities, the exact conditional draw, whole rollouts per prompt and the relaxed
dual are this project's.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gdro_jax.controllers import _checks, allocation, utilities
from gdro_jax.controllers.prompt_gdro import bin_counts, bin_means, or_others_mean

_HUGE = 1e30  # scores are kept within it
_TIE = 1e-8  # among equally probable arms prefer the one nearest to the mean
_RARE = 1e-6  # smallest probability an observed loss is divided by


@dataclass(frozen=True)
class Config:
    """The rollout adversary.

    num_bins: B. mean_rollouts: n_bar, min_rollouts, max_rollouts: integers with 1 <= min <= mean <= max.
    step_size: eta of the exponential weights; without effect on the counts where the best of known losses are taken
        ("argmax" of a utility that sees every arm), which depend on the losses' order alone.
    exploration: gamma, mixed in wherever losses are seen for the played arm alone or arms are sampled; not otherwise.
    ema: beta of the scores and of the variances.
    dual_step_size: alpha_mu of Eq. 21; without effect under dual="exact", where the price never moves.
    utility: the loss of n rollouts. "surrogate": the bin's mean signal, -J as printed; "released": its negative, the
        released code's sign; "variance": v_b / n; "informative", "coverage": minus the posterior probability that n
        rollouts are not all alike, or that one is right. The last three see every arm at once.
    selection: "argmax" of sum_b log p_b(n_b), or an exact "sample" of prod_b p_b(n_b) given the budget.
    dual: "exact" moves the price by the realised mean (never, under an exact budget: report it); "relaxed" by the
        mean of the counts each bin would choose alone at that price, in units of the losses' mean slope. The price
        weighs in the arm distribution; it cancels from the per-prompt argmax of a utility that sees every arm.
    per_prompt: bins get the best counts within the budget, and what is left goes, one rollout each, to prompts of the
        bins that gain most. For the argmax of a utility that sees every arm (each is concave) both come from one
        list of marginal gains, which is the exact optimum over whole counts per prompt; else the bins' counts come
        from the dynamic programme over totals that leave less than one rollout per prompt of the largest bin. Under
        a bandit utility ("surrogate", "released") leftovers raise a prompt by one before any by two (two only where
        the bounds leave no other way to meet the budget). The loss observed is then that of the arm selected plus at
        most one rollout, and is credited to the arm selected: under "sample" the estimate for that arm, so played, is
        unbiased; it is not one of the arm's loss without leftovers. per_prompt=False has no such gap.
        False: one integer per bin, as published.

    Raises ValueError for a value that is not allowed.
    """

    num_bins: int
    mean_rollouts: int = 4
    min_rollouts: int = 2
    max_rollouts: int = 12
    step_size: float = 0.65
    exploration: float = 0.01
    ema: float = 0.4
    dual_step_size: float = 0.05
    utility: Literal["surrogate", "released", "variance", "informative", "coverage"] = "variance"
    selection: Literal["argmax", "sample"] = "argmax"
    dual: Literal["exact", "relaxed"] = "exact"
    per_prompt: bool = True

    def __post_init__(self) -> None:
        _checks.integer("num_bins", self.num_bins, 1)
        for field in ("mean_rollouts", "min_rollouts", "max_rollouts"):
            _checks.integer(field, getattr(self, field), 1)
        if self.min_rollouts > self.mean_rollouts:
            raise _checks.reject("min_rollouts", self.min_rollouts, f"at most mean_rollouts={self.mean_rollouts}")
        if self.max_rollouts < self.mean_rollouts:
            raise _checks.reject("max_rollouts", self.max_rollouts, f"at least mean_rollouts={self.mean_rollouts}")
        _checks.number("step_size", self.step_size, 0.0, open_high=True)
        _checks.number("exploration", self.exploration, 0.0, 1.0)
        _checks.number("ema", self.ema, 0.0, 1.0, open_low=True)
        _checks.number("dual_step_size", self.dual_step_size, 0.0, open_high=True)
        _checks.choice("utility", self.utility, ("surrogate", "released", *utilities.FULL_INFORMATION))
        _checks.choice("selection", self.selection, ("argmax", "sample"))
        _checks.choice("dual", self.dual, ("exact", "relaxed"))
        _checks.flag("per_prompt", self.per_prompt)

    @property
    def arms(self) -> tuple[int, ...]:
        """The counts a bin may be given."""
        return tuple(range(self.min_rollouts, self.max_rollouts + 1))

    @property
    def full_information(self) -> bool:
        """Whether the loss of every arm is known after a step, not of the played one alone."""
        return self.utility in utilities.FULL_INFORMATION


class State(NamedTuple):
    """The adversary's state; a pytree of arrays."""

    scores: jax.Array  # float32[B, A], EMA of the utility loss of each arm, without the price
    price: jax.Array  # float32, mu of Eq. 21
    variances: jax.Array  # float32[B], EMA of the within-prompt reward variance; its first value undamped
    step: jax.Array  # int32, updates that had any evidence
    visits: jax.Array  # int32[B], updates of the bin's scores
    variance_visits: jax.Array  # int32[B], updates of the bin's variance
    arm_losses: jax.Array  # float32[B, A], sum of share-weighted loss (estimates) of each arm
    mass: jax.Array  # float32[B], sum of the bins' shares
    played: jax.Array  # float32, sum of the realised losses
    forced: jax.Array  # int32, updates whose plan had no choice but uniform


class Plan(NamedTuple):
    """One step's allocation."""

    per_bin: jax.Array  # int32[B], the count of a bin's prompts, leftovers given to the whole bin included; some
    # prompts of one bin get one more. Under a bandit utility at most one above the arm selected, where that can be
    per_prompt: jax.Array  # int32[P], sums to P * mean_rollouts
    arm: jax.Array  # int32[B], index of the arm selected for the bin before leftovers: observed losses are its. That
    # of per_bin for the per-prompt argmax of a utility that sees every arm, which gives all rollouts as leftovers
    probability: jax.Array  # float32[B] of it, given the budget under "sample": what an observed loss is divided by
    weights: jax.Array  # float32[B], weight of a prompt of the bin in the objective, 1 unless asked otherwise
    forced_uniform: jax.Array  # int32, 1 if one integer per bin left no choice but uniform


def init(cfg: Config) -> State:
    """No scores yet: the first plan is uniform."""
    num_bins, num_arms = cfg.num_bins, len(cfg.arms)
    return State(
        scores=jnp.zeros((num_bins, num_arms), jnp.float32),
        price=jnp.zeros((), jnp.float32),
        variances=jnp.zeros(num_bins, jnp.float32),
        step=jnp.zeros((), jnp.int32),
        visits=jnp.zeros(num_bins, jnp.int32),
        variance_visits=jnp.zeros(num_bins, jnp.int32),
        arm_losses=jnp.zeros((num_bins, num_arms), jnp.float32),
        mass=jnp.zeros(num_bins, jnp.float32),
        played=jnp.zeros((), jnp.float32),
        forced=jnp.zeros((), jnp.int32),
    )


def log_arm_distribution(cfg: Config, state: State, weights: jax.Array | None = None) -> jax.Array:
    """log p_b(n) of the arm distribution at the current price, float32[B, A]; finite for any finite state."""
    logs = -jnp.clip(cfg.step_size * _losses(cfg, state, weights), -_HUGE, _HUGE)
    logs = jax.nn.log_softmax(logs, axis=1)
    if cfg.exploration == 0.0 or (cfg.full_information and cfg.selection == "argmax"):
        return jnp.maximum(logs, -_HUGE)
    return jnp.log((1.0 - cfg.exploration) * jnp.exp(logs) + cfg.exploration / len(cfg.arms))


def allocate(
    cfg: Config,
    state: State,
    bins: ArrayLike,
    key: jax.Array,
    *,
    bin_weights: jax.Array | None = None,
    prompt_ids: ArrayLike | None = None,
) -> Plan:
    """This step's counts: `bins` int[P], a jax random key.

    bin_weights float[B]: allocate for sum_b bin_weights_b L_b(n_b) instead of the mean over the batch's prompts.
    prompt_ids int[P]: distinct ids that break ties between prompts, so that a permuted batch gets the permuted plan;
        positions by default.

    Raises ValueError for wrong shapes and, outside jit, for a bin that is none of the B.
    """
    bins = _checks.bin_vector(bins, cfg.num_bins)
    prompts = bins.shape[0]
    ids = jnp.arange(prompts, dtype=jnp.int32) if prompt_ids is None else prompt_ids
    ids = _checks.int_vector("prompt_ids", ids, prompts)
    counts = bin_counts(cfg.num_bins, bins)
    weights = jnp.ones(cfg.num_bins, jnp.float32)
    if bin_weights is not None:
        shares = jnp.maximum(counts, 1).astype(jnp.float32) / prompts
        wanted = _checks.float_vector("bin_weights", bin_weights, cfg.num_bins)
        weights = jnp.where(counts > 0, wanted / shares, 0.0)
    logs = log_arm_distribution(cfg, state, weights)
    select_key, order_key, prompt_key = (jax.random.fold_in(key, purpose) for purpose in range(3))
    values = _values(cfg, state, weights, logs)
    solution, forced = _select(cfg, logs, counts, prompts, select_key)
    left = prompts * (cfg.mean_rollouts - cfg.min_rollouts) - jnp.sum(solution.arms * counts, dtype=jnp.int32)
    arms, one_more = solution.arms, jnp.zeros(prompts, jnp.int32)
    if cfg.per_prompt and len(cfg.arms) > 1:
        tie_break = jax.random.uniform(order_key, (cfg.num_bins,), jnp.float32)
        evenly = not cfg.full_information
        arms, split, some = utilities.marginal_gains(values, counts, solution.arms, left, tie_break, evenly=evenly)
        one_more = ((bins == split) & (_rank_in(bins == split, prompt_key, ids) < some)).astype(jnp.int32)
    selected = solution.arms
    if cfg.full_information and cfg.selection == "argmax" and cfg.per_prompt:
        selected = arms  # one list of marginal gains: nothing was selected before it
    drawn = jnp.take_along_axis(logs, selected[:, None], axis=1)[:, 0]
    return Plan(
        per_bin=cfg.min_rollouts + arms,
        per_prompt=cfg.min_rollouts + arms[bins] + one_more,
        arm=selected,
        probability=jnp.exp(solution.log_marginals if cfg.selection == "sample" else drawn),
        weights=weights,
        forced_uniform=forced,
    )


def update(
    cfg: Config,
    state: State,
    bins: ArrayLike,
    plan: Plan,
    signal: ArrayLike,
    reward_variance: ArrayLike,
    *,
    posterior: tuple[jax.Array, jax.Array] | None = None,
) -> State:
    """The state after a step: `signal` and `reward_variance` float[P] (unbiased); non-finite ones are left out.

    posterior: (alpha, beta) float[P] of each prompt's success rate, for "informative" and "coverage"; without it
    they are computed from the bin's variance. A bin without evidence keeps its scores and its variance.
    Raises ValueError as `allocate`.
    """
    bins = _checks.bin_vector(bins, cfg.num_bins)
    prompts = bins.shape[0]
    signal = _checks.float_vector("signal", signal, prompts)
    reward_variance = _checks.float_vector("reward_variance", reward_variance, prompts)
    reward_variance = jnp.where(jnp.isfinite(reward_variance), jnp.maximum(reward_variance, 0.0), jnp.nan)
    seen_variance, variance_count = bin_means(cfg.num_bins, bins, reward_variance)
    variances = _ema(cfg.ema, state.variances, seen_variance, state.variance_visits, variance_count > 0)
    if cfg.full_information:
        losses, count, valid = _seen_losses(cfg, bins, seen_variance, reward_variance, posterior)
        scores = _ema(cfg.ema, state.scores, losses, state.visits, count > 0)
        played_losses = losses[bins, jnp.clip(plan.per_prompt - cfg.min_rollouts, 0, len(cfg.arms) - 1)]
    else:
        mean, count = bin_means(cfg.num_bins, bins, signal)
        valid = jnp.isfinite(signal)
        mean = -mean if cfg.utility == "released" else mean
        played = plan.arm[:, None] == jnp.arange(len(cfg.arms), dtype=jnp.int32)[None, :]
        losses = jnp.where(played, (mean / jnp.maximum(plan.probability, _RARE))[:, None], 0.0)
        scores = jnp.where((count > 0)[:, None], (1.0 - cfg.ema) * state.scores + cfg.ema * losses, state.scores)
        played_losses = mean[bins]
    present = count > 0
    share = jnp.where(present, count / prompts, 0.0)
    any_evidence = jnp.any(present | (variance_count > 0))
    new = State(
        scores=jnp.clip(scores, -_HUGE, _HUGE),
        price=state.price,
        variances=variances,
        step=state.step + any_evidence.astype(jnp.int32),
        visits=state.visits + present.astype(jnp.int32),
        variance_visits=state.variance_visits + (variance_count > 0).astype(jnp.int32),
        arm_losses=jnp.clip(state.arm_losses + share[:, None] * losses, -_HUGE, _HUGE),
        mass=state.mass + share,
        played=jnp.clip(state.played + jnp.sum(jnp.where(valid, played_losses / prompts, 0.0)), -_HUGE, _HUGE),
        forced=state.forced + jnp.where(any_evidence, plan.forced_uniform, 0),
    )
    # Of whole numbers: compiled, a mean is a product with 1 / prompts, which need not come out whole.
    extra = jnp.sum(plan.per_prompt, dtype=jnp.int32) - prompts * cfg.mean_rollouts
    excess = extra.astype(jnp.float32) / prompts
    if cfg.dual == "relaxed":
        excess = _relaxed_excess(cfg, new, bins, plan.weights)
    moved = jnp.clip(state.price + cfg.dual_step_size * excess, -_HUGE, _HUGE)
    return new._replace(price=jnp.where(any_evidence, moved, state.price))


def _select(
    cfg: Config, logs: jax.Array, counts: jax.Array, prompts: int, key: jax.Array
) -> tuple[allocation.Solution, jax.Array]:
    """Arms per bin, and whether only uniform was possible."""
    extra = jnp.array(cfg.arms, jnp.int32) - cfg.min_rollouts
    budget = prompts * (cfg.mean_rollouts - cfg.min_rollouts)
    if cfg.selection == "argmax":
        far = (extra - (cfg.mean_rollouts - cfg.min_rollouts)).astype(jnp.float32) ** 2
        logs = logs - jnp.max(logs, axis=1, keepdims=True) - _TIE * far[None, :]
    free = jnp.zeros((), jnp.int32)
    if cfg.per_prompt and cfg.selection == "argmax" and cfg.full_information:
        nothing = jnp.zeros(cfg.num_bins, jnp.int32)
        return allocation.Solution(nothing, nothing.astype(jnp.float32), free), free
    if not cfg.per_prompt:
        forced = allocation.only_choice(len(cfg.arms), cfg.mean_rollouts - cfg.min_rollouts, counts, budget)
        forced = forced.astype(jnp.int32)
        ends = allocation.only(budget)
    else:
        forced = free
        unspent = budget - jnp.arange(budget + 1, dtype=jnp.int32)
        ends = jnp.where(unspent < jnp.maximum(jnp.max(counts), 1), 0.0, -jnp.inf).astype(jnp.float32)
    if cfg.selection == "sample":
        return allocation.draw(key, allocation.make_problem(logs, counts, extra, budget), ends), forced
    rows = counts[:, None].astype(jnp.float32) if cfg.per_prompt else 1.0
    return allocation.best(allocation.make_problem(rows * logs, counts, extra, budget), ends), forced


def _values(cfg: Config, state: State, weights: jax.Array, logs: jax.Array) -> jax.Array:
    """What a prompt of each bin gains by each arm, float32[B, A], up to one common factor: leftovers go by it.

    Minus the losses where all of them are known and the best are taken: log-probabilities would lose the small
    differences between high counts to rounding. The price is left out: it is the same for every way to spend a budget.
    """
    if not (cfg.full_information and cfg.selection == "argmax"):
        return logs
    losses = _losses(cfg, state._replace(price=jnp.zeros((), jnp.float32)), weights)
    span = jnp.max(jnp.max(losses, axis=1) - jnp.min(losses, axis=1))
    return -losses / jnp.where(span > 0, span, 1.0)


def _losses(cfg: Config, state: State, weights: jax.Array | None) -> jax.Array:
    """Loss of every arm at the current price (Eq. 20), float32[B, A]; a bin never seen is the others' mean."""
    scores = jnp.clip(state.scores, -_HUGE, _HUGE)
    if cfg.full_information:
        scores = or_others_mean(scores, state.visits)
    if weights is not None:
        scores = scores * weights[:, None]
    arms = jnp.array(cfg.arms, jnp.float32)[None, :]
    return jnp.clip(scores, -_HUGE, _HUGE) + jnp.clip(state.price, -_HUGE, _HUGE) * arms


def _relaxed_excess(cfg: Config, state: State, bins: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean count that bins would choose alone at this price, minus n_bar, in units of the losses' mean slope."""
    shares = bin_counts(cfg.num_bins, bins).astype(jnp.float32) / bins.shape[0]
    chosen = jnp.array(cfg.arms, jnp.float32)[jnp.argmin(_losses(cfg, state, weights), axis=1)]
    scores = state.scores * weights[:, None]
    slope = (jnp.max(scores, axis=1) - jnp.min(scores, axis=1)) / max(len(cfg.arms) - 1, 1)
    return jnp.sum(shares * slope) * (jnp.sum(shares * chosen) - cfg.mean_rollouts)


def _seen_losses(
    cfg: Config,
    bins: jax.Array,
    variances: jax.Array,
    reward_variance: jax.Array,
    posterior: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """This step's loss of every arm, float32[B, A], the number of prompts behind it, float32[B], and which, bool[P]."""
    if cfg.utility == "variance" or posterior is None:
        valid = jnp.isfinite(reward_variance)
        count = jnp.zeros(cfg.num_bins, jnp.float32).at[bins].add(valid.astype(jnp.float32))
        if cfg.utility == "variance":
            return utilities.variance_loss(variances, cfg.arms), count, valid
        return utilities.plug_in_loss(cfg.utility, variances, cfg.arms), count, valid
    alpha, failures = (_checks.float_vector("posterior", value, bins.shape[0]) for value in posterior)
    valid = jnp.isfinite(alpha) & jnp.isfinite(failures)
    table = utilities.posterior_loss(
        cfg.utility, jnp.where(valid, alpha, 1.0), jnp.where(valid, failures, 1.0), cfg.arms
    )
    count = jnp.zeros(cfg.num_bins, jnp.float32).at[bins].add(valid.astype(jnp.float32))
    total = jnp.zeros((cfg.num_bins, len(cfg.arms)), jnp.float32).at[bins].add(jnp.where(valid[:, None], table, 0.0))
    return total / jnp.maximum(count, 1.0)[:, None], count, valid


def _ema(rate: float, old: jax.Array, seen: jax.Array, visits: jax.Array, present: jax.Array) -> jax.Array:
    """EMA along bins whose first value is taken as it is; `old` and `seen` float32[B] or [B, A]."""
    shape = (-1,) + (1,) * (old.ndim - 1)
    new = jnp.where((visits > 0).reshape(shape), (1.0 - rate) * old + rate * seen, seen)
    return jnp.where(present.reshape(shape), new, old)


def _rank_in(member: jax.Array, key: jax.Array, ids: jax.Array) -> jax.Array:
    """Random rank of each member among the members, by key and id alone; int32[P]."""
    bits = jax.vmap(lambda index: jax.random.bits(jax.random.fold_in(key, index), (), jnp.uint32))(ids)
    position = jnp.arange(ids.shape[0], dtype=jnp.int32)
    order = jax.lax.sort(((~member).astype(jnp.int32), bits, ids, position), num_keys=3)[3]
    return jnp.zeros(ids.shape[0], jnp.int32).at[order].set(position)
