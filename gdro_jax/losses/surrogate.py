"""The loss of one token: clipped surrogate, KL, truncated importance weight. Elementwise, on arrays of any one shape.

Sources: clipping, arXiv 2601.19280 Eq. 5 with the two bounds of DAPO (arXiv 2503.14476); dual clip, arXiv 1912.09729
Eq. 5; KL estimators k1, k2, k3, J. Schulman, "Approximating KL Divergence", 2020; truncated importance weights,
Ionides, "Truncated Importance Sampling", 2008, as used between sampler and trainer by Yao et al., "Your Efficient RL
Framework Secretly Brings You Off-Policy RL Training", 2025.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gdro_jax.losses.advantages import one_of

KL_ESTIMATORS = ("k1", "k2", "k3")
LOG_RATIO_LIMIT = 20.0  # exp(20) = 4.9e8: far past any clip bound, far from overflow


class Options(NamedTuple):
    """See `grpo.policy_loss`. `check` raises ValueError naming the field that is out of range."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    dual_clip: float | None = None
    importance_cap: float | None = None

    def check(self) -> None:
        one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low} must be in [0, 1]")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high={self.clip_high} must be at least 0")
        if not self.kl_coef >= 0:
            raise ValueError(f"kl_coef={self.kl_coef} must be at least 0")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip={self.dual_clip} must be above 1, or None for off")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ValueError(f"importance_cap={self.importance_cap} must be above 0, or None for off")


def token_terms(
    options: Options,
    logprobs: Array,
    log_ratio: Array,
    old: Array,
    advantage: Array,
    ref: Array | None = None,
    sampler: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Loss of each token and what is measured of it; `log_ratio` is `logprobs - old`, or one number per response.

    Args:
      options: what is clipped and added.
      logprobs: under the policy that is trained; the gradient flows through it and `log_ratio`.
      old: under the policy before the step, `ref` under the frozen reference or None, `sampler` as the sampler gave
        them or None where `importance_cap` is None.
      advantage: broadcast to the tokens.
    """
    objective, metrics = _clipped_objective(options, log_ratio, advantage)
    loss = -objective
    metrics["approx_kl"] = kl_estimate(old, logprobs, "k3")  # the tokens came from the old policy one by one
    if sampler is not None and options.importance_cap is not None:
        weight = jnp.exp(jnp.clip(jax.lax.stop_gradient(old) - sampler, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
        loss = jnp.minimum(weight, options.importance_cap) * loss
        metrics["importance"] = weight
        metrics["importance_cut"] = (weight > options.importance_cap).astype(jnp.float32)
    if ref is not None:
        metrics["kl"] = kl_estimate(logprobs, ref, options.kl_estimator)
        if options.kl_coef != 0:
            loss += options.kl_coef * metrics["kl"]
    return loss, metrics


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


def _clipped_objective(options: Options, log_ratio: Array, advantage: Array) -> tuple[Array, dict[str, Array]]:
    """min(ratio A, clip(ratio) A) of Eq. 5, written by cases so that metrics and gradient agree on what is clipped."""
    low, high, dual_clip = options.clip_low, options.clip_high, options.dual_clip
    ratio = jnp.exp(jnp.minimum(log_ratio, LOG_RATIO_LIMIT))
    above = (advantage > 0) & (ratio > 1.0 + high)
    below = (advantage < 0) & (ratio < 1.0 - low)
    dual = jnp.zeros_like(above) if dual_clip is None else (advantage < 0) & (ratio > dual_clip)
    limited = jnp.where(above, 1.0 + high, jnp.where(below, 1.0 - low, ratio))
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
