"""Attention over context in pieces, merged under one softmax.

Pieces are merged by their running maxima, as in FlashAttention (arXiv 2205.14135, section 3.1).
Letters: N prompts or slots, U positions, K KV heads, H heads, C head size, M queries that share a KV head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gdro_jax import precision
from gdro_jax.models import recompute


class KV(NamedTuple):
    """Keys and values of a stack of layers, of N prompts or slots, filled from the left, as attention reads them.

    Attributes:
      k, v: [layers, N, K, U, C].
      k_scale, v_scale: float32[layers, N, K, U], what int8 entries are multiplied by, one for each vector; else None.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    def layer(self, number: int | jax.Array) -> "KV":
        """One layer, without the axis of layers."""
        return jax.tree.map(lambda x: x[number], self)


class Part(NamedTuple):
    """Attention over one piece of context: largest score, sum of weights [S, K, H/K], mixed values [S, K, H/K, C]."""

    top: jax.Array
    total: jax.Array
    mixed: jax.Array


def over(q: jax.Array, kv: KV, mask: jax.Array) -> Part:
    """Attention of q [N, K, M, C] over one layer's keys and values of U positions where mask bool[N, U]."""
    products = _products(q, kv.k.astype(q.dtype))
    if kv.k_scale is not None:
        products = products * kv.k_scale[:, :, None]
    scores = jnp.where(mask[:, None, None], products * q.shape[-1] ** -0.5, recompute.MASKED)
    top = scores.max(-1)
    weights = jnp.exp(scores - top[..., None])
    scaled = weights if kv.v_scale is None else weights * kv.v_scale[:, :, None]
    values = kv.v.astype(q.dtype)
    mixed = precision.einsum("nkmu,nkuc->nkmc", scaled.astype(q.dtype), values)
    return Part(top, weights.sum(-1), mixed)


def _products(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [N, K, M, C] times keys [N, K, U, C]: float32[N, K, M, U].

    The CPU's product of matrices is slow where the second is laid out so: a few queries are better taken one by one.
    """

    def at_once(q: jax.Array, k: jax.Array) -> jax.Array:
        return precision.einsum("nkmc,nkuc->nkmu", q, k)

    def one_by_one(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.concatenate([at_once(q[:, :, m : m + 1], k) for m in range(q.shape[2])], axis=2)

    return jax.lax.platform_dependent(q, k, cpu=one_by_one if q.shape[2] <= 4 else at_once, default=at_once)


def merge(parts: list[Part]) -> jax.Array:
    """Mixed values [S, K, H/K, C] under one softmax over all pieces; an empty piece weighs nothing."""
    top = jnp.max(jnp.stack([part.top for part in parts]), axis=0)
    scales = [jnp.exp(part.top - top) for part in parts]
    total = sum(scale * part.total for scale, part in zip(scales, parts, strict=True))
    return jnp.asarray(sum((s / total)[..., None] * p.mixed for s, p in zip(scales, parts, strict=True)))
