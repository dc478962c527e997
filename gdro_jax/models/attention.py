"""Grouped-query attention over pieces of context, for `qwen3.prefill` and `qwen3.extend`.

Letters: N sequences, S queries, U keys of a piece, H heads, K KV heads, C head size.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row with nothing to attend to gives finite garbage, never NaN


def attend(q: jax.Array, parts: list[tuple[jax.Array, jax.Array, jax.Array]]) -> jax.Array:
    """Grouped-query attention over several pieces of context under one softmax.

    Args:
      q: [N, S, H, C].
      parts: (k, v, mask) with k, v [N, U, K, C] and mask bool[N, S, U]; pieces may differ in U.

    Returns:
      [N, S, H, C].
    """
    n, s, h, c = q.shape
    grouped = q.reshape(n, s, parts[0][0].shape[2], -1, c)
    scores = [
        jnp.where(
            mask[:, None, None],
            jnp.einsum("nskgc,nukc->nkgsu", grouped, k, preferred_element_type=jnp.float32) * c**-0.5,
            MASKED,
        )
        for k, _, mask in parts
    ]
    top = jax.lax.stop_gradient(
        jnp.max(jnp.concatenate([x.max(-1, keepdims=True) for x in scores], -1), -1, keepdims=True)
    )
    weights = [jnp.exp(x - top) for x in scores]
    total = sum(x.sum(-1, keepdims=True) for x in weights)
    mixed = sum(
        jnp.einsum("nkgsu,nukc->nskgc", (x / total).astype(v.dtype), v)
        for x, (_, v, _) in zip(weights, parts, strict=True)
    )
    return jnp.asarray(mixed).reshape(n, s, h, c)
