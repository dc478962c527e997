"""One token per slot over pages: what `decode` does with a cache of equal length for all.

A row's pages, its prompt's among them, are read in one pass. On a TPU by JAX's own kernel
(`jax.experimental.pallas.ops.tpu.ragged_paged_attention`), which reads the pages that hold something and keeps nothing;
elsewhere by `gather`, the same in plain JAX, which brings together one layer's pages of all slots, full or not.
Letters as in `pages`.
"""

import functools

import jax
import jax.numpy as jnp

from gdro_jax.models import decode, qwen3
from gdro_jax.models.pages import Pages, Writing, page_of, split_heads
from gdro_jax.models.pieces import KV, merge, over
from gdro_jax.models.sharding import TENSOR_AXIS

KINDS = ("auto", "contiguous", "paged")
READERS = ("gather", "kernel")
_LANES, _ROWS = 128, 16  # what a TPU's memory is tiled by, for heads and for tokens of a page
_TABLE_BYTES = 960 * 1024  # of pages' numbers that fit a TPU's memory of scalars, 1 MiB, at a time
_TOKENS_AT_ONCE = 256  # that the kernel reads while it works on those before


def choose(asked: str, platform: str, head_dim: int, heads: int, dtype: str, page: int) -> str | None:
    """What reads the pages of a sampler's cache: one of `READERS`, None for a contiguous cache.

    Args:
      asked: one of `KINDS`; `auto` takes pages on a TPU where its kernel can run, and a contiguous cache elsewhere.
      platform: what it will run on: `cpu`, `gpu`, `tpu`.
      head_dim: C.
      heads: K of one chip.
      dtype: of keys and values while they are kept.
      page: B.

    Raises:
      ValueError: pages are asked for and cannot be; one line that says why.
    """
    if asked not in KINDS:
        raise ValueError(f"cache={asked!r}: must be one of {', '.join(KINDS)}")
    if asked == "contiguous" or (asked == "auto" and platform != "tpu"):
        return None
    why = None
    if dtype == "int8":
        why = "needs cache_dtype=bfloat16 or the model's own, JAX's kernel has one scale for a whole int8 cache"
    elif platform != "tpu":
        return "gather"
    elif head_dim % _LANES:
        why = f"needs heads of a multiple of {_LANES} on a TPU, the model's are of {head_dim}"
    elif page % _ROWS:
        why = f"needs page_tokens of a multiple of {_ROWS} on a TPU, not {page}"
    elif heads not in (1, 2, 4) and heads % 8:
        why = f"needs 1, 2, 4 or a multiple of 8 KV heads on a chip of a TPU, not {heads}"
    if why is None or asked == "auto":
        return "kernel" if why is None else None
    raise ValueError(f"cache={asked!r}: {why}; auto takes what can run")


def step(
    model: qwen3.Qwen3, token: jax.Array, writing: Writing, length: jax.Array, pages: Pages, reader: str
) -> tuple[jax.Array, Pages]:
    """Runs one more token per slot; the pages it is written to have been taken.

    Args:
      model: the policy.
      token: int32[S], response token number `writing.position` of each slot's row.
      writing: nothing is kept of slots that are not going, and what comes out for them is meaningless.
      length: int32[P], tokens of each prompt.
      pages: of the slots.
      reader: one of `READERS`; static.

    Returns:
      The final hidden state [S, D], which predicts the next response token, and the pages with one more token each.
    """
    at = length[writing.prompt] + writing.position
    here = jnp.minimum(at // page_of(pages), pages.table.shape[1] - 1)
    slots = jnp.arange(len(token))
    # Places of slots that are not going lie beyond the pool, each its own: writes are then known not to meet.
    to = jnp.where(writing.going, pages.table[slots, here], pages.free.shape[0] + slots)
    table = jnp.where(writing.going[:, None], pages.table, 0)
    seen = jnp.where(writing.going, at + 1, 1)

    def attend(
        _: int, layer: int | jax.Array, pool: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        mixed, pool = _over_heads(reader)(
            q[:, 0], k[:, 0], v[:, 0], pool, jnp.asarray(layer), table, to, at % page_of(pages), seen
        )
        return mixed[:, None], split_heads(pool)

    turn = qwen3.rotation(model.config, at[:, None])
    hidden, pools = decode.through_layers(model, token, turn, pages.pools, [len(p) for p in pages.pools], attend)
    return hidden, pages._replace(pools=pools)


def _over_heads(reader: str):
    """`_attend`; on a mesh every device for its own heads, which no kernel is split along by itself."""
    local = functools.partial(_attend, reader=reader)

    def split(q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array, *others: jax.Array):
        mesh = jax.sharding.get_abstract_mesh()
        free = set(mesh.axis_names) - set(mesh.manual_axes)
        if not free:
            return local(q, k, v, pool, *others)
        heads = TENSOR_AXIS if TENSOR_AXIS in free and k.shape[1] % mesh.shape[TENSOR_AXIS] == 0 else None
        by_head, whole = jax.P(None, heads, None), jax.P(None, None, None, heads, None)
        return jax.shard_map(
            local,
            in_specs=(by_head, by_head, by_head, whole, *[jax.P()] * len(others)),
            out_specs=(by_head, whole),
            axis_names=free,
            check_vma=False,
        )(q, k, v, pool, *others)

    return split


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: jax.Array,
    layer: jax.Array,
    table: jax.Array,
    to: jax.Array,
    offset: jax.Array,
    seen: jax.Array,
    reader: str,
) -> tuple[jax.Array, jax.Array]:
    """Writes k, v [S, K, C] of a layer to token `offset` of page `to`, and attends q [S, H, C] over `seen` tokens."""
    new = jnp.stack([k, v], axis=2).reshape(len(k), -1, k.shape[2]).astype(pool.dtype)
    pool = pool.at[layer, to, offset].set(new, mode="drop", unique_indices=True)
    layers, total, *rest = pool.shape
    flat, places = pool.reshape(layers * total, *rest), table + layer * total  # a slice of the pool would be a copy
    read = _gather if reader == "gather" else _kernel
    return read(q, flat, places, seen).astype(q.dtype), pool


def _gather(q: jax.Array, pool: jax.Array, table: jax.Array, seen: jax.Array) -> jax.Array:
    slots, page, both, width = len(q), *pool.shape[1:]
    tokens = table.shape[1] * page
    held = pool[table].reshape(slots, tokens, both // 2, 2, width)
    k, v = (held[:, :, :, which].swapaxes(1, 2) for which in (0, 1))
    grouped = q.reshape(slots, both // 2, -1, width)
    mixed = merge([over(grouped, KV(k, v), jnp.arange(tokens) < seen[:, None])])
    return mixed.reshape(q.shape)


def _kernel(q: jax.Array, pool: jax.Array, table: jax.Array, seen: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    def read(some: slice) -> jax.Array:
        rows = len(q[some])
        return ragged_paged_attention(
            q[some],
            pool,
            seen[some],
            table[some],
            jnp.arange(rows + 1, dtype=jnp.int32),  # one query of each row
            jnp.full(1, rows, jnp.int32),
            sm_scale=q.shape[2] ** -0.5,
            num_kv_pages_per_block=max(1, min(table.shape[1], _TOKENS_AT_ONCE // pool.shape[1])),
            num_queries_per_block=1,  # a block is worked on as a whole for each row in it
        )

    most = max(1, _TABLE_BYTES // (4 * _LANES * -(-table.shape[1] // _LANES)))
    return jnp.concatenate([read(slice(start, start + most)) for start in range(0, len(q), most)])
