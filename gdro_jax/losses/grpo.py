"""The GRPO surrogate and its variants: ratio, clipping, KL, and how token losses become one number.

Panaganti et al., arXiv 2601.19280: token objective Eq. 5, per-response loss Eq. 6 (`per_row`), prompt loss Eq. 7
(`prompt_surrogate`); advantages Eq. 3 in `advantages`, re-exported here. Variants, each behind one argument:
separate clip bounds and one mean over tokens (DAPO, arXiv 2503.14476), a constant instead of the response's length
(Dr. GRPO, arXiv 2503.20783), dual clip (arXiv 1912.09729), one ratio per response (GSPO, arXiv 2507.18071),
leave-one-out baseline (RLOO, arXiv 2402.14740). KL estimators k1, k2, k3: J. Schulman, "Approximating KL
Divergence", 2020.

Masked positions and rows of weight 0 never matter, neither in value nor in gradient, NaN and inf included.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gdro_jax.losses.advantages import group_advantages, group_stats, one_of, prompt_surrogate, row_weights
from gdro_jax.losses.reduction import LossOutput, LossSums, finish

__all__ = [
    "group_advantages",
    "group_stats",
    "kl_estimate",
    "loss_sums",
    "policy_loss",
    "prompt_surrogate",
    "row_weights",
]

KL_ESTIMATORS = ("k1", "k2", "k3")
AGGREGATES = ("sequence", "token", "constant")
RATIO_LEVELS = ("token", "sequence")
LOG_RATIO_LIMIT = 20.0  # exp(20) = 4.9e8: far past any clip bound, far from overflow


def policy_loss(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    ref_logprobs: ArrayLike | None = None,
    row_weights: ArrayLike | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    aggregate: str = "sequence",
    *,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    constant: float | None = None,
    token_metrics: Mapping[str, ArrayLike] | None = None,
    denominator: ArrayLike | None = None,
) -> LossOutput:
    """GRPO loss to minimise; `out.loss == sum(row_weights * out.per_row)` always.

    Args:
      logprobs: float[R, T], of the sampled tokens under the policy that is trained; the gradient flows through these
        alone.
      old_logprobs: float[R, T], under the policy that sampled.
      advantages: float[R].
      mask: bool[R, T], True on response tokens.
      ref_logprobs: float[R, T] under the frozen reference; None: no KL. It is measured even at
        coefficient 0.
      row_weights: float[R], absolute (see `row_weights()`); None: 1/R each. A row of weight 0 is out of everything:
        its `per_row` is 0 and no metric counts it.
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      kl_coef: added to each token's loss times the KL estimate.
      kl_estimator: "k1", "k2" or "k3", see `kl_estimate`.
      aggregate: "sequence": mean over a response's tokens, then the rows' weights. "token": one mean over all tokens,
        each weighing as its row does. "constant": sum over a response's tokens divided by `constant`.
      dual_clip: for negative advantages the objective is at least dual_clip * advantage; None: off.
      ratio_level: "token", or "sequence": the geometric mean of the response's token ratios, on all its tokens.
      constant: divisor of `aggregate="constant"`; None: T.
      token_metrics: further float[R, T] to average over the tokens, such as the entropy.
      denominator: for "token" aggregation over a part of the rows, sum of row_weights_i * L_i over *all* rows, so that
        the parts' losses add up to the whole's; None: over these rows.

    Returns: LossOutput(loss float32, per_row float32[R], metrics). Metrics, means over tokens: "ratio", "approx_kl"
      (k3, of the sampling policy to this one), "clip_fraction" (clipping changed the token's objective) and its
      parts "clip_low_fraction", "clip_high_fraction", "dual_clip_fraction"; "kl" if a reference is given; what
      `token_metrics` names; and "response_length", per row.
    Raises: ValueError naming the argument, for shapes that do not match and for values out of range.
    """
    rows = jnp.shape(logprobs)[0]
    sums = loss_sums(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        ref_logprobs,
        jnp.full((rows,), 1.0 / max(rows, 1), jnp.float32) if row_weights is None else row_weights,
        clip_low,
        clip_high,
        kl_coef,
        kl_estimator,
        aggregate,
        dual_clip=dual_clip,
        ratio_level=ratio_level,
        constant=constant,
        token_metrics=token_metrics,
    )
    if denominator is not None and sums.denominator is not None:
        sums = sums._replace(denominator=jnp.asarray(denominator, jnp.float32))
    return finish(sums)


def loss_sums(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    ref_logprobs: ArrayLike | None,
    row_weights: ArrayLike,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    aggregate: str = "sequence",
    *,
    dual_clip: float | None = None,
    ratio_level: str = "token",
    constant: float | None = None,
    token_metrics: Mapping[str, ArrayLike] | None = None,
) -> LossSums:
    """`policy_loss` as sums over the rows, to be added over microbatches and devices and then given to `finish`.

    Arguments as in `policy_loss`; the row weights must be given, since 1/R of a part is not 1/R of the whole.
    """
    _check(clip_low, clip_high, kl_coef, kl_estimator, aggregate, dual_clip, ratio_level, constant)
    _check_shapes(logprobs, old_logprobs, advantages, mask, ref_logprobs, row_weights)
    if kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs, which is None")
    weight = jax.lax.stop_gradient(jnp.asarray(row_weights, jnp.float32))
    active = jnp.asarray(mask, bool) & (weight != 0)[:, None]
    length = active.sum(-1, dtype=jnp.float32)
    logp = _keep(logprobs, active)
    old = jax.lax.stop_gradient(_keep(old_logprobs, active))
    advantage = jax.lax.stop_gradient(_keep(jnp.asarray(advantages)[:, None], active))

    log_ratio = logp - old
    if ratio_level == "sequence":
        mean = log_ratio.sum(-1, keepdims=True) / jnp.maximum(length, 1.0)[:, None]
        log_ratio = jnp.where(active, mean, 0.0)
    objective, metrics = _clipped_objective(log_ratio, advantage, clip_low, clip_high, dual_clip)
    token_loss = -objective
    metrics["approx_kl"] = kl_estimate(old, old + log_ratio, "k3")  # the tokens came from the old policy
    if ref_logprobs is not None:
        metrics["kl"] = kl_estimate(logp, jax.lax.stop_gradient(_keep(ref_logprobs, active)), kl_estimator)
        if kl_coef != 0:
            token_loss += kl_coef * metrics["kl"]
    metrics |= {name: _keep(value, active) for name, value in (token_metrics or {}).items()}

    per_row = jnp.where(active, token_loss, 0.0).sum(-1)
    denominator = None
    if aggregate == "sequence":
        per_row = per_row / jnp.maximum(length, 1.0)
    elif aggregate == "constant":
        per_row = per_row / (active.shape[1] if constant is None else constant)
    else:
        denominator = (weight * length).sum()
    return LossSums(
        loss=(weight * per_row).sum(),
        denominator=denominator,
        per_row=per_row,
        metrics={name: jax.lax.stop_gradient(jnp.where(active, v, 0.0).sum()) for name, v in metrics.items()},
        tokens=length.sum(),
        rows=(weight != 0).sum(dtype=jnp.float32),
    )


def kl_estimate(logprobs: Array, ref_logprobs: Array, estimator: str = "k3") -> Array:
    """Single-sample estimate of KL(policy || reference) at tokens sampled from the policy, float[...] -> float[...].

    With d = ref - logprob: k1 = -d (unbiased, either sign), k2 = d^2 / 2 (biased, low variance), k3 = exp(d) - 1 - d
    (unbiased, never negative). Past exp(20) k3 is constant rather than infinite.
    """
    one_of("kl_estimator", estimator, KL_ESTIMATORS)
    difference = ref_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference**2
    limited = jnp.minimum(difference, LOG_RATIO_LIMIT)
    return jnp.expm1(limited) - limited


def _clipped_objective(
    log_ratio: Array, advantage: Array, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Array, dict[str, Array]]:
    """min(ratio A, clip(ratio) A) of Eq. 5, written by cases so that metrics and gradient agree on what is clipped."""
    ratio = jnp.exp(jnp.minimum(log_ratio, LOG_RATIO_LIMIT))
    above = (advantage > 0) & (ratio > 1.0 + clip_high)
    below = (advantage < 0) & (ratio < 1.0 - clip_low)
    dual = jnp.zeros_like(above) if dual_clip is None else (advantage < 0) & (ratio > dual_clip)
    limited = jnp.where(above, 1.0 + clip_high, jnp.where(below, 1.0 - clip_low, ratio))
    if dual_clip is not None:
        limited = jnp.where(dual, dual_clip, limited)
    metrics = {
        "ratio": ratio,
        "clip_fraction": above | below | dual,
        "clip_high_fraction": above,
        "clip_low_fraction": below,
        "dual_clip_fraction": dual,
    }
    return limited * advantage, {name: value.astype(jnp.float32) for name, value in metrics.items()}


def _keep(values: ArrayLike, active: Array) -> Array:
    """`values` in float32 where active, 0 elsewhere: what is masked is gone before it meets any arithmetic."""
    return jnp.where(active, jnp.asarray(values, jnp.float32), 0.0)


def _check(
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    kl_estimator: str,
    aggregate: str,
    dual_clip: float | None,
    ratio_level: str,
    constant: float | None,
) -> None:
    one_of("kl_estimator", kl_estimator, KL_ESTIMATORS)
    one_of("aggregate", aggregate, AGGREGATES)
    one_of("ratio_level", ratio_level, RATIO_LEVELS)
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low={clip_low} must be in [0, 1]")
    if not clip_high >= 0:
        raise ValueError(f"clip_high={clip_high} must be at least 0")
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef={kl_coef} must be at least 0")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1, or None for off")
    if constant is not None and not (constant > 0 and aggregate == "constant"):
        raise ValueError(f'constant={constant} must be above 0, and goes with aggregate="constant", not {aggregate!r}')


def _check_shapes(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    ref_logprobs: ArrayLike | None,
    row_weights: ArrayLike,
) -> None:
    shape = jnp.shape(logprobs)
    if len(shape) != 2:
        raise ValueError(f"logprobs must have shape [R, T], it has {shape}")
    tokens = {"old_logprobs": old_logprobs, "mask": mask, "ref_logprobs": ref_logprobs}
    rows = {"advantages": advantages, "row_weights": row_weights}
    for name, value in (tokens | rows).items():
        wanted = shape if name in tokens else shape[:1]
        if value is not None and jnp.shape(value) != wanted:
            raise ValueError(f"{name} must have shape {wanted}, it has {jnp.shape(value)}")
