"""One token per slot over shared prompts: what the sampler adds to `prefill` and `extend`.

A prompt's keys and values lie once in memory and are read once per *tile*, a handful of slots that decode rows of the
same prompt; a slot owns only its response's. The pieces are merged under one softmax by their running maxima, as in
FlashAttention (arXiv 2205.14135, section 3.1), so the result is that of `extend` up to rounding.
Letters: S slots, W window (positions of the response cache), N tiles, G slots of a tile, otherwise as in `qwen3`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gdro_jax.models import attention, qwen3


class Cache(NamedTuple):
    """Keys and values k, v [layers, S, K, W, C], filled from the left."""

    k: jax.Array
    v: jax.Array


class Prompts(NamedTuple):
    """Keys and values of prompts as decoding reads them: k, v [layers, P, K, L, C]; length int32[P] real tokens."""

    k: jax.Array
    v: jax.Array
    length: jax.Array


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


def lay_out(kv: qwen3.PromptKV) -> Prompts:
    """Prompts in the order decoding reads: heads before positions, so that a head's keys are one matrix."""
    return Prompts(kv.k.swapaxes(2, 3), kv.v.swapaxes(2, 3), kv.length)


def empty_cache(prompts: Prompts, slots: int, window: int) -> Cache:
    """A zeroed cache in the dtype of the prompts' keys."""
    layers, _, heads, _, size = prompts.k.shape
    return Cache(*(jnp.zeros((layers, slots, heads, window, size), prompts.k.dtype) for _ in range(2)))


def resize(cache: Cache, slots: jax.Array, window: int) -> Cache:
    """The cache of some of the slots int32[S'], with `window` positions."""
    more = window - cache.k.shape[3]
    return Cache(*(jnp.pad(x[:, slots], ((0, 0),) * 3 + ((0, more), (0, 0))) for x in cache))


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
    window, length = cache.k.shape[3], prompts.k.shape[3]
    own = jnp.arange(window) < position[:, None]
    seen = jnp.arange(length) < prompts.length[tiles.prompt][:, None]

    def block(x: jax.Array, layer: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        weights, shared_k, shared_v, own_k, own_v = layer

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            k, v = k[:, 0], v[:, 0]
            q = q.reshape(*k.shape[:2], -1, k.shape[-1])  # [S, K, H / K, C]
            parts = [
                _over_prompts(q, shared_k, shared_v, seen, tiles),
                _over(q, own_k, own_v, own),
                _Part(_score(jnp.einsum("skgc,skc->skg", q, k, preferred_element_type=jnp.float32), k), *_one(q, v)),
            ]
            mixed = _merge(parts).astype(v.dtype)
            return mixed.reshape(mixed.shape[0], 1, -1, mixed.shape[-1]), (k, v)

        return qwen3.run_block(model.config, weights, x, turn, attend)

    layers = (qwen3.block_weights(model), prompts.k, prompts.v, cache.k, cache.v)
    x, (k, v) = jax.lax.scan(block, qwen3.embed_tokens(model, token[:, None]), layers)
    slot = jnp.arange(token.shape[0])
    filled = Cache(
        *(
            old.at[:, slot, :, position].set(new.swapaxes(0, 1), mode="drop", unique_indices=True)
            for old, new in zip(cache, (k, v), strict=True)
        )
    )
    return qwen3.final_norm(model, x[:, 0]), filled


def _score(products: jax.Array, like: jax.Array) -> jax.Array:
    return products * like.shape[-1] ** -0.5


def _one(q: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of weights and mixed values of the token itself, the only one in its piece."""
    return jnp.ones(q.shape[:3], jnp.float32), jnp.broadcast_to(v[:, :, None].astype(jnp.float32), q.shape)


def _over(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> _Part:
    """Attention of q [N, K, M, C] over k, v [N, K, U, C] where mask bool[N, U]."""
    products = jnp.einsum("nkmc,nkuc->nkmu", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], _score(products, k), attention.MASKED)
    top = scores.max(-1)
    weights = jnp.exp(scores - top[..., None])
    mixed = jnp.einsum("nkmu,nkuc->nkmc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return _Part(top, weights.sum(-1), mixed)


def _over_prompts(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, tiles: Tiles) -> _Part:
    """The same over prompts k, v [P, K, L, C]: each tile reads its prompt once for all its slots."""
    number, size = tiles.slots.shape
    _, heads, group, width = q.shape
    packed = q[tiles.slots].swapaxes(1, 2).reshape(number, heads, size * group, width)
    part = _over(packed, k[tiles.prompt], v[tiles.prompt], mask)

    def unpack(x: jax.Array) -> jax.Array:
        return x.reshape(number, heads, size, group, *x.shape[3:])[tiles.tile, :, tiles.lane]

    return _Part(*map(unpack, part))


def _merge(parts: list[_Part]) -> jax.Array:
    """Mixed values [S, K, H/K, C] under one softmax over all pieces; an empty piece weighs nothing."""
    top = jnp.max(jnp.stack([part.top for part in parts]), axis=0)
    scales = [jnp.exp(part.top - top) for part in parts]
    total = sum(scale * part.total for scale, part in zip(scales, parts, strict=True))
    return jnp.asarray(sum((s / total)[..., None] * p.mixed for s, p in zip(scales, parts, strict=True)))
