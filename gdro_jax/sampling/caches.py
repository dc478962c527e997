"""Keys and values of a call, one way or the other: as long in every slot, or in pages; the rest need not know which."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from gdro_jax.models import decode, paged, pages, qwen3
from gdro_jax.models.pages import Pages, Writing
from gdro_jax.sampling.config import SamplingConfig

Cache = decode.Cache | Pages
Held = TypeVar("Held")
_PREFILLED_AT_ONCE = 8192  # prompt tokens


def start(
    model: qwen3.Qwen3,
    tokens: jax.Array,
    mask: jax.Array,
    slots: int,
    window: int,
    config: SamplingConfig,
    in_pages: bool,
) -> tuple[decode.Prompts, jax.Array, Cache]:
    """Runs the prompts int32[P, L].

    Returns:
      The prompts, their last hidden states [P, D] and an empty cache of the slots, `window` tokens each. In pages the
      prompts lie there too, and `Prompts` has nothing but their lengths.
    """
    if not in_pages:

        def laid_out(kv: qwen3.PromptKV) -> decode.Prompts:
            return decode.lay_out(kv, config.cache_dtype)

        def blank(kv: qwen3.PromptKV) -> decode.Prompts:
            return decode.empty_prompts(jax.eval_shape(laid_out, kv), len(tokens))

        prompts, last = _prefill(
            model, tokens, mask, laid_out, blank, lambda x, kv, at: decode.put(x, laid_out(kv), at)
        )
        return prompts, last, decode.empty_cache(prompts, slots, window)

    length, longest = mask.sum(-1, dtype=jnp.int32), config.max_new_tokens

    def empty(kv: qwen3.PromptKV) -> Pages:
        return pages.empty(kv, length, slots, window, longest, config.page_tokens, config.cache_dtype)

    cache, last = _prefill(model, tokens, mask, lambda kv: pages.put(empty(kv), kv, 0), empty, pages.put)
    return decode.Prompts((), length), last, cache


def _prefill(
    model: qwen3.Qwen3,
    tokens: jax.Array,
    mask: jax.Array,
    kept: Callable[[qwen3.PromptKV], Held],
    blank: Callable[[qwen3.PromptKV], Held],
    put: Callable[[Held, qwen3.PromptKV, jax.Array], Held],
) -> tuple[Held, jax.Array]:
    """Prompts and their last hidden states, a few prompts at a time: attention needs a lot of memory meanwhile.

    Every pass runs equally many; where they do not come out even the last pass runs some of those before once more.

    Args:
      model, tokens, mask: as in `start`.
      kept: what is kept of prompts that are run at once; blank: what that is before a first pass, from shapes of one
        prompt; put: that with some prompts, from a number on.
    """
    number, length = tokens.shape
    passes = -(-number // max(1, _PREFILLED_AT_ONCE // length))
    size = -(-number // passes)
    if passes == 1:
        kv, last = qwen3.prefill(model, tokens, mask)
        return kept(kv), last

    def one(at: jax.Array, held: tuple[Held, jax.Array]) -> tuple[Held, jax.Array]:
        begin = jnp.minimum(at * size, number - size)
        kv, last = qwen3.prefill(model, *(jax.lax.dynamic_slice_in_dim(x, begin, size) for x in (tokens, mask)))
        return put(held[0], kv, begin), jax.lax.dynamic_update_slice_in_dim(held[1], last, begin, 0)

    shapes, shape = jax.eval_shape(lambda: qwen3.prefill(model, tokens[:1], mask[:1]))
    return jax.lax.fori_loop(0, passes, one, (blank(shapes), jnp.zeros((number, shape.shape[1]), shape.dtype)))


def full(cache: Cache, prompts: decode.Prompts, writing: Writing) -> jax.Array:
    """Whether the next tokens may find no place: int32, 0 or 1."""
    if isinstance(cache, Pages):
        return pages.short(cache, prompts.length, writing).astype(jnp.int32)
    longest = jnp.where(writing.going, writing.position, 0).max()
    return (longest >= decode.window_of(cache)).astype(jnp.int32)


def advance(
    model: qwen3.Qwen3,
    token: jax.Array,
    writing: Writing,
    ended: jax.Array,
    prompts: decode.Prompts,
    cache: Cache,
    tile: int,
    reader: str | None,
) -> tuple[jax.Array, Cache]:
    """Runs the tokens just drawn int32[S], but those of rows that ended with them are not kept.

    Args:
      model: the policy.
      token: of `writing.position`, in slots that are `writing.going`.
      writing: of all rows in slots; ended: bool[S], which of them have ended.
      prompts, cache: of `start`.
      tile: static, slots that read a prompt together in a contiguous cache.
      reader: static, of `paged.choose`.
    """
    if not isinstance(cache, Pages):
        tiles = decode.tiles_of(writing.prompt, len(prompts.length), tile)
        return decode.decode(model, token, writing.position, writing.prompt, prompts, tiles, cache)
    cache = pages.give_back(cache, prompts.length, writing._replace(going=ended))
    writing = writing._replace(going=writing.going & ~ended)
    cache = pages.take(cache, prompts.length, writing)
    return paged.step(model, token, writing, prompts.length, cache, reader or "gather")


def resize(cache: Cache, keep: jax.Array, window: int) -> Cache:
    """The cache of some of the slots int32[S'], `window` tokens each."""
    return pages.resize(cache, keep, window) if isinstance(cache, Pages) else decode.resize(cache, keep, window)
