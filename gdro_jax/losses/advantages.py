"""Statistics within each prompt's rollouts: advantages, row weights, and the prompt's surrogate loss.

A step's rollouts are `R` flat rows; `prompt_index[R]` says whose they are, so groups of unequal size are segment
reductions and the shapes never change. Two kinds of rows are left out of everything: those that `valid` marks False
(unscorable), and those whose `prompt_index` lies outside `[0, num_prompts)` (padding). Their values never matter,
NaN and inf included.

"Eq." is an equation of Panaganti et al., arXiv 2601.19280.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

SCALES = ("std", "none")
BASELINES = ("mean", "leave_one_out")
WEIGHTINGS = ("prompt", "rollout")


class GroupStats(NamedTuple):
    """Rewards of each prompt's valid rollouts, `[P]` each.

    `mean` is NaN where a prompt has no valid row, `unbiased_variance` (divided by n - 1) where it has fewer than two;
    `variance` (divided by n) is 0 there. `all_equal` holds where there is at least one valid row and none differs.
    """

    num_rollouts: Array
    mean: Array
    variance: Array
    unbiased_variance: Array
    all_equal: Array


class _Groups(NamedTuple):
    """Validity and shifted rewards of the rows `[R]`, row counts of the prompts `[P]`."""

    prompt: Array
    valid: Array
    size: Array
    low: Array
    shifted: Array


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError, naming the option, its value and what is allowed, unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def group_advantages(
    rewards: ArrayLike,
    prompt_index: ArrayLike,
    num_prompts: int,
    eps: float = 1e-6,
    scale: str = "std",
    clip: float | None = None,
    *,
    baseline: str = "mean",
    valid: ArrayLike | None = None,
) -> Array:
    """Advantage of each rollout over the others of its prompt, Eq. 3: (r - mean) / (std + eps).

    The deviation is the population's, over the prompt's own rollouts. A prompt whose rewards are all equal, or that
    has one rollout, gives exactly 0. Rewards are taken relative to the prompt's lowest one before any sum, which makes
    that exact in float32 and keeps large rewards accurate. A non-finite reward on a valid row makes its group NaN.

    Args:
      rewards: float[R].
      prompt_index: int[R], in `[0, num_prompts)`; a row outside is padding.
      num_prompts: P.
      eps: added to the standard deviation.
      scale: "std", or "none" for no division (Dr. GRPO, arXiv 2503.20783).
      clip: the result is limited to [-clip, clip]; None: no limit.
      baseline: "mean" of all the prompt's rollouts, or "leave_one_out": the mean of its *other* rollouts
        (RLOO, arXiv 2402.14740, with `scale="none"`).
      valid: bool[R]; False rows enter no statistic and get 0.

    Returns: float32[R].
    Raises: ValueError for an unknown `scale` or `baseline`, or `eps < 0`, or `clip <= 0`.
    """
    one_of("scale", scale, SCALES)
    one_of("baseline", baseline, BASELINES)
    if not eps >= 0:
        raise ValueError(f"eps={eps} must be at least 0")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip} must be above 0, or None for no limit")
    groups = _groups(rewards, prompt_index, num_prompts, valid)
    mean, variance = _moments(groups, num_prompts)
    advantage = groups.shifted - mean[groups.prompt]
    if baseline == "leave_one_out":  # r - mean of the others = (r - mean) * n / (n - 1)
        count = groups.size[groups.prompt]
        advantage = advantage * count / jnp.maximum(count - 1, 1)
    if scale == "std":
        advantage = advantage / jnp.where(variance != 0, jnp.sqrt(variance) + eps, 1.0)[groups.prompt]
    if clip is not None:
        advantage = jnp.clip(advantage, -clip, clip)
    return jnp.where(groups.valid & (variance != 0)[groups.prompt], advantage, 0.0)


def group_stats(
    rewards: ArrayLike, prompt_index: ArrayLike, num_prompts: int, valid: ArrayLike | None = None
) -> GroupStats:
    """Count, mean and variances of each prompt's valid rewards: float[R], int[R] -> GroupStats of `[P]` arrays."""
    groups = _groups(rewards, prompt_index, num_prompts, valid)
    mean, variance = _moments(groups, num_prompts)
    count = groups.size
    return GroupStats(
        num_rollouts=count.astype(jnp.int32),
        mean=jnp.where(count > 0, groups.low + mean, jnp.nan),
        variance=variance,
        unbiased_variance=jnp.where(count > 1, variance * count / jnp.maximum(count - 1, 1), jnp.nan),
        all_equal=(count > 0) & (variance == 0),
    )


def row_weights(
    prompt_index: ArrayLike,
    num_prompts: int,
    counts: ArrayLike | None = None,
    weighting: str = "prompt",
    valid: ArrayLike | None = None,
) -> Array:
    """Weight of each row in the step's loss; the weights of a whole step sum to 1.

    "prompt" weighs prompts equally, 1/(P n_i): a prompt that got more rollouts is estimated better, not pushed harder.
    "rollout" weighs rows equally, 1/R: a rollout budget is then a sampling weight too. P counts the prompts that have
    a valid row, n_i and R the valid rows.

    Args:
      prompt_index: int[R]. num_prompts: P.
      counts: int[P], valid rows of each prompt in the *whole* step; None: counted here, right when the rows are the
        whole step's and wrong for a part of it.
      weighting: "prompt" or "rollout".
      valid: bool[R]; False rows weigh 0.

    Returns: float32[R]. Raises: ValueError for an unknown `weighting`.
    """
    one_of("weighting", weighting, WEIGHTINGS)
    index, keep = _membership(prompt_index, num_prompts, valid)
    if counts is None:
        size = _segment_sum(keep.astype(jnp.float32), index, num_prompts)
    else:
        size = jnp.asarray(counts, jnp.float32)
    if weighting == "prompt":
        weight = 1.0 / jnp.maximum(jnp.sum(size > 0) * size[index], 1.0)
    else:
        weight = jnp.broadcast_to(1.0 / jnp.maximum(size.sum(), 1.0), index.shape)
    return jnp.where(keep, weight, 0.0)


def prompt_surrogate(
    per_row: ArrayLike, prompt_index: ArrayLike, num_prompts: int, valid: ArrayLike | None = None
) -> Array:
    """Mean of the per-response losses over each prompt's valid rollouts, Eq. 7: the adversary's `surrogate` signal.

    float[R], int[R] -> float32[P]; NaN where a prompt has no valid row (the adversary leaves those out). No gradient.
    """
    index, keep = _membership(prompt_index, num_prompts, valid)
    loss = jnp.where(keep, jax.lax.stop_gradient(jnp.asarray(per_row, jnp.float32)), 0.0)
    count = _segment_sum(keep.astype(jnp.float32), index, num_prompts)
    return jnp.where(count > 0, _segment_sum(loss, index, num_prompts) / jnp.maximum(count, 1.0), jnp.nan)


def _segment_sum(values: Array, index: Array, num_prompts: int) -> Array:
    return jax.ops.segment_sum(values, index, num_prompts)


def _membership(prompt_index: ArrayLike, num_prompts: int, valid: ArrayLike | None) -> tuple[Array, Array]:
    """Safe indices int32[R] and which rows count, bool[R]."""
    index = jnp.asarray(prompt_index, jnp.int32)
    keep = (index >= 0) & (index < num_prompts)
    if valid is not None:
        keep &= jnp.asarray(valid, bool)
    return jnp.clip(index, 0, num_prompts - 1), keep


def _groups(rewards: ArrayLike, prompt_index: ArrayLike, num_prompts: int, valid: ArrayLike | None) -> _Groups:
    index, keep = _membership(prompt_index, num_prompts, valid)
    reward = jnp.asarray(rewards, jnp.float32)
    count = _segment_sum(keep.astype(jnp.float32), index, num_prompts)
    low = jax.ops.segment_min(jnp.where(keep, reward, jnp.inf), index, num_prompts)
    low = jnp.where(count > 0, low, 0.0)
    return _Groups(index, keep, count, low, jnp.where(keep, reward - low[index], 0.0))


def _moments(groups: _Groups, num_prompts: int) -> tuple[Array, Array]:
    """Mean of the shifted rewards and population variance, float32[P]; the variance of equal rewards is exactly 0."""
    size = jnp.maximum(groups.size, 1.0)
    mean = _segment_sum(groups.shifted, groups.prompt, num_prompts) / size
    deviation = jnp.where(groups.valid, groups.shifted - mean[groups.prompt], 0.0)
    return mean, _segment_sum(deviation**2, groups.prompt, num_prompts) / size
