"""One token per slot over shared prompts: what the sampler adds to `prefill` and `extend`.

A prompt's keys and values lie once in memory and are read once per *tile*, a handful of slots that decode rows of the
same prompt; a slot owns only its response's. The pieces are merged under one softmax by their running maxima, as in
FlashAttention (arXiv 2205.14135, section 3.1), so the result is that of `extend` up to rounding.
Letters: S slots, W window (positions of the response cache), U positions of either, N tiles, G slots of a tile,
otherwise as in `qwen3`.

Layers lie in *stacks*: one for each layer of a shallow model, one of all layers of a deep one. Layers of one stack are
run by a loop that carries their cache, so that the program does not grow with depth. A loop reads a layer out of its
stack, which on the CPU costs a copy (15 % of the tokens a second of a small model): hence not for shallow models.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gdro_jax.models import qwen3, recompute
from gdro_jax.models.sharding import over_heads

UNROLLED = 8  # layers of the deepest model whose layers are not looped over


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


class Prompts(NamedTuple):
    """Keys and values of P prompts, stack by stack (U = L), and int32[P] real tokens of each."""

    stacks: tuple[KV, ...]
    length: jax.Array


Cache = tuple[KV, ...]
"""Keys and values of S slots, stack by stack (U = W). A stack is written where it lies and never copied as a whole."""


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

    def stack(k: jax.Array, v: jax.Array) -> KV:
        (k, k_scale), (v, v_scale) = _kept(k, dtype or k.dtype), _kept(v, dtype or v.dtype)
        scales = (None if x is None else x.swapaxes(2, 3) for x in (k_scale, v_scale))
        return _split(KV(k.swapaxes(2, 3), v.swapaxes(2, 3), *scales))

    layers = len(kv.k)
    size = 1 if layers <= UNROLLED else layers
    parts = [slice(start, start + size) for start in range(0, layers, size)]
    return Prompts(tuple(stack(kv.k[part], kv.v[part]) for part in parts), kv.length)


def _split(kv: KV) -> KV:
    """Heads over the tensor axis of the mesh that it is computed on: the compiler would not find that by itself."""
    return jax.tree.map(lambda x: over_heads(x, 2), kv)


def _kept(x: jax.Array, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array | None]:
    """Vectors [..., C] in `dtype` and, for int8, what to multiply each by: float32[...]."""
    if jnp.dtype(dtype) != jnp.int8:
        return x.astype(dtype), None
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(-1), 1e-30) / 127.0
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def empty_prompts(like: Prompts, number: int) -> Prompts:
    """Zeroed keys and values of `number` prompts, otherwise as those of `like`, of which shapes and dtypes matter."""
    stacks = (_blank(stack, number, stack.v.shape[3]) for stack in like.stacks)
    return Prompts(tuple(stacks), jnp.zeros(number, jnp.int32))


def put(prompts: Prompts, new: Prompts, begin: jax.Array) -> Prompts:
    """The prompts with some of them, from number `begin` on, replaced."""
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=begin)
    stacks = jax.tree.map(lambda x, y: update(x, y, axis=1), prompts.stacks, new.stacks)
    return Prompts(tuple(map(_split, stacks)), update(prompts.length, new.length, axis=0))


def empty_cache(prompts: Prompts, slots: int, window: int) -> Cache:
    """A zeroed cache, kept as the prompts are."""
    return tuple(_blank(stack, slots, window) for stack in prompts.stacks)


def _blank(like: KV, number: int, window: int) -> KV:
    return _split(
        jax.tree.map(lambda x: jnp.zeros((x.shape[0], number, x.shape[2], window, *x.shape[4:]), x.dtype), like)
    )


def window_of(cache: Cache) -> int:
    """W."""
    return cache[0].v.shape[3]


def resize(cache: Cache, slots: jax.Array, window: int) -> Cache:
    """The cache of some of the slots int32[S'], with `window` positions."""
    more = window - window_of(cache)

    def moved(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, slots], [(0, more if axis == 3 else 0) for axis in range(x.ndim)])

    return tuple(_split(jax.tree.map(moved, stack)) for stack in cache)


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
    window, length = window_of(cache), prompts.stacks[0].v.shape[3]
    own = jnp.arange(window) <= position[:, None]
    seen = jnp.arange(length) < prompts.length[tiles.prompt][:, None]
    stacked = qwen3.block_weights(model)

    def attend(
        shared: KV, mine: KV, at: int | jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, KV]:
        filled = _with(mine, at, position, k[:, 0], v[:, 0])  # first, so that it is written where it lies
        q = q.reshape(q.shape[0], k.shape[2], -1, q.shape[-1])  # [S, K, H / K, C]
        mixed = _merge([_over_prompts(q, shared.layer(at), seen, tiles), _over(q, filled.layer(at), own)]).astype(
            v.dtype
        )
        return mixed.reshape(mixed.shape[0], 1, -1, mixed.shape[-1]), filled

    def block(before: int, shared: KV, at: int | jax.Array, carry: tuple[jax.Array, KV]) -> tuple[jax.Array, KV]:
        x, mine = carry
        weights = {name: array[before + at] for name, array in stacked.items()}
        return qwen3.run_block(model.config, weights, x, turn, functools.partial(attend, shared, mine, at))

    x, filled, before = qwen3.embed_tokens(model, token[:, None]), [], 0
    for shared, mine in zip(prompts.stacks, cache, strict=True):
        step, layers = functools.partial(block, before, shared), len(mine.v)
        x, kept = step(0, (x, mine)) if layers == 1 else jax.lax.fori_loop(0, layers, step, (x, mine))
        filled.append(kept)
        before += layers
    return qwen3.final_norm(model, x[:, 0]), tuple(filled)


def _with(cache: KV, layer: int | jax.Array, position: jax.Array, k: jax.Array, v: jax.Array) -> KV:
    """The cache with k, v [S, K, C] in a layer, at a position int32[S] of each slot; beyond its end nothing is kept."""
    (k, k_scale), (v, v_scale) = _kept(k, cache.k.dtype), _kept(v, cache.v.dtype)
    # By head too, so that a vector is what is written: otherwise a TPU turns the whole cache round to write all heads.
    place = layer, jnp.arange(k.shape[0])[:, None], jnp.arange(k.shape[1]), position[:, None]

    def put(held: jax.Array, new: jax.Array) -> jax.Array:
        return held.at[place].set(new, mode="drop", unique_indices=True)

    return _split(jax.tree.map(put, cache, KV(k, v, k_scale, v_scale)))


def _over(q: jax.Array, kv: KV, mask: jax.Array) -> _Part:
    """Attention of q [N, K, M, C] over one layer's keys and values of U positions where mask bool[N, U]."""
    products = _products(q, kv.k.astype(q.dtype))
    if kv.k_scale is not None:
        products = products * kv.k_scale[:, :, None]
    scores = jnp.where(mask[:, None, None], products * q.shape[-1] ** -0.5, recompute.MASKED)
    top = scores.max(-1)
    weights = jnp.exp(scores - top[..., None])
    scaled = weights if kv.v_scale is None else weights * kv.v_scale[:, :, None]
    values = kv.v.astype(q.dtype)
    mixed = jnp.einsum("nkmu,nkuc->nkmc", scaled.astype(q.dtype), values, preferred_element_type=jnp.float32)
    return _Part(top, weights.sum(-1), mixed)


def _products(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [N, K, M, C] times keys [N, K, U, C]: float32[N, K, M, U].

    The CPU's product of matrices is slow where the second is laid out so: a few queries are better taken one by one.
    """

    def at_once(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.einsum("nkmc,nkuc->nkmu", q, k, preferred_element_type=jnp.float32)

    def one_by_one(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.concatenate([at_once(q[:, :, m : m + 1], k) for m in range(q.shape[2])], axis=2)

    return jax.lax.platform_dependent(q, k, cpu=one_by_one if q.shape[2] <= 4 else at_once, default=at_once)


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
