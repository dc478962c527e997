"""Prompt-GDRO: an adversary over difficulty bins that weighs the prompts of bins with a high loss up.

P prompts, B bins. Source: arXiv 2601.19280, Eqs. 12 to 16 (GDRO-EXP3P of arXiv 2212.13669 with full information over
the bins that are in the batch).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from gdro_jax.controllers import _checks

_HUGE = 1e30  # larger magnitudes are clipped to it, so that sums and products of finite numbers stay finite
_LOG_MAX = 80.0  # log of the largest weight when there is no cap


@dataclass(frozen=True)
class Config:
    """The prompt adversary.

    num_bins: B. step_size: eta_q of Eq. 14. ema: beta of Eq. 12. exploration: gamma of Eq. 15.
    score_clip: C of Eq. 14; None or inf is off. weight_cap: omega_max of Eq. 16; None is off.
    divide_by_share: divide a bin's loss by max(its share of the batch, share_floor).
    ema_debias: divide a score by 1 - (1 - ema)^visits, as Adam does; a bin never visited takes the others' mean.
    weights: "published" (omega, capped), "released" (q over the bins of the batch, capped) or "batch_mean_one" (omega,
        capped, divided by its batch mean).

    Raises ValueError for a value that is not allowed.
    """

    num_bins: int
    step_size: float = 0.65
    ema: float = 0.12
    exploration: float = 0.01
    score_clip: float | None = 5.0
    weight_cap: float | None = 15.0
    divide_by_share: bool = False
    share_floor: float = 0.05
    ema_debias: bool = True
    weights: Literal["published", "released", "batch_mean_one"] = "batch_mean_one"

    def __post_init__(self) -> None:
        _checks.integer("num_bins", self.num_bins, 1)
        _checks.number("step_size", self.step_size, 0.0, open_high=True)
        _checks.number("ema", self.ema, 0.0, 1.0, open_low=True)
        _checks.number("exploration", self.exploration, 0.0, 1.0)
        if self.score_clip is not None:
            _checks.number("score_clip", self.score_clip, 0.0, open_low=True)
        if self.weight_cap is not None:
            _checks.number("weight_cap", self.weight_cap, 0.0, open_low=True)
        _checks.flag("divide_by_share", self.divide_by_share)
        _checks.number("share_floor", self.share_floor, 0.0, 1.0, open_low=True)
        _checks.flag("ema_debias", self.ema_debias)
        _checks.choice("weights", self.weights, ("published", "released", "batch_mean_one"))


class State(NamedTuple):
    """The adversary's state; a pytree of arrays."""

    scores: jax.Array  # float32[B], S of Eq. 12, before `ema_debias`
    visits: jax.Array  # int32[B], steps in which the bin had a signal
    step: jax.Array  # int32, updates that had a signal
    regret: jax.Array  # float32[B], sum over the bin's visits of its loss minus the loss under q over the bins present


def init(cfg: Config) -> State:
    """Scores 0: q is uniform."""
    return State(
        scores=jnp.zeros(cfg.num_bins, jnp.float32),
        visits=jnp.zeros(cfg.num_bins, jnp.int32),
        step=jnp.zeros((), jnp.int32),
        regret=jnp.zeros(cfg.num_bins, jnp.float32),
    )


def distribution(cfg: Config, state: State) -> jax.Array:
    """q of Eq. 15, float32[B]: exponential weights mixed with the uniform distribution; finite for any finite S."""
    return (1.0 - cfg.exploration) * jax.nn.softmax(log_omega(cfg, state)) + cfg.exploration / cfg.num_bins


def distribution_among(cfg: Config, state: State, present: jax.Array) -> jax.Array:
    """q over the bins present alone, float32[B]; 0 if none is. `present` bool[B].

    Of their own softmax where nothing is mixed in: beside a far larger weight of an absent bin theirs may all be 0.
    """
    if cfg.exploration == 0.0:
        return jnp.where(present, jax.nn.softmax(jnp.where(present, log_omega(cfg, state), -2.0 * _HUGE)), 0.0)
    q = jnp.where(present, distribution(cfg, state), 0.0)
    return q / jnp.maximum(jnp.sum(q), jnp.finfo(jnp.float32).tiny)


def weights(cfg: Config, state: State, bins: ArrayLike) -> jax.Array:
    """What the advantages of each prompt's rows are multiplied by (Eq. 16), float32[P].

    Raises ValueError, outside jit, for a bin that is none of the B.
    """
    bins = _checks.bin_vector(bins, cfg.num_bins)
    counts = bin_counts(cfg.num_bins, bins).astype(jnp.float32)
    cap = math.inf if cfg.weight_cap is None else cfg.weight_cap
    if cfg.weights == "released":
        present = counts > 0
        q = jax.nn.softmax(jnp.where(present, log_omega(cfg, state), -jnp.inf))
        q = (1.0 - cfg.exploration) * q + cfg.exploration / jnp.sum(present, dtype=jnp.float32)
        return jnp.minimum(q, cap)[bins]
    log_w = jnp.minimum(log_omega(cfg, state), math.log(cap) if cap < math.inf else math.inf)
    if cfg.weights == "published":
        return jnp.exp(jnp.minimum(log_w, _LOG_MAX))[bins]
    w = jnp.exp(log_w - jnp.max(jnp.where(counts > 0, log_w, -jnp.inf)))
    return (w * (bins.shape[0] / jnp.sum(jnp.where(counts > 0, w, 0.0) * counts)))[bins]


def update(cfg: Config, state: State, bins: ArrayLike, signal: ArrayLike) -> State:
    """The state after a batch: `bins` int[P], `signal` the prompts' losses, float[P].

    Non-finite entries are left out; a bin with no finite entry keeps its score (Eqs. 12 and 13).
    Raises ValueError as `weights`.
    """
    bins = _checks.bin_vector(bins, cfg.num_bins)
    signal = _checks.float_vector("signal", signal, bins.shape[0])
    loss, counts = bin_means(cfg.num_bins, bins, signal)
    present = counts > 0
    if cfg.divide_by_share:
        share = counts / jnp.maximum(jnp.sum(counts), 1.0)
        loss = loss / jnp.maximum(share, cfg.share_floor)
    expected = jnp.sum(distribution_among(cfg, state, present) * loss)
    scores = (1.0 - cfg.ema) * state.scores + cfg.ema * loss
    return State(
        scores=jnp.where(present, scores, state.scores),
        visits=state.visits + present.astype(jnp.int32),
        step=state.step + jnp.any(present).astype(jnp.int32),
        regret=jnp.clip(jnp.where(present, state.regret + loss - expected, state.regret), -_HUGE, _HUGE),
    )


def debiased_scores(cfg: Config, state: State) -> jax.Array:
    """The scores that Eq. 14 sees before clipping, float32[B].

    A bin never visited has nothing to say: under `ema_debias` it takes the mean of the others (0 before any visit), so
    that it is neither favoured nor held down at its first visit; without (as published) it keeps its initial 0.
    """
    scores = jnp.clip(state.scores, -_HUGE, _HUGE)
    if not cfg.ema_debias:
        return scores
    visits = state.visits.astype(jnp.float32)
    mass = -jnp.expm1(visits * math.log1p(-cfg.ema)) if cfg.ema < 1.0 else jnp.minimum(visits, 1.0)
    return or_others_mean(scores / jnp.maximum(mass, jnp.finfo(jnp.float32).tiny), state.visits)


def log_omega(cfg: Config, state: State) -> jax.Array:
    """log omega = eta_q clip(S, -C, C) of Eq. 14, float32[B], finite."""
    clip = _HUGE if cfg.score_clip is None else min(cfg.score_clip, _HUGE)
    return jnp.clip(cfg.step_size * jnp.clip(debiased_scores(cfg, state), -clip, clip), -_HUGE, _HUGE)


def bin_counts(num_bins: int, bins: jax.Array) -> jax.Array:
    """How many of the prompts are in each bin, int32[B]."""
    return jnp.zeros(num_bins, jnp.int32).at[bins].add(1)


def bin_means(num_bins: int, bins: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean of the finite values of each bin (0 where there is none) and their number, float32[B] each (Eq. 13)."""
    valid = jnp.isfinite(values)
    values = jnp.where(valid, jnp.clip(values, -_HUGE, _HUGE), 0.0)
    counts = jnp.zeros(num_bins, jnp.float32).at[bins].add(valid.astype(jnp.float32))
    return jnp.zeros(num_bins, jnp.float32).at[bins].add(values) / jnp.maximum(counts, 1.0), counts


def or_others_mean(values: jax.Array, visits: jax.Array) -> jax.Array:
    """`values` float32[B] or [B, A] with the mean of the bins seen in place of the bins never seen (0 if none is)."""
    seen = (visits > 0).reshape((-1,) + (1,) * (values.ndim - 1))
    number = jnp.maximum(jnp.sum(seen, dtype=jnp.float32), 1.0)
    mean = jnp.sum(jnp.where(seen, values / number, 0.0), axis=0, keepdims=True)
    return jnp.where(seen, values, mean)
