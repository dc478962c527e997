"""The gate at the start of a run: do sampler and trainer give the same tokens the same probabilities?

Where they do not, the ratio of the surrogate (Eq. 5 of arXiv 2601.19280) is wrong from the first step on and training
drifts without an error. So the user's own model, prompts and settings are tried before anything is trained. A served
model, which may stop reading new weights at any time, is tried on the responses of every step.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np

from gdro_jax.models import qwen3
from gdro_jax.sampling import Engine, Rollouts
from gdro_jax.sampling.engine import Heard
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
    heard: Heard | None = None,
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
      heard: is told how far the sampling is.
    """
    limits = np.full(len(index), min(TRIED_TOKENS, max_new_tokens), np.int32)
    out = engine.rows(prompts, prompt_mask, index, identity, key, limits, heard)
    return compare(out, model, prompts, prompt_mask, index, temperature, layout, at_once)


def compare(
    out: Rollouts,
    model: qwen3.Qwen3,
    prompts: np.ndarray,
    prompt_mask: np.ndarray,
    index: np.ndarray,
    temperature: float,
    layout: mesh.Layout = mesh.ONE_DEVICE,
    at_once: int = 16,
    some: bool = False,
) -> Gap:
    """The first tokens of responses that were sampled, by the trainer's model; other arguments as of `measure`.

    Args:
      out: R rows, of the prompts int32[P, L] by index int32[R].
      some: one piece alone, of rows spread evenly over all.
    """
    length = min(TRIED_TOKENS, out.tokens.shape[1])
    shards, each = layout.shards, max(1, at_once // layout.shards)
    size, number = shards * each, len(index)
    own = np.tile(np.arange(each, dtype=np.int32), (shards, 1))
    chosen = np.arange(size) * number // size if some else np.arange(-(-number // size) * size) % number
    gaps = np.full((number, length), np.nan)  # of rows that are not compared
    for part in chosen.reshape(-1, shards, each):
        tokens, mask = out.tokens[part, :length], out.mask[part, :length]
        asked = layout.whole((prompts[index[part]], prompt_mask[index[part]], own, tokens, mask))
        logprobs = np.asarray(layout.whole(_forward(model, asked, temperature, layout)))
        gaps[part] = np.abs(logprobs - out.policy_logprobs[part, :length])
    rows = np.unique(chosen)
    found = gaps[rows][out.mask[rows, :length]]
    return Gap(float(found.mean()), float(found.max()), found.size)


@functools.partial(jax.jit, static_argnames=("temperature", "layout"))
def _forward(model: qwen3.Qwen3, rows: tuple[step.Array, ...], temperature: float, layout: mesh.Layout) -> jax.Array:
    """The trainer's log-probs float32[shards, rows, T] of prompts, their mask, each row's prompt, tokens and mask."""

    def one(part: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return step.response_logprobs(model, *part, temperature)[0]

    return layout.over_shards(one, rows)


def check(gap: Gap, tolerance: float, where: str = "") -> None:
    """Refuses a gap over the tolerance, also one that is not a number; `where` begins the line.

    Raises:
      Disagreement: with the gap and what is allowed.
    """
    if not gap.mean <= tolerance:
        raise Disagreement(
            f"{where}sampling.gap_tolerance={tolerance}: sampler and trainer differ by {gap.mean:.3g} in "
            f"log-probability on average over {gap.tokens} tokens (at most {gap.largest:.3g}); "
            "training on such samples would be biased"
        )
