"""Grouped-query attention over several pieces of context under one softmax, with a gradient that keeps no weights.

Forward keeps queries, keys, values, the output and a number a query (the log of the softmax's sum); backward makes the
weights again, as flash attention does (arXiv 2205.14135, algorithm 4): nothing of size queries x context is held
from one pass to the other. Queries go a block at a time, so that keys which lie behind a whole block are skipped.
Letters: N rows, S queries, U keys, H heads, K KV heads, C head size, A queries of a KV head's group, H / K * S.
"""

import functools

import jax
import jax.numpy as jnp

from gdro_jax import precision

MASKED = -1e30  # finite, so that a row with nothing to attend to gives finite garbage, never NaN
BLOCKS, SHORTEST = 4, 64  # a causal piece is cut into at most so many blocks, of at least so many queries

Part = tuple[jax.Array, jax.Array, jax.Array]

_product = precision.einsum


def attend(q: jax.Array, parts: list[Part]) -> jax.Array:
    """Softmax attention; scores and sums are float32.

    Args:
      q: [N, S, H, C].
      parts: (k, v, mask) with k, v [N, U, K, C] and mask bool[N, S, U]; pieces may differ in U. The last is of the
        queries' own sequence, U = S, and its mask lets no query see a key behind it.

    Returns:
      [N, S, H, C].
    """
    size = _block_size(q.shape[1])
    return jnp.concatenate([_block(q, parts, start, size) for start in range(0, q.shape[1], size)], axis=1)


def pairs(queries: int, before: int) -> int:
    """Query-key pairs that `attend` works through for one row with so many keys before its own."""
    size = _block_size(queries)
    ends = [min(start + size, queries) for start in range(0, queries, size)]
    return sum((end - start) * (before + end) for start, end in zip([0, *ends], ends, strict=False))


def _block_size(queries: int) -> int:
    return max(SHORTEST, -(-queries // BLOCKS))


def _block(q: jax.Array, parts: list[Part], start: int, size: int) -> jax.Array:
    """The queries [start, start + size), which see no key of their own sequence at start + size or behind."""
    end = min(start + size, q.shape[1])
    q, (k, v, mask) = q[:, start:end], parts[-1]
    cut = [(k, v, mask[:, start:end]) for k, v, mask in parts[:-1]]
    cut.append((k[:, :end], v[:, :end], mask[:, start:end, :end]))
    k, v, mask = (jnp.concatenate(x, axis) for x, axis in zip(zip(*cut, strict=True), (1, 1, 2), strict=True))
    q, scale = _scaled(q)
    mixed = _attend(scale, grouped(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    return ungrouped(mixed, q.shape[1])


def grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[N, S, H, C] as [N, K, A, C]: a KV head's queries together."""
    n, s, _, c = x.shape
    return x.reshape(n, s, kv_heads, -1, c).transpose(0, 2, 3, 1, 4).reshape(n, kv_heads, -1, c)


def ungrouped(x: jax.Array, queries: int) -> jax.Array:
    """Back: [N, K, A, C] of S queries as [N, S, H, C]."""
    n, kv_heads, _, c = x.shape
    return x.reshape(n, kv_heads, -1, queries, c).transpose(0, 3, 1, 2, 4).reshape(n, queries, -1, c)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale: float, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [N, K, A, C], k, v [N, K, U, C], mask bool[N, S, U] -> [N, K, A, C]; scores are `scale` q k."""
    return _forward(scale, q, k, v, mask)[0]


def _scaled(q: jax.Array) -> tuple[jax.Array, float]:
    """Queries times C ** -0.5, and what of that the scores still need: queries of few bits are not rounded again."""
    scale = q.shape[-1] ** -0.5
    return (q * scale, 1.0) if q.dtype == jnp.float32 else (q, scale)


def _scores(scale: float, q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """float32[N, K, A, U], masked."""
    scores = _product("nkac,nkuc->nkau", q, k) * scale
    n, kv_heads, _, u = scores.shape
    by_query = scores.reshape(n, kv_heads, -1, mask.shape[1], u)
    return jnp.where(mask[:, None, None], by_query, MASKED).reshape(scores.shape)


def _of_keys(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Sums over queries, [..., U, C], of x [..., A, C] weighed by [..., A, U].

    In this order of the operands it is the fastest on CPUs, where a product is slow whose first operand has the summed
    axis before the kept one, and long.
    """
    return _product("...ac,...au->...cu", x, weights).swapaxes(-1, -2)


def _forward(
    scale: float, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scores = _scores(scale, q, k, mask)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = (_product("nkau,nkuc->nkac", weights.astype(v.dtype), v) / total).astype(v.dtype)
    return out, (q, k, v, mask, out, top + jnp.log(total))


def _backward(scale: float, saved: tuple[jax.Array, ...], bar: jax.Array) -> tuple:
    q, k, v, mask, out, logsum = saved
    weights = jnp.exp(_scores(scale, q, k, mask) - logsum)
    v_bar = _of_keys(bar, weights.astype(v.dtype))
    slope = (bar.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    scores_bar = (weights * (_product("nkac,nkuc->nkau", bar, v) - slope) * scale).astype(q.dtype)
    q_bar = _product("nkau,nkuc->nkac", scores_bar, k)
    return q_bar.astype(q.dtype), _of_keys(q, scores_bar).astype(k.dtype), v_bar.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
