"""The gate at the start of a run: do sampler and trainer give the same tokens the same probabilities?

Where they do not, the ratio of the surrogate (Eq. 5 of arXiv 2601.19280) is wrong from the first step on and training
drifts without an error. So the user's own model, prompts and settings are tried before anything is trained.
"""

from typing import NamedTuple

import jax
import numpy as np

from gdro_jax.models import qwen3
from gdro_jax.sampling import Engine
from gdro_jax.training import mesh, setup, step

TRIED_TOKENS = 64  # of each response, enough to pass through cache and positions


class Gap(NamedTuple):
    """Absolute differences of log-probs over tokens: their mean, the largest, and how many tokens were compared."""

    mean: float
    largest: float
    tokens: int


class Disagreement(setup.InputError):
    """Sampler and trainer disagree by more than is allowed."""


def measure(
    engine: Engine,
    model: qwen3.Qwen3,
    prompts: np.ndarray,
    prompt_mask: np.ndarray,
    index: np.ndarray,
    identity: np.ndarray,
    key: jax.Array,
    temperature: float,
    max_new_tokens: int,
    layout: mesh.Layout = mesh.ONE_DEVICE,
    at_once: int = 16,
) -> Gap:
    """Samples responses and asks the trainer for the log-probs of the same tokens.

    Args:
      engine: under test; it must sample from `model`.
      model: the trainer's.
      prompts, prompt_mask, index, identity, key: see `Engine.stream`; the shapes of a step compile nothing new.
      temperature: of both.
      max_new_tokens: of a response.
      layout: of the trainer.
      at_once: rows that the trainer runs in one piece, or one on each shard of the layout where those are more.
    """
    limits = np.full(len(index), min(TRIED_TOKENS, max_new_tokens), np.int32)
    out = engine.rows(prompts, prompt_mask, index, identity, key, limits)
    length = int(limits[0])
    shards, each = layout.shards, max(1, at_once // layout.shards)
    own = np.tile(np.arange(each, dtype=np.int32), (shards, 1))

    @jax.jit
    def forward(model: qwen3.Qwen3, rows: tuple[step.Array, ...]) -> jax.Array:
        def one(part: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
            return step.response_logprobs(model, *part, temperature)[0]

        return layout.over_shards(one, rows)

    rows = np.arange(-(-len(index) // own.size) * own.size).reshape(-1, shards, each) % len(index)
    gaps = np.zeros((len(index), length))
    for part in rows:
        tokens, mask = out.tokens[part, :length], out.mask[part, :length]
        asked = layout.whole((prompts[index[part]], prompt_mask[index[part]], own, tokens, mask))
        logprobs = np.asarray(layout.whole(forward(model, asked)))
        gaps[part] = np.where(mask, np.abs(logprobs - out.policy_logprobs[part, :length]), 0.0)
    mask = out.mask[:, :length]
    return Gap(float(gaps[mask].mean()), float(gaps[mask].max()), int(mask.sum()))


def check(gap: Gap, tolerance: float) -> None:
    """Refuses a gap over the tolerance, also one that is not a number.

    Raises:
      Disagreement: with the gap and what is allowed.
    """
    if not gap.mean <= tolerance:
        raise Disagreement(
            f"sampling.gap_tolerance={tolerance}: sampler and trainer differ by {gap.mean:.3g} in log-probability on "
            f"average over {gap.tokens} tokens (at most {gap.largest:.3g}); training on such samples would be biased"
        )
