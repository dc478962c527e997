"""Online difficulty classifier: which bin each prompt is in, from what its own rollouts showed.

N prompts in the data set, P prompts in a call, B bins, H the window. Bin 0 is the hardest. Source: arXiv 2601.19280,
Eq. 10 and the hysteresis around it; the statistics `pass_at_k` and `beta` are this project's.

The statistic matters: "any of n was right" (`any`, as published) rises with n, so a bin that an allocator gives more
rollouts looks easier because it got more. `pass_at_k` and `beta` estimate pass@k for one fixed k whatever n was. An
unbiased estimator of it needs n >= k; below that `pass_at_k` takes the Beta posterior's pass@k instead, which leans to
the prompt's past and to the prior but does not rise with n. `controllers.make` does not accept `pass_at_k` with a k
above the fewest rollouts a prompt can get.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gdro_jax.controllers import _checks, beta

_SLACK = 1e-6  # an estimate this little below a boundary counts as on it: 3/10 is not below 0.3


@dataclass(frozen=True)
class Config:
    """How prompts are classified.

    edges: increasing boundaries a_0 < ... inside (0, 1); bin b is [a_{b-1}, a_b), the last closed on the right.
    window: H, visits. `any` and `pass_at_k` average the last H outcomes; under `beta` a visit's evidence is multiplied
        by 1 - 1/H at each later visit, so that evidence of about H visits is in force.
    hysteresis: how far past the boundary an estimate must be for the prompt to leave its bin, but never past 0 or 1, so
        that every bin can be reached (not used by `beta`).
    statistic: "any", "pass_at_k" or "beta".
    k: the k of pass@k, for `pass_at_k` and `beta`, and for the prior of unseen prompts.
    unseen: where a prompt without outcomes sits: "hardest" (rate 0, as released) or "prior" (predictive pass@k).
    prior: (alpha, beta) of the Beta prior over the success rate.
    credible: mass of the credible interval that must have left the bin before a prompt moves, for `beta`.

    Raises ValueError for a value that is not allowed.
    """

    edges: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    window: int = 100
    hysteresis: float = 0.03
    statistic: Literal["any", "pass_at_k", "beta"] = "any"
    k: int = 8
    unseen: Literal["hardest", "prior"] = "prior"
    prior: tuple[float, float] = (0.5, 0.5)
    credible: float = 0.8

    def __post_init__(self) -> None:
        for field in ("edges", "prior"):
            if isinstance(getattr(self, field), (list, np.ndarray)):
                object.__setattr__(self, field, tuple(float(value) for value in getattr(self, field)))
        if not isinstance(self.edges, tuple):
            raise _checks.reject("edges", self.edges, "a tuple of numbers")
        for edge in self.edges:
            _checks.number("edges", edge, 0.0, 1.0, open_low=True, open_high=True)
        if any(low >= high for low, high in zip(self.edges[:-1], self.edges[1:], strict=True)):
            raise _checks.reject("edges", self.edges, "strictly increasing")
        _checks.integer("window", self.window, 1)
        _checks.number("hysteresis", self.hysteresis, 0.0, 1.0, open_high=True)
        _checks.choice("statistic", self.statistic, ("any", "pass_at_k", "beta"))
        _checks.integer("k", self.k, 1)
        _checks.choice("unseen", self.unseen, ("hardest", "prior"))
        if not isinstance(self.prior, tuple) or len(self.prior) != 2:
            raise _checks.reject("prior", self.prior, "a pair of positive numbers (alpha, beta)")
        for value in self.prior:
            _checks.number("prior", value, 0.0, open_low=True, open_high=True)
        _checks.number("credible", self.credible, 0.0, 1.0, open_low=True, open_high=True)

    @property
    def num_bins(self) -> int:
        """B, one more than there are edges."""
        return len(self.edges) + 1


class State(NamedTuple):
    """What is known of each prompt; a pytree of arrays."""

    history: jax.Array  # [N, H] ring of outcomes, uint8 for `any`, float32 for `pass_at_k`; [N, 0] for `beta`
    visits: jax.Array  # int32[N] visits with at least one scored rollout
    successes: jax.Array  # float32[N] right rollouts, with forgetting
    failures: jax.Array  # float32[N] wrong rollouts, with forgetting
    bin: jax.Array  # int32[N] the bin since the last visit; meaningless before the first


def init(cfg: Config, num_prompts: int) -> State:
    """The state before any outcome, for ids 0 ... num_prompts - 1. Raises ValueError if num_prompts < 1."""
    _checks.integer("num_prompts", num_prompts, 1)
    dtype = jnp.uint8 if cfg.statistic == "any" else jnp.float32
    return State(
        history=jnp.zeros((num_prompts, 0 if cfg.statistic == "beta" else cfg.window), dtype),
        visits=jnp.zeros(num_prompts, jnp.int32),
        successes=jnp.zeros(num_prompts, jnp.float32),
        failures=jnp.zeros(num_prompts, jnp.float32),
        bin=jnp.zeros(num_prompts, jnp.int32),
    )


def bins(cfg: Config, state: State, prompt_ids: ArrayLike) -> jax.Array:
    """Bins of the prompts, int32[P]; 0 is the hardest. An id outside the data set is treated as never seen."""
    rows = _rows(state, _checks.int_vector("prompt_ids", prompt_ids))
    return jnp.where(rows.visits > 0, rows.bin, bin_of(cfg, _unseen_rate(cfg, rows.visits)))


def pass_rate(cfg: Config, state: State, prompt_ids: ArrayLike) -> jax.Array:
    """The statistic that is binned, float32[P] in [0, 1]."""
    rows = _rows(state, _checks.int_vector("prompt_ids", prompt_ids))
    return jnp.where(rows.visits > 0, _estimate(cfg, rows), _unseen_rate(cfg, rows.visits))


def posterior(cfg: Config, state: State, prompt_ids: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Beta posterior (alpha, beta) of each prompt's success rate, float32[P] each; kept under every statistic."""
    return _posterior(cfg, _rows(state, _checks.int_vector("prompt_ids", prompt_ids)))


def credible_interval(cfg: Config, state: State, prompt_ids: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Ends of the credible interval of the pass@k 1 - (1-p)^k that holds `cfg.credible` mass, float32[P] each."""
    low, high = beta.interval(*posterior(cfg, state, prompt_ids), cfg.credible)
    return -jnp.expm1(cfg.k * jnp.log1p(-low)), -jnp.expm1(cfg.k * jnp.log1p(-high))


def update(cfg: Config, state: State, prompt_ids: ArrayLike, num_correct: ArrayLike, num_rollouts: ArrayLike) -> State:
    """The state after a step's outcomes, int32[P] each: `num_correct` right of `num_rollouts` scored rollouts.

    An id may not repeat in one call: a ValueError outside jit; inside, one of its outcomes would be lost. A prompt with
    no scored rollout, or an id outside the data set, changes nothing.
    """
    ids = _checks.id_vector("prompt_ids", prompt_ids, state.visits.shape[0])
    n = _checks.int_vector("num_rollouts", num_rollouts, ids.shape[0])
    c = jnp.clip(_checks.int_vector("num_correct", num_correct, ids.shape[0]), 0, jnp.maximum(n, 0))
    old = _rows(state, ids)
    decay = 1.0 - 1.0 / cfg.window
    slot = old.visits % cfg.window
    new = State(
        history=old.history,
        visits=old.visits + 1,
        successes=decay * old.successes + c.astype(jnp.float32),
        failures=decay * old.failures + (n - c).astype(jnp.float32),
        bin=old.bin,
    )
    outcome = _outcome(cfg, new, c, n).astype(old.history.dtype)
    here = jnp.arange(old.history.shape[1], dtype=jnp.int32)[None, :] == slot[:, None]
    new = new._replace(history=jnp.where(here, outcome[:, None], old.history))
    where = jnp.where((n > 0) & (ids >= 0), ids, state.visits.shape[0])
    history = state.history
    if cfg.statistic != "beta":
        history = history.at[where, slot].set(outcome, mode="drop")
    return State(
        history=history,
        visits=state.visits.at[where].set(new.visits, mode="drop"),
        successes=state.successes.at[where].set(new.successes, mode="drop"),
        failures=state.failures.at[where].set(new.failures, mode="drop"),
        bin=state.bin.at[where].set(_moved(cfg, new, first=old.visits == 0), mode="drop"),
    )


def bin_of(cfg: Config, rate: jax.Array) -> jax.Array:
    """The bin that holds each rate, without hysteresis; int32 of the shape of `rate`."""
    edges = np.array(cfg.edges)
    reached = jnp.array(edges - _slack(cfg), jnp.float32).reshape((1,) * rate.ndim + (-1,))
    return jnp.sum(rate[..., None] >= reached, axis=-1, dtype=jnp.int32)


def unbiased_pass_at_k(num_correct: jax.Array, num_rollouts: jax.Array, k: int) -> jax.Array:
    """1 - C(n-c, k)/C(n, k) in log space where n >= k, float32[P]; NaN where n < k: no unbiased estimator exists."""
    n = jnp.asarray(num_rollouts).astype(jnp.float32)[:, None]
    c = jnp.asarray(num_correct).astype(jnp.float32)[:, None]
    drawn = jnp.arange(k, dtype=jnp.float32)[None, :]
    ratio = c / jnp.maximum(n - drawn, 1.0)
    log_all_wrong = jnp.sum(jnp.log1p(-jnp.minimum(ratio, 1.0)), axis=1)
    return jnp.where(n[:, 0] >= k, -jnp.expm1(log_all_wrong), jnp.nan)


def _slack(cfg: Config) -> np.ndarray:
    """How far below an edge an estimate still counts as on it; at most half of the bin below."""
    return np.minimum(_SLACK, np.diff(np.array([0.0, *cfg.edges])) / 2.0)


def _rows(state: State, ids: jax.Array) -> State:
    where = jnp.where(ids < 0, state.visits.shape[0], ids)
    return State(*(leaf.at[where].get(mode="fill", fill_value=0) for leaf in state))


def _outcome(cfg: Config, rows: State, c: jax.Array, n: jax.Array) -> jax.Array:
    """The outcome of one visit, float32[P]; Eq. 10's indicator for `any`. The rows' evidence includes this visit's."""
    if cfg.statistic == "pass_at_k":
        return jnp.where(n >= cfg.k, unbiased_pass_at_k(c, n, cfg.k), beta.pass_at_k(*_posterior(cfg, rows), cfg.k))
    return (c > 0).astype(jnp.float32)


def _estimate(cfg: Config, rows: State) -> jax.Array:
    if cfg.statistic == "beta":
        return beta.pass_at_k(*_posterior(cfg, rows), cfg.k)
    seen = jnp.clip(rows.visits, 1, cfg.window).astype(jnp.float32)
    return jnp.sum(rows.history, axis=1, dtype=jnp.float32) / seen


def _posterior(cfg: Config, rows: State) -> tuple[jax.Array, jax.Array]:
    return cfg.prior[0] + rows.successes, cfg.prior[1] + rows.failures


def _unseen_rate(cfg: Config, like: jax.Array) -> jax.Array:
    if cfg.unseen == "hardest":
        return jnp.zeros(like.shape, jnp.float32)
    alpha, failures = (jnp.full(like.shape, value, jnp.float32) for value in cfg.prior)
    return beta.pass_at_k(alpha, failures, cfg.k)


def _moved(cfg: Config, rows: State, first: jax.Array) -> jax.Array:
    """Bins after a visit: straight to the estimate's bin at the first, later only past the boundary of the old one."""
    rate = _estimate(cfg, rows)
    target = bin_of(cfg, rate)
    rises = target > rows.bin
    edges = np.array((0.0, *cfg.edges, 1.0))  # the bin b lies between edges[b] and edges[b + 1]
    if cfg.statistic == "beta":
        rates = jnp.array([beta.rate_of_pass(edge, cfg.k) for edge in edges[:-1]] + [1.0], jnp.float32)
        under = beta.below(*_posterior(cfg, rows), rates[rows.bin + rises.astype(jnp.int32)])
        leaves = jnp.where(rises, under, 1.0 - under) < (1.0 - cfg.credible) / 2.0
    else:
        slack = np.array([0.0, *_slack(cfg), 0.0])
        ceiling = jnp.array(np.minimum(edges[1:] + cfg.hysteresis, 1.0) - slack[1:], jnp.float32)[rows.bin]
        floor = jnp.array(np.maximum(edges[:-1] - cfg.hysteresis, 0.0) + slack[:-1], jnp.float32)[rows.bin]
        leaves = jnp.where(rises, rate >= ceiling, rate <= floor)
    return jnp.where(first | ((target != rows.bin) & leaves), target, rows.bin)
