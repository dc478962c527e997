"""One interface for every rule: which prompts, what weight, how many rollouts.

C candidates, P prompts, B bins. A rule is a NamedTuple of pure functions, as an optax transformation is. The rules here
are made of the same three parts: the difficulty classifier, and one, both or none of the two adversaries.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gdro_jax.controllers import _checks, beta, difficulty, prompt_gdro, reporting, rollout_gdro

SIGNALS = ("error", "surrogate", "pass_error")


class Plan(NamedTuple):
    """What one step does; a pytree of arrays."""

    prompt_ids: jax.Array  # int32[P]
    bins: jax.Array  # int32[P], fixed for the step
    weights: jax.Array  # float32[P], what the advantages of the prompt's rows are multiplied by
    rollouts: jax.Array  # int32[P], sums to P * mean_rollouts
    allocation: rollout_gdro.Plan | None = None  # what the rollout adversary chose, for its feedback
    lender: jax.Array | None = None  # int32[B], under shuffle="weights": the bin whose weight each bin gets


class Outcome(NamedTuple):
    """What came of a plan; arrays [P]. Unscorable rollouts count nowhere but in `num_unscorable`."""

    num_correct: ArrayLike  # int, right rollouts; clipped to 0 ... num_rollouts
    num_rollouts: ArrayLike  # int, scored rollouts; 0 leaves every state as it is for this prompt
    num_unscorable: ArrayLike  # int, rollouts the verifier failed on
    signal: ArrayLike  # float, surrogate loss of Eq. 7; non-finite entries are left out
    reward_variance: ArrayLike  # float, unbiased variance of the prompt's rewards; non-finite entries are left out


class State(NamedTuple):
    """A rule's state; a pytree of arrays. Parts that the rule does not have are None."""

    difficulty: difficulty.State
    prompt: prompt_gdro.State | None
    rollout: rollout_gdro.State | None


class Rule(NamedTuple):
    """Pure functions; see `compose`. Keys are jax random keys; every function may be jitted, vmapped or scanned."""

    init: Callable[[jax.Array], State]
    plan: Callable[[State, ArrayLike, jax.Array], tuple[Plan, State]]
    update: Callable[[State, Plan, Outcome], State]
    metrics: Callable[[State, Plan], dict[str, jax.Array]]
    reweigh: Callable[[State, Plan], jax.Array]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a rule made of the three parts is told.

    signal: what the prompt adversary sees: "error" (1 - mean reward), "pass_error" (1 - pass@k) or "surrogate"
        (`Outcome.signal`). The pass@k is the Beta posterior's after the step, whatever n was: an estimate from the
        step's n rollouts alone is unbiased only for n >= k, and below that makes a bin look worse for its small n. It
        remembers about `difficulty.window` visits. The rollout adversary's surrogate utilities see `Outcome.signal`.
    use_current_batch: weights come from the state after the batch: call `Rule.reweigh` after `Rule.update`; a
        shuffle of the weights stays the plan's.
    shuffle: a control: "weights" shuffled over the bins of the step, "budgets" over its prompts, or None.

    Raises ValueError for a value that is not allowed.
    """

    num_prompts: int
    prompts_per_step: int
    mean_rollouts: int
    difficulty: difficulty.Config
    prompt: prompt_gdro.Config | None = None
    rollout: rollout_gdro.Config | None = None
    signal: Literal["error", "surrogate", "pass_error"] = "error"
    use_current_batch: bool = False
    shuffle: Literal["weights", "budgets"] | None = None

    def __post_init__(self) -> None:
        for field in ("num_prompts", "prompts_per_step", "mean_rollouts"):
            _checks.integer(field, getattr(self, field), 1)
        if self.prompts_per_step > self.num_prompts:
            raise _checks.reject("prompts_per_step", self.prompts_per_step, f"at most num_prompts={self.num_prompts}")
        for name, part in (("prompt", self.prompt), ("rollout", self.rollout)):
            if part is not None and part.num_bins != self.difficulty.num_bins:
                allowed = f"{self.difficulty.num_bins}, that of difficulty"
                raise _checks.reject(f"{name}.num_bins", part.num_bins, allowed)
        if self.rollout is not None and self.rollout.mean_rollouts != self.mean_rollouts:
            allowed = f"mean_rollouts={self.mean_rollouts}"
            raise _checks.reject("rollout.mean_rollouts", self.rollout.mean_rollouts, allowed)
        shuffles = {"weights": self.prompt, "budgets": self.rollout}
        if self.shuffle is not None and shuffles.get(self.shuffle) is None:
            allowed = "None, 'weights' with a prompt adversary or 'budgets' with a rollout adversary"
            raise _checks.reject("shuffle", self.shuffle, allowed)
        _checks.choice("signal", self.signal, SIGNALS)
        _checks.flag("use_current_batch", self.use_current_batch)


@functools.lru_cache(maxsize=64)  # equal configurations have the same functions, which jit compiles once
def compose(cfg: Config) -> Rule:
    """The rule that `cfg` describes.

    init(key) -> state.
    plan(state, candidate_ids int[C >= P] in data order, key) -> (plan, state): the first P, whose ids must be distinct
        (ValueError outside jit).
    update(state, plan, outcome) -> state.
    metrics(state, plan) -> flat dict of scalars and [B] arrays.
    reweigh(state, plan) -> float32[P], the weights from the state given, for `use_current_batch`; else plan.weights.
    """

    def init(key: jax.Array) -> State:
        del key  # nothing random is needed before the first plan
        return State(
            difficulty.init(cfg.difficulty, cfg.num_prompts),
            None if cfg.prompt is None else prompt_gdro.init(cfg.prompt),
            None if cfg.rollout is None else rollout_gdro.init(cfg.rollout),
        )

    def plan(state: State, candidate_ids: ArrayLike, key: jax.Array) -> tuple[Plan, State]:
        ids = _checks.int_vector("candidate_ids", candidate_ids)
        if ids.shape[0] < cfg.prompts_per_step:
            raise _checks.reject("len(candidate_ids)", ids.shape[0], f"at least {cfg.prompts_per_step}")
        ids = _checks.id_vector("candidate_ids", ids[: cfg.prompts_per_step], cfg.num_prompts)
        bins = difficulty.bins(cfg.difficulty, state.difficulty, ids)
        weight_key, rollout_key, shuffle_key = (jax.random.fold_in(key, purpose) for purpose in range(3))
        lender = _lenders(cfg.difficulty.num_bins, bins, weight_key) if cfg.shuffle == "weights" else None
        weights = _weights(cfg, state, bins, lender)
        chosen = _allocate(cfg, state, bins, ids, rollout_key)
        rollouts = jnp.full(ids.shape, cfg.mean_rollouts, jnp.int32) if chosen is None else chosen.per_prompt
        if cfg.shuffle == "budgets":
            rollouts = _shuffled(rollouts, ids, shuffle_key)
        return Plan(ids, bins, weights, rollouts, chosen, lender), state

    def update(state: State, plan: Plan, outcome: Outcome) -> State:
        seen = _scored(outcome, plan.prompt_ids.shape[0])
        ids, bins = plan.prompt_ids, plan.bins
        levels = difficulty.update(cfg.difficulty, state.difficulty, ids, seen.num_correct, seen.num_rollouts)
        prompt, rollout = state.prompt, state.rollout
        posterior = difficulty.posterior(cfg.difficulty, levels, ids)
        if cfg.prompt is not None and prompt is not None:
            prompt = prompt_gdro.update(cfg.prompt, prompt, bins, _signal(cfg, seen, posterior))
        if cfg.rollout is not None and rollout is not None and plan.allocation is not None:
            known = jnp.asarray(seen.num_rollouts) > 0
            rollout = rollout_gdro.update(
                cfg.rollout,
                rollout,
                bins,
                plan.allocation._replace(per_prompt=plan.rollouts),
                seen.signal,
                _variance(cfg.rollout, seen, posterior),
                posterior=(jnp.where(known, posterior[0], jnp.nan), jnp.where(known, posterior[1], jnp.nan)),
            )
        return State(levels, prompt, rollout)

    def metrics(state: State, plan: Plan) -> dict[str, jax.Array]:
        out = reporting.step(cfg.difficulty.num_bins, plan.bins, plan.weights, plan.rollouts)
        if cfg.prompt is not None and state.prompt is not None:
            out |= reporting.prompt_adversary(cfg.prompt, state.prompt, out["share"])
        if cfg.rollout is not None and state.rollout is not None and plan.allocation is not None:
            out |= reporting.rollout_adversary(cfg.rollout, state.rollout, plan.allocation, out)
        return out

    def reweigh(state: State, plan: Plan) -> jax.Array:
        return _weights(cfg, state, plan.bins, plan.lender) if cfg.use_current_batch else plan.weights

    return Rule(init, plan, update, metrics, reweigh)


def _weights(cfg: Config, state: State, bins: jax.Array, lender: jax.Array | None) -> jax.Array:
    if cfg.prompt is None or state.prompt is None:
        return jnp.ones(bins.shape, jnp.float32)
    lent = state.prompt
    if lender is not None:
        lent = lent._replace(scores=lent.scores[lender], visits=lent.visits[lender])
    return prompt_gdro.weights(cfg.prompt, lent, bins)


def _lenders(num_bins: int, bins: jax.Array, key: jax.Array) -> jax.Array:
    """A random permutation of the bins present in the batch, and one of the others; int32[B]."""
    present = prompt_gdro.bin_counts(num_bins, bins) > 0
    draws = jax.random.uniform(key, present.shape, jnp.float32)
    shuffled = jnp.argsort(jnp.where(present, draws, 2.0))  # the bins present, in random order, then the others
    in_order = jnp.argsort(~present, stable=True)
    return jnp.zeros(present.shape, jnp.int32).at[in_order].set(shuffled.astype(jnp.int32))


def _allocate(cfg: Config, state: State, bins: jax.Array, ids: jax.Array, key: jax.Array) -> rollout_gdro.Plan | None:
    if cfg.rollout is None or state.rollout is None:
        return None
    q = None
    if cfg.prompt is not None and state.prompt is not None:  # both adversaries play one game: sum_b q_b L_b(n_b)
        present = prompt_gdro.bin_counts(cfg.prompt.num_bins, bins) > 0
        q = prompt_gdro.distribution_among(cfg.prompt, state.prompt, present)
    return rollout_gdro.allocate(cfg.rollout, state.rollout, bins, key, bin_weights=q, prompt_ids=ids)


def _shuffled(rollouts: jax.Array, ids: jax.Array, key: jax.Array) -> jax.Array:
    """The same counts given to prompts in an order that depends on the key and the ids alone."""
    bits = jax.vmap(lambda index: jax.random.bits(jax.random.fold_in(key, index), (), jnp.uint32))(ids)
    order = jax.lax.sort((bits, ids, jnp.arange(ids.shape[0], dtype=jnp.int32)), num_keys=2)[2]
    return jnp.zeros_like(rollouts).at[order].set(jnp.sort(rollouts))


def _scored(outcome: Outcome, prompts: int) -> Outcome:
    """The outcome with checked shapes, 0 <= num_correct <= num_rollouts, and NaN where no rollout was scored."""
    n = _checks.int_vector("num_rollouts", outcome.num_rollouts, prompts)
    signal = _checks.float_vector("signal", outcome.signal, prompts)
    variance = _checks.float_vector("reward_variance", outcome.reward_variance, prompts)
    return Outcome(
        jnp.clip(_checks.int_vector("num_correct", outcome.num_correct, prompts), 0, jnp.maximum(n, 0)),
        n,
        _checks.int_vector("num_unscorable", outcome.num_unscorable, prompts),
        jnp.where(n > 0, signal, jnp.nan),
        jnp.where(n > 0, variance, jnp.nan),
    )


def _variance(cfg: rollout_gdro.Config, seen: Outcome, posterior: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The prompts' reward variances; where a plan may give one rollout, which shows none, the posterior's stands in.

    Without it a bin at one rollout could never again show a variance, and would stay there. E[p (1 - p)] is that of
    rewards 0 and 1. Rules that give everyone two rollouts or more leave such prompts out.
    """
    given = jnp.asarray(seen.reward_variance)
    if cfg.min_rollouts > 1:
        return given
    alpha, failures = posterior
    total = alpha + failures
    expected = (alpha / total) * (failures / (total + 1.0))
    return jnp.where((jnp.asarray(seen.num_rollouts) == 1) & ~jnp.isfinite(given), expected, given)


def _signal(cfg: Config, seen: Outcome, posterior: tuple[jax.Array, jax.Array]) -> jax.Array:
    c, n = jnp.asarray(seen.num_correct), jnp.asarray(seen.num_rollouts)
    if cfg.signal == "surrogate":
        return jnp.asarray(seen.signal)
    if cfg.signal == "pass_error":
        return jnp.where(n > 0, 1.0 - beta.pass_at_k(*posterior, cfg.difficulty.k), jnp.nan)
    return jnp.where(n > 0, 1.0 - c.astype(jnp.float32) / jnp.maximum(n, 1).astype(jnp.float32), jnp.nan)
