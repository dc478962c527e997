"""Keys and values in pages: a slot holds as many as its row has tokens, and gives them back when the row ends.

The whole pages of a prompt are written once and read by all its rows; the tokens left over are copied into the first
page that a row takes for itself (a page has one writer). Pages that no prompt and no row holds are free for any slot:
which pages a row has never changes what it reads. As in PagedAttention (arXiv 2309.06180), inside one compiled loop.
Letters: Z pages of a pool, B tokens of a page, M pages of the longest row, M' of the longest prompt, K KV heads,
C head size, otherwise as in `decode`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gdro_jax.models import qwen3
from gdro_jax.models.decode import stack_slices
from gdro_jax.models.sharding import over_heads


class Pages(NamedTuple):
    """Pools and who holds which page; page z of a prompt or row is page z of every layer.

    Attributes:
      pools: stack by stack [layers, Z, B, 2K, C], of each head its keys and then its values.
      table: int32[S, M], the pages of each slot's row in order, its prompt's first; meaningless past its end.
      prompts: int32[P, M'], the pages of each prompt; Z past its end.
      free: int32[Z], the first `left` of them are the free pages; left: int32[1].
    """

    pools: tuple[jax.Array, ...]
    table: jax.Array
    prompts: jax.Array
    free: jax.Array
    left: jax.Array


class Writing(NamedTuple):
    """What each slot is about to write: token `position` of a row of `prompt`, if `going`; int32[S] and bool[S]."""

    going: jax.Array
    position: jax.Array
    prompt: jax.Array


def page_of(pages: Pages) -> int:
    """B."""
    return pages.pools[0].shape[2]


def number_of(tokens: int, page: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // page)


def own(tokens: int, page: int) -> int:
    """Most pages that a row of so many tokens takes for itself, wherever in a page its prompt ends."""
    return number_of(tokens + page - 1, page)


def empty(
    kv: qwen3.PromptKV, length: jax.Array, slots: int, window: int, longest: int, page: int, dtype: str | None
) -> Pages:
    """Zeroed pages for prompts, and for the rows of all slots at `window` tokens each on average.

    What prompts shorter than L leave is free for rows too.

    Args:
      kv: of any prompts of L tokens, of which shapes and dtypes matter.
      length: int32[P], tokens of the prompts.
      slots: S.
      window: tokens of a row that there is room for in every slot, some may have more where others have less.
      longest: most tokens of a row.
      page: B.
      dtype: of keys and values while they are kept, None for the one they have.
    """
    most = number_of(kv.k.shape[2], page)
    total = len(length) * most + slots * own(window, page)
    counts = -(-length // page)
    place = jnp.arange(most)
    prompts = jnp.where(place < counts[:, None], (jnp.cumsum(counts) - counts)[:, None] + place, total)
    heads, width = kv.k.shape[3:]

    def pool(layers: int) -> jax.Array:
        return split_heads(jnp.zeros((layers, total, page, 2 * heads, width), dtype or kv.k.dtype))

    return Pages(
        pools=tuple(pool(part.stop - part.start) for part in stack_slices(len(kv.k))),
        table=jnp.zeros((slots, number_of(kv.k.shape[2] + longest, page)), jnp.int32),
        prompts=prompts.astype(jnp.int32),
        free=total - 1 - jnp.arange(total, dtype=jnp.int32),  # prompts hold the lowest
        left=total - counts.sum(dtype=jnp.int32)[None],
    )


def split_heads(pool: jax.Array) -> jax.Array:
    """A pool with its heads over the tensor axis of the mesh that it is computed on, where that divides them."""
    *before, both, width = pool.shape
    apart = over_heads(pool.reshape(*before, both // 2, 2, width), len(before))
    return apart.reshape(pool.shape)


def put(pages: Pages, kv: qwen3.PromptKV, begin: jax.Array | int) -> Pages:
    """Writes prompts of number `begin` and following into their pages, a page at a time and no padding."""
    page, (layers, number, length, heads, width) = page_of(pages), kv.k.shape
    ids = jax.lax.dynamic_slice_in_dim(pages.prompts, begin, number).reshape(-1)
    total = pages.free.shape[0]
    order = jnp.argsort(ids >= total, stable=True)

    def paged(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -length % page), (0, 0), (0, 0)))
        return x.reshape(layers, ids.shape[0], page, heads, width)

    both = jnp.stack([paged(kv.k), paged(kv.v)], axis=4).reshape(layers, ids.shape[0], page, 2 * heads, width)

    def one(at: jax.Array, pools: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        new = jax.lax.dynamic_slice_in_dim(both, order[at], 1, axis=1)
        parts = zip(pools, stack_slices(layers), strict=True)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(pool, new[part].astype(pool.dtype), ids[order[at]], axis=1)
            for pool, part in parts
        )

    pools = jax.lax.fori_loop(0, (ids < total).sum(), one, pages.pools)
    return pages._replace(pools=tuple(map(split_heads, pools)))


def _fresh(pages: Pages, length: jax.Array, writing: Writing) -> jax.Array:
    """Which slots need another page for what they write: bool[S]."""
    first = writing.position == 0
    return writing.going & (first | ((length[writing.prompt] + writing.position) % page_of(pages) == 0))


def short(pages: Pages, length: jax.Array, writing: Writing) -> jax.Array:
    """Whether there are fewer free pages than slots that need one, bool."""
    return _fresh(pages, length, writing).sum() > pages.left[0]


def take(pages: Pages, length: jax.Array, writing: Writing) -> Pages:
    """Gives each slot the page it writes to; there must be enough (`short`).

    Args:
      pages: as they are.
      length: int32[P], tokens of each prompt.
      writing: a slot at position 0 gets its prompt's pages, and a copy of the last one where that is not full.
    """
    page, slots = page_of(pages), jnp.arange(pages.table.shape[0])
    begins, whole = writing.going & (writing.position == 0), length[writing.prompt] // page
    shared = pages.prompts[writing.prompt]
    shared = jnp.pad(shared, ((0, 0), (0, pages.table.shape[1] - shared.shape[1])))
    shared = jnp.where(jnp.arange(pages.table.shape[1]) < whole[:, None], shared, 0)
    table = jnp.where(begins[:, None], shared, pages.table)

    fresh = _fresh(pages, length, writing)
    new = pages.free[jnp.maximum(pages.left[0] - jnp.cumsum(fresh), 0)]
    at = (length[writing.prompt] + writing.position) // page
    table = table.at[jnp.where(fresh, slots, len(slots)), at].set(new, mode="drop")

    copied = begins & (length[writing.prompt] % page > 0)
    order = jnp.argsort(~copied, stable=True)
    last = pages.prompts[writing.prompt, jnp.minimum(whole, pages.prompts.shape[1] - 1)]

    def copy(number: jax.Array, pools: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slot = order[number]
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(
                pool, jax.lax.dynamic_slice_in_dim(pool, last[slot], 1, axis=1), new[slot], axis=1
            )
            for pool in pools
        )

    pools = jax.lax.fori_loop(0, copied.sum(), copy, pages.pools)
    return pages._replace(pools=pools, table=table, left=pages.left - fresh.sum(dtype=jnp.int32))


def give_back(pages: Pages, length: jax.Array, ended: Writing) -> Pages:
    """Frees what rows took for themselves; `ended.position` is how many of their own tokens are in pages."""
    page, total = page_of(pages), pages.free.shape[0]
    until = (length[ended.prompt] + ended.position)[:, None]
    place = jnp.arange(pages.table.shape[1])
    theirs = (ended.going & (ended.position > 0))[:, None]
    theirs &= (place >= (length[ended.prompt] // page)[:, None]) & (place * page < until)
    theirs, held = theirs.reshape(-1), pages.table.reshape(-1)
    to = jnp.where(theirs, pages.left[0] + jnp.cumsum(theirs) - 1, total)
    return pages._replace(free=pages.free.at[to].set(held, mode="drop"), left=pages.left + theirs.sum(dtype=jnp.int32))


def resize(pages: Pages, keep: jax.Array, window: int) -> Pages:
    """The pages of some of the slots int32[S'], with room for `window` tokens each on average, no less than before."""
    before, (prompts, most) = pages.free.shape[0], pages.prompts.shape
    total = prompts * most + len(keep) * own(window, page_of(pages))
    more = total - before
    free = jnp.pad(pages.free, (0, more))
    free = jax.lax.dynamic_update_slice_in_dim(free, jnp.arange(before, total, dtype=jnp.int32), pages.left[0], axis=0)
    grown = (jnp.pad(pool, ((0, 0), (0, more), (0, 0), (0, 0), (0, 0))) for pool in pages.pools)
    return Pages(
        pools=tuple(map(split_heads, grown)),
        table=pages.table[keep],
        prompts=jnp.where(pages.prompts == before, total, pages.prompts),
        free=free,
        left=pages.left + more,
    )
