"""The distribution a token is drawn from, and the draw itself."""

import jax
import jax.numpy as jnp

from gdro_jax.sampling.config import SamplingConfig

_BLOCK = 64


def warp(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Log-probabilities [R, V] of the distribution that is sampled from, minus infinity for what is cut off.

    Temperature, then top-k, then top-p, each over what the one before left (as in transformers).

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
    return jax.nn.log_softmax(logits, axis=-1)


def inverse_cdf(logprobs: jax.Array, uniform: jax.Array) -> jax.Array:
    """Draws one token per row by inverting the cumulative distribution in two levels.

    One uniform per row instead of one Gumbel per vocabulary entry: the cost is one pass over the row.

    Args:
      logprobs: float32[R, V], normalised or not.
      uniform: float32[R] in [0, 1).

    Returns:
      int32[R]; never a token of probability 0.
    """
    rows, size = logprobs.shape
    probs = jnp.exp(logprobs - logprobs.max(-1, keepdims=True))
    probs = jnp.pad(probs, ((0, 0), (0, -size % _BLOCK))).reshape(rows, -1, _BLOCK)
    mass = probs.sum(-1)
    edges = jnp.cumsum(mass, axis=-1)
    target = uniform * edges[:, -1]
    block = _first_above(edges, target, mass)
    before = jnp.where(block > 0, jnp.take_along_axis(edges, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0.0)
    inside = jnp.take_along_axis(probs, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _first_above(jnp.cumsum(inside, axis=-1), target - before, inside)


def _first_above(cumulative: jax.Array, target: jax.Array, mass: jax.Array) -> jax.Array:
    """First position with mass whose cumulative sum exceeds the target, the last one with mass if none does.

    A parallel cumulative sum may move by a rounding where nothing is added, so the mass itself is asked.
    """
    above = (cumulative > target[:, None]) & (mass > 0)
    last = mass.shape[-1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
    return jnp.where(above.any(-1), jnp.argmax(above, axis=-1), last).astype(jnp.int32)
