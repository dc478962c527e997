"""What one piece of a step costs, from its rows' final hidden states; the same for padded rows and for streams."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gdro_jax.losses import grpo, linear_grpo
from gdro_jax.losses.reduction import LossSums
from gdro_jax.losses.surrogate import Options
from gdro_jax.models import lora, qwen3
from gdro_jax.training.config import TrainConfig

Array = jax.Array | np.ndarray
Rows = dict[str, Array]
Trained = qwen3.Qwen3 | lora.Adapters


def policy(trained: Trained, frozen: qwen3.Qwen3 | None) -> qwen3.Qwen3:
    """The policy that a learner's model stands for: itself, or the frozen one with these adapters on it."""
    if not isinstance(trained, lora.Adapters):
        return trained
    assert frozen is not None
    return qwen3.adapted(frozen, trained)


def of_rows(batch: Any, config: TrainConfig) -> Rows:
    """What the loss needs of each row of a `step.Batch`, [R, ...]; made for the whole step, so that no cut matters."""
    num_prompts = batch.prompts.shape[0]
    chex.assert_equal_shape([batch.tokens, batch.mask, batch.logprobs])
    chex.assert_equal_shape([batch.rewards, batch.scorable, batch.prompt_index])
    chex.assert_shape(batch.weights, (num_prompts,))
    advantages = grpo.group_advantages(
        batch.rewards,
        batch.prompt_index,
        num_prompts,
        scale=config.advantage_scale,
        clip=config.advantage_clip,
        baseline=config.advantage_baseline,
        valid=batch.scorable,
    )
    weights = grpo.row_weights(batch.prompt_index, num_prompts, weighting=config.row_weighting, valid=batch.scorable)
    return {
        "tokens": batch.tokens,
        "mask": batch.mask,
        "old": batch.logprobs,
        "sampler": batch.logprobs,
        "unweighted": advantages,
        "advantages": advantages * batch.weights[batch.prompt_index],
        "row_weights": weights * config.minibatches,  # the mean over minibatches is the step's loss
    }


def active(rows: Rows) -> jax.Array:
    """bool[R, T], the tokens that count."""
    return jnp.asarray(rows["mask"]) & (rows["row_weights"] != 0)[:, None]


def needs_reference(reference: qwen3.Qwen3 | None, config: TrainConfig) -> bool:
    """Whether the reference's log-probs are part of the loss."""
    return reference is not None and config.kl_coef > 0


def sums(
    model: qwen3.Qwen3,
    hidden: jax.Array,
    ref: jax.Array | None,
    rows: Rows,
    config: TrainConfig,
    temperature: float,
    places: linear_grpo.Places | None = None,
) -> tuple[LossSums, jax.Array, jax.Array]:
    """Loss sums, rows' losses without the adversary's weights [R], and the largest gap to the sampler's log-probs.

    Args:
      model: whose head it is.
      hidden: [R, T, D], or [S, D] with `places`.
      ref: float32[R, T], the reference's log-probs, or None.
      rows: of this piece, as of `of_rows`.
      config: of the step.
      temperature: that the rollouts were sampled at.
      places: see `linear_grpo.loss_sums`.
    """
    mask, weights = rows["mask"], rows["row_weights"]
    capped = config.importance_cap is not None
    own = capped and config.minibatches == 1  # the policy before the step is the policy itself, not changed yet
    fixed: dict[str, Any] = {
        "ratio_level": config.ratio_level,
        "sampler_logprobs": rows["sampler"] if capped else None,
    }
    options = Options(
        config.clip_low, config.clip_high, config.kl_coef, config.kl_estimator, config.dual_clip, config.importance_cap
    )
    out = linear_grpo.loss_sums(
        hidden,
        qwen3.unembed_weight(model),
        rows["tokens"],
        None if own else rows["old"],
        rows["advantages"],
        mask,
        ref,
        weights,
        temperature,
        options,
        aggregate=config.aggregate,
        places=places,
        **fixed,
    )
    old = out.logprobs if own else rows["old"]
    plain = grpo.loss_sums(  # Eq. 6
        out.logprobs, old, rows["unweighted"], mask, ref, weights, **options._asdict(), **fixed
    )
    gap = jnp.max(jnp.where(active(rows), jnp.abs(out.logprobs - rows["sampler"]), 0.0))
    return out.sums, jax.lax.stop_gradient(plain.per_row), gap
