"""The distribution a token is drawn from, and the draw itself."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gdro_jax.sampling.config import SamplingConfig

_BLOCK = 64


def warp(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Log-probabilities [R, V] of the distribution that is sampled from, minus infinity for what is cut off.

    Temperature, then top-k, then top-p, then min-p, each over what the one before left (as in transformers). Tokens
    as likely as the last one kept are kept too.

    Args:
      logits: float32[R, V].
      config: `temperature` above 0.
    """
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, config.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.top_p < 1.0:
        ordered = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        kept = jnp.cumsum(probs, axis=-1) - probs < config.top_p  # the first token is always kept
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.min_p > 0:
        logits = jnp.where(logits < logits.max(-1, keepdims=True) + math.log(config.min_p), -jnp.inf, logits)
    return jax.nn.log_softmax(logits, axis=-1)


class Drawn(NamedTuple):
    """One token per row.

    Attributes:
      token: int32[R].
      logprob: float32[R], of the distribution drawn from, 0 under greedy decoding.
      policy_logprob: float32[R], of the policy at the temperature, nothing cut off (at temperature 1 where greedy).
    """

    token: jax.Array
    logprob: jax.Array
    policy_logprob: jax.Array


def sample(logits: jax.Array, keys: jax.Array, position: jax.Array, config: SamplingConfig) -> Drawn:
    """Draws response token number `position` of each row.

    Args:
      logits: float32[R, V].
      keys: one random key per row; token t is drawn with fold_in(key, t).
      position: int32[R].
      config: static.
    """
    allowed = _without_stops(logits, position, config)
    if config.temperature == 0:
        token = jnp.argmax(allowed, -1).astype(jnp.int32)
        return Drawn(token, jnp.zeros(token.shape, jnp.float32), _logprob(logits, token))
    uniform = jax.vmap(lambda k, t: jax.random.uniform(jax.random.fold_in(k, t), dtype=jnp.float32))(keys, position)
    if config.truncates:
        token, logprob = draw(warp(allowed, config), uniform)
        return Drawn(token, logprob, _logprob(logits / config.temperature, token))
    token, logprob = draw(logits / config.temperature, uniform)
    return Drawn(token, logprob, logprob)


def _without_stops(logits: jax.Array, position: jax.Array, config: SamplingConfig) -> jax.Array:
    """Logits with no stop token possible where the response would be shorter than its minimum."""
    if config.min_new_tokens <= 1 or not config.stop_tokens:
        return logits
    early = position + 1 < config.min_new_tokens
    stop = jnp.zeros(logits.shape[-1], bool).at[jnp.asarray(config.stop_tokens)].set(True)
    return jnp.where(early[:, None] & stop, -jnp.inf, logits)


def _logprob(logits: jax.Array, token: jax.Array) -> jax.Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=1)[:, 0]


def inverse_cdf(logprobs: jax.Array, uniform: jax.Array) -> jax.Array:
    """One token int32[R] per row, never one of probability 0; see `draw`."""
    return draw(logprobs, uniform)[0]


def draw(logits: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row by inverting the cumulative distribution in two levels.

    One uniform per row instead of one Gumbel per vocabulary entry: the cost is one pass over the row, which also
    gives the normaliser, so no normalised distribution is ever written.

    Args:
      logits: float32[R, V], normalised or not.
      uniform: float32[R] in [0, 1).

    Returns:
      int32[R], never a token of probability 0, and its log-probability float32[R].
    """
    rows, size = logits.shape
    top = logits.max(-1, keepdims=True)
    probs = jnp.exp(logits - top)
    probs = jnp.pad(probs, ((0, 0), (0, -size % _BLOCK))).reshape(rows, -1, _BLOCK)
    mass = probs.sum(-1)
    edges = jnp.cumsum(mass, axis=-1)
    target = uniform * edges[:, -1]
    block = _first_above(edges, target, mass)
    before = jnp.where(block > 0, jnp.take_along_axis(edges, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0.0)
    inside = jnp.take_along_axis(probs, block[:, None, None], axis=1)[:, 0]
    token = block * _BLOCK + _first_above(jnp.cumsum(inside, axis=-1), target - before, inside)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return token, chosen - top[:, 0] - jnp.log(mass.sum(-1))


def _first_above(cumulative: jax.Array, target: jax.Array, mass: jax.Array) -> jax.Array:
    """First position with mass whose cumulative sum exceeds the target, the last one with mass if none does.

    A parallel cumulative sum may move by a rounding where nothing is added, so the mass itself is asked.
    """
    above = (cumulative > target[:, None]) & (mass > 0)
    last = mass.shape[-1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
    return jnp.where(above.any(-1), jnp.argmax(above, axis=-1), last).astype(jnp.int32)
