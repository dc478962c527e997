"""The GRPO surrogate and its variants: ratio, clipping, KL, and how token losses become one number.

Panaganti et al., arXiv 2601.19280: token objective Eq. 5, per-response loss Eq. 6 (`per_row`), prompt loss Eq. 7
(`prompt_surrogate`); advantages Eq. 3 in `advantages`, re-exported here. Variants, each behind one argument:
separate clip bounds and one mean over tokens (DAPO, arXiv 2503.14476), a constant instead of the response's length
(Dr. GRPO, arXiv 2503.20783), dual clip (arXiv 1912.09729), one ratio per response (GSPO, arXiv 2507.18071),
leave-one-out baseline (RLOO, arXiv 2402.14740), truncated importance weights. What one token's loss is: `surrogate`.
`linear_grpo` is the same loss straight from hidden states, its gradient made in the same pass.

Masked positions and rows of weight 0 never matter, neither in value nor in gradient, NaN and inf included.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gdro_jax.losses.advantages import group_advantages, group_stats, one_of, prompt_surrogate, row_weights
from gdro_jax.losses.reduction import LossOutput, LossSums, finish
from gdro_jax.losses.surrogate import KL_ESTIMATORS, Options, kl_estimate, token_terms

__all__ = [
    "KL_ESTIMATORS",
    "group_advantages",
    "group_stats",
    "kl_estimate",
    "loss_sums",
    "policy_loss",
    "prompt_surrogate",
    "row_weights",
]

AGGREGATES = ("sequence", "token", "constant")
RATIO_LEVELS = ("token", "sequence")


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
    sampler_logprobs: ArrayLike | None = None,
    importance_cap: float | None = None,
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
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]. Past exp(20), which tokens of negative
        advantage can reach without `dual_clip`, it is constant and has no gradient, rather than overflow.
      kl_coef: added to each token's loss times the KL estimate.
      kl_estimator: "k1", "k2" or "k3", see `kl_estimate`.
      aggregate: "sequence": mean over a response's tokens, then the rows' weights. "token": one mean over all tokens,
        each weighing as its row does. "constant": sum over a response's tokens divided by `constant`.
      dual_clip: for negative advantages the objective is at least dual_clip * advantage; None: off.
      ratio_level: "token", or "sequence": the geometric mean of the response's token ratios, on all its tokens.
      constant: divisor of `aggregate="constant"`; None: T.
      sampler_logprobs, importance_cap: both or neither. float[R, T] as the sampler gave them, where `old_logprobs` are
        the trainer's own: each token's surrogate is multiplied by min(exp(old - sampler), importance_cap), which
        corrects for a sampler that is not the policy it stands for. The KL term is not.
      token_metrics: further float[R, T] to average over the tokens, such as the entropy.
      denominator: for "token" aggregation over a part of the rows, sum of row_weights_i * L_i over *all* rows, so that
        the parts' losses add up to the whole's; None: over these rows.

    Returns: LossOutput(loss float32, per_row float32[R], metrics). Metrics, means over tokens: "ratio", "approx_kl"
      (k3, of the sampling policy to this one), "clip_fraction" (clipping changed the token's objective) and its
      parts "clip_low_fraction", "clip_high_fraction", "dual_clip_fraction"; "kl" if a reference is given; "importance"
      and "importance_cut" with `importance_cap`; what `token_metrics` names; and "response_length", per row.
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
        sampler_logprobs=sampler_logprobs,
        importance_cap=importance_cap,
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
    sampler_logprobs: ArrayLike | None = None,
    importance_cap: float | None = None,
    token_metrics: Mapping[str, ArrayLike] | None = None,
) -> LossSums:
    """`policy_loss` as sums over the rows, to be added over microbatches and devices and then given to `finish`.

    Arguments as in `policy_loss`; the row weights must be given, since 1/R of a part is not 1/R of the whole.
    """
    options = Options(clip_low, clip_high, kl_coef, kl_estimator, dual_clip, importance_cap)
    check(options, aggregate, ratio_level, constant, ref_logprobs, sampler_logprobs)
    _check_shapes(logprobs, old_logprobs, advantages, mask, ref_logprobs, row_weights, sampler_logprobs)
    weight = jax.lax.stop_gradient(jnp.asarray(row_weights, jnp.float32))
    active = jnp.asarray(mask, bool) & (weight != 0)[:, None]
    length = active.sum(-1, dtype=jnp.float32)
    logp = _keep(logprobs, active)
    old, ref, sampler = (
        None if x is None else jax.lax.stop_gradient(_keep(x, active))
        for x in (old_logprobs, ref_logprobs, sampler_logprobs)
    )
    assert old is not None
    advantage = jax.lax.stop_gradient(_keep(jnp.asarray(advantages)[:, None], active))

    log_ratio = logp - old
    if ratio_level == "sequence":
        mean = log_ratio.sum(-1, keepdims=True) / jnp.maximum(length, 1.0)[:, None]
        log_ratio = jnp.where(active, mean, 0.0)
    token_losses, metrics = token_terms(options, logp, log_ratio, old, advantage, ref, sampler)
    metrics |= {name: _keep(value, active) for name, value in (token_metrics or {}).items()}

    divisor = divisor_of(aggregate, length, active.shape[1], constant)
    per_row = jnp.where(active, token_losses, 0.0).sum(-1) / divisor
    denominator = (weight * length).sum() if aggregate == "token" else None
    return LossSums(
        loss=(weight * per_row).sum(),
        denominator=denominator,
        per_row=per_row,
        metrics={name: jax.lax.stop_gradient(jnp.where(active, v, 0.0).sum()) for name, v in metrics.items()},
        tokens=length.sum(),
        rows=(weight != 0).sum(dtype=jnp.float32),
    )


def divisor_of(aggregate: str, length: Array, longest: int, constant: float | None) -> Array:
    """What a row's sum over tokens is divided by; with "token" the division comes last, by the denominator."""
    if aggregate == "sequence":
        return jnp.maximum(length, 1.0)
    if aggregate == "constant":
        return jnp.full(length.shape, longest if constant is None else constant, jnp.float32)
    return jnp.ones(length.shape, jnp.float32)


def _keep(values: ArrayLike, active: Array) -> Array:
    """`values` in float32 where active, 0 elsewhere: what is masked is gone before it meets any arithmetic."""
    return jnp.where(active, jnp.asarray(values, jnp.float32), 0.0)


def check(
    options: Options,
    aggregate: str,
    ratio_level: str,
    constant: float | None,
    ref_logprobs: ArrayLike | None,
    sampler_logprobs: ArrayLike | None,
) -> None:
    """Raises ValueError, naming the argument, for options out of range or that do not fit together."""
    options.check()
    one_of("aggregate", aggregate, AGGREGATES)
    one_of("ratio_level", ratio_level, RATIO_LEVELS)
    if constant is not None and not (constant > 0 and aggregate == "constant"):
        raise ValueError(f'constant={constant} must be above 0, and goes with aggregate="constant", not {aggregate!r}')
    if options.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"kl_coef={options.kl_coef} needs ref_logprobs, which is None")
    if (options.importance_cap is None) != (sampler_logprobs is None):
        raise ValueError(f"importance_cap={options.importance_cap} and sampler_logprobs go together: both or neither")


def _check_shapes(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    ref_logprobs: ArrayLike | None,
    row_weights: ArrayLike,
    sampler_logprobs: ArrayLike | None,
) -> None:
    shape = jnp.shape(logprobs)
    if len(shape) != 2:
        raise ValueError(f"logprobs must have shape [R, T], it has {shape}")
    tokens = {
        "old_logprobs": old_logprobs,
        "mask": mask,
        "ref_logprobs": ref_logprobs,
        "sampler_logprobs": sampler_logprobs,
    }
    rows = {"advantages": advantages, "row_weights": row_weights}
    for name, value in (tokens | rows).items():
        wanted = shape if name in tokens else shape[:1]
        if value is not None and jnp.shape(value) != wanted:
            raise ValueError(f"{name} must have shape {wanted}, it has {jnp.shape(value)}")
