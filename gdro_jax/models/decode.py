"""One token per slot over shared prompts: what the sampler adds to `prefill` and `extend`.

A prompt's keys and values lie once in memory and are read once per *tile*, a handful of slots that decode rows of the
same prompt; a slot owns only its response's. The pieces are merged under one softmax by their running maxima, as in
FlashAttention (arXiv 2205.14135, section 3.1), so the result is that of `extend` up to rounding.
Letters: S slots, W window (positions of the response cache), U positions of either, N tiles, G slots of a tile,
otherwise as in `qwen3`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdro_jax.models import qwen3, recompute


class KV(NamedTuple):
    """One layer's keys and values of N prompts or slots, filled from the left, as attention reads them.

    Attributes:
      k: [N, K, C, U]; scores then run along positions.
      v: [N, K, U, C]; mixed values then run along the head.
      k_scale, v_scale: float32[N, K, U], what int8 entries are multiplied by, one for each vector; else None.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    def each(self, function: Callable[[jax.Array, int], jax.Array]) -> "KV":
        """`function` of every array and of the axis along which its positions lie."""
        scales = (None if x is None else function(x, 2) for x in (self.k_scale, self.v_scale))
        return KV(function(self.k, 3), function(self.v, 2), *scales)


class Prompts(NamedTuple):
    """Keys and values of P prompts, layer by layer (U = L), and int32[P] real tokens of each."""

    layers: tuple[KV, ...]
    length: jax.Array


Cache = tuple[KV, ...]
"""Keys and values of S slots, layer by layer (U = W). Each layer's arrays are its own, so that none is ever copied."""


class Tiles(NamedTuple):
    """Which slots read which prompt together.

    Attributes:
      prompt: int32[N]; slots: int32[N, G], 0 where a lane is empty.
      tile, lane: int32[S], where each slot's share of the result stands.
    """

    prompt: jax.Array
    slots: jax.Array
    tile: jax.Array
    lane: jax.Array


class _Part(NamedTuple):
    """Attention over one piece of context: largest score, sum of weights [S, K, H/K], mixed values [S, K, H/K, C]."""

    top: jax.Array
    total: jax.Array
    mixed: jax.Array


def lay_out(kv: qwen3.PromptKV, dtype: str | None = None) -> Prompts:
    """Prompts in the order decoding reads, kept in `dtype`: `bfloat16`, `int8`, or None for the dtype they have."""

    def one(k: jax.Array, v: jax.Array) -> KV:
        (k, k_scale), (v, v_scale) = _kept(k, dtype or k.dtype), _kept(v, dtype or v.dtype)
        scales = (None if x is None else x.swapaxes(1, 2) for x in (k_scale, v_scale))
        return KV(k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), *scales)

    return Prompts(tuple(one(k, v) for k, v in zip(kv.k, kv.v, strict=True)), kv.length)


def _kept(x: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array | None]:
    """Vectors [..., C] in `dtype` and, for int8, what to multiply each by: float32[...]."""
    if jnp.dtype(dtype) != jnp.int8:
        return x.astype(dtype), None
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(-1), 1e-30) / 127.0
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def empty_cache(prompts: Prompts, slots: int, window: int) -> Cache:
    """A zeroed cache, kept as the prompts are."""

    def blank(x: jax.Array, axis: int) -> jax.Array:
        return jnp.zeros((slots, *x.shape[1:axis], window, *x.shape[axis + 1 :]), x.dtype)

    return tuple(layer.each(blank) for layer in prompts.layers)


def window_of(cache: Cache) -> int:
    """W."""
    return cache[0].v.shape[2]


def resize(cache: Cache, slots: jax.Array, window: int) -> Cache:
    """The cache of some of the slots int32[S'], with `window` positions."""
    more = window - window_of(cache)

    def moved(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x[slots], [(0, more if a == axis else 0) for a in range(x.ndim)])

    return tuple(layer.each(moved) for layer in cache)


def tiles_of(prompt: jax.Array, num_prompts: int, size: int) -> Tiles:
    """Packs slots of the same prompt into tiles of up to `size`.

    Args:
      prompt: int32[S], the prompt of each slot.
      num_prompts: P, from which the number of tiles N that always suffices is worked out.
      size: G.
    """
    slots = prompt.shape[0]
    number = min(slots, (slots + min(num_prompts, slots) * (size - 1)) // size)
    order = jnp.argsort(prompt)
    ordered = prompt[order]
    place = jnp.arange(slots)
    new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    rank = place - jax.lax.cummax(jnp.where(new, place, 0))
    tile, lane = jnp.cumsum(rank % size == 0) - 1, rank % size
    return Tiles(
        prompt=jnp.zeros(number, jnp.int32).at[tile].set(ordered),
        slots=jnp.zeros((number, size), jnp.int32).at[tile, lane].set(order.astype(jnp.int32)),
        tile=jnp.zeros(slots, jnp.int32).at[order].set(tile.astype(jnp.int32)),
        lane=jnp.zeros(slots, jnp.int32).at[order].set(lane.astype(jnp.int32)),
    )


def decode(
    model: qwen3.Qwen3,
    token: jax.Array,
    position: jax.Array,
    prompt: jax.Array,
    prompts: Prompts,
    tiles: Tiles,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Runs one more token per slot.

    Args:
      token: int32[S], response token number `position` of each slot's row.
      position: int32[S], how many positions of the slot's cache are filled; at W or beyond nothing is kept.
      prompt: int32[S], the prompt of each slot.
      prompts: of P prompts.
      tiles: `tiles_of(prompt, P, ...)`.
      cache: the slots' own keys and values.

    Returns:
      The final hidden state [S, D], which predicts response token `position + 1`, and the cache with one more filled.
    """
    turn = qwen3.rotation(model.config, (prompts.length[prompt] + position)[:, None])
    window, length = window_of(cache), prompts.layers[0].v.shape[2]
    own = jnp.arange(window) <= position[:, None]
    seen = jnp.arange(length) < prompts.length[tiles.prompt][:, None]

    def attend(shared: KV, mine: KV, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KV]:
        filled = _with(mine, position, k[:, 0], v[:, 0])  # first, so that it is written where it lies
        q = q.reshape(q.shape[0], k.shape[2], -1, q.shape[-1])  # [S, K, H / K, C]
        mixed = _merge([_over_prompts(q, shared, seen, tiles), _over(q, filled, own)]).astype(v.dtype)
        return mixed.reshape(mixed.shape[0], 1, -1, mixed.shape[-1]), filled

    # Not scanned: a scan would copy every layer's weights, keys and values out of their stacks at every token.
    x, stacked, filled = qwen3.embed_tokens(model, token[:, None]), qwen3.block_weights(model), []
    for number, (shared, mine) in enumerate(zip(prompts.layers, cache, strict=True)):
        weights = {name: array[number] for name, array in stacked.items()}
        x, kept = qwen3.run_block(model.config, weights, x, turn, functools.partial(attend, shared, mine))
        filled.append(kept)
    return qwen3.final_norm(model, x[:, 0]), tuple(filled)


def _with(cache: KV, position: jax.Array, k: jax.Array, v: jax.Array) -> KV:
    """The cache with k, v [S, K, C] at a position int32[S] of each slot; beyond its end nothing is kept."""
    slot = jnp.arange(position.shape[0])
    (k, k_scale), (v, v_scale) = _kept(k, cache.k.dtype), _kept(v, cache.v.dtype)

    def put(place: Any, new: jax.Array | None) -> jax.Array:
        return place.set(new, mode="drop", unique_indices=True)

    return KV(
        put(cache.k.at[slot, :, :, position], k),
        put(cache.v.at[slot, :, position], v),
        None if cache.k_scale is None else put(cache.k_scale.at[slot, :, position], k_scale),
        None if cache.v_scale is None else put(cache.v_scale.at[slot, :, position], v_scale),
    )


def _over(q: jax.Array, kv: KV, mask: jax.Array) -> _Part:
    """Attention of q [N, K, M, C] over keys and values of U positions where mask bool[N, U]."""
    products = jnp.einsum("nkmc,nkcu->nkmu", q, kv.k.astype(q.dtype), preferred_element_type=jnp.float32)
    if kv.k_scale is not None:
        products = products * kv.k_scale[:, :, None]
    scores = jnp.where(mask[:, None, None], products * q.shape[-1] ** -0.5, recompute.MASKED)
    top = scores.max(-1)
    weights = jnp.exp(scores - top[..., None])
    scaled = weights if kv.v_scale is None else weights * kv.v_scale[:, :, None]
    values = kv.v.astype(q.dtype)
    mixed = jnp.einsum("nkmu,nkuc->nkmc", scaled.astype(q.dtype), values, preferred_element_type=jnp.float32)
    return _Part(top, weights.sum(-1), mixed)


def _over_prompts(q: jax.Array, prompts: KV, mask: jax.Array, tiles: Tiles) -> _Part:
    """The same over P prompts: each tile reads its prompt once for all its slots."""
    number, size = tiles.slots.shape
    _, heads, group, width = q.shape
    packed = q[tiles.slots].swapaxes(1, 2).reshape(number, heads, size * group, width)
    part = _over(packed, jax.tree.map(lambda x: x[tiles.prompt], prompts), mask)

    def unpack(x: jax.Array) -> jax.Array:
        return x.reshape(number, heads, size, group, *x.shape[3:])[tiles.tile, :, tiles.lane]

    return _Part(*map(unpack, part))


def _merge(parts: list[_Part]) -> jax.Array:
    """Mixed values [S, K, H/K, C] under one softmax over all pieces; an empty piece weighs nothing."""
    top = jnp.max(jnp.stack([part.top for part in parts]), axis=0)
    scales = [jnp.exp(part.top - top) for part in parts]
    total = sum(scale * part.total for scale, part in zip(scales, parts, strict=True))
    return jnp.asarray(sum((s / total)[..., None] * p.mixed for s, p in zip(scales, parts, strict=True)))
