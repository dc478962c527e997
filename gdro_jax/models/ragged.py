"""Rows end to end in one stream of tokens: `qwen3.prefill` and `qwen3.extend` without padding.

Everything but attention works on the stream itself. Attention goes in tiles of one compiled shape: tokens of a row
against keys of that row, or of the prompt before it, a few tiles at a time. Which tiles there are follows from rows'
lengths, and how many keys a block of them meets is data, so no lengths compile anything. The softmax is made as keys
come, and its gradient makes the weights again, as flash attention does (arXiv 2205.14135, algorithms 1 and 4).
Letters: N tokens of the stream, n rows, P prompts, L prompt tokens, H heads, K KV heads, A = H / K, C head size,
B tokens of a tile, G tiles of a block, X blocks, D width.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdro_jax import precision
from gdro_jax.models import qwen3
from gdro_jax.models.recompute import MASKED, grouped, ungrouped

_product = precision.einsum

LOWEST = -1e20  # what the scores' maximum starts at, above `MASKED`: a masked score weighs exactly 0


class Tiling(NamedTuple):
    """The compiled shape of attention: B queries against B keys, G such tiles at a time; static."""

    tokens: int
    together: int

    def blocks(self, tokens: int, rows: int) -> int:
        """X that a stream of so many rows may need."""
        return -(-(tokens // self.tokens + rows) // self.together)


class Stream(NamedTuple):
    """Rows end to end.

    Attributes:
      start, length: int32[n], a row's first token in the stream, and how many it has.
      prompt_index: int32[n], of what stands before a row; of no meaning for prompts themselves.
      row, step: int32[N], a token's row, and which of its tokens it is.
      real: bool[N], False behind the last row's end.
    """

    start: jax.Array
    length: jax.Array
    prompt_index: jax.Array
    row: jax.Array
    step: jax.Array
    real: jax.Array


def stream(length: jax.Array, prompt_index: jax.Array, tokens: int) -> Stream:
    """The stream of `tokens` for rows of so many tokens, int32[n], in their order."""
    ends = jnp.cumsum(length, dtype=jnp.int32)
    place = jnp.arange(tokens, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, place, side="right").astype(jnp.int32), len(length) - 1)
    real = place < ends[-1]
    return Stream(ends - length, length, prompt_index, row, jnp.where(real, place - (ends - length)[row], 0), real)


def prefill(
    model: qwen3.Qwen3, tokens: jax.Array, of: Stream, steps: jax.Array, tiling: Tiling
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values [layers, N, K, C], and each prompt's last final hidden state [n, D]; see `qwen3.prefill`.

    Args: those of `extend`, of prompts.
    """
    tiles = _Tiles.of(of, None, steps, tiling)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, _: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return _mix(tiling, (q, k, v), tiles), (k, v)

    x, (k, v) = _blocks(model, tokens, of, of.step, run, ())
    return k, v, qwen3.final_norm(model, x[of.start + jnp.maximum(of.length - 1, 0)])


def extend(
    model: qwen3.Qwen3, tokens: jax.Array, kv: qwen3.PromptKV, of: Stream, steps: jax.Array, tiling: Tiling
) -> jax.Array:
    """Final hidden states [N, D]; see `qwen3.extend`. What stands where the stream is empty is finite and meaningless.

    Args:
      model: the policy.
      tokens: int32[N], the stream.
      kv: of P prompts.
      of: where the rows lie.
      steps: int32[X, 2], of `key_tiles`, or more: where a tile needs more, all comes out as NaN.
      tiling: static.
    """
    tiles = _Tiles.of(of, kv, steps, tiling)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, shared: tuple) -> tuple[jax.Array, None]:
        shared = tuple(jnp.pad(x, ((0, 0), (0, -x.shape[1] % tiling.tokens), (0, 0), (0, 0))) for x in shared)
        return _mix(tiling, (q, k, v, *shared), tiles), None

    position = kv.length[of.prompt_index][of.row] + of.step
    x, _ = _blocks(model, tokens, of, position, run, (kv.k, kv.v))
    return qwen3.final_norm(model, x)


def _blocks(model: qwen3.Qwen3, tokens: jax.Array, of: Stream, position: jax.Array, run, shared: tuple):
    """The stream [N, D] before the final norm, and what each block's `run(q, k, v, slice of shared)` keeps."""
    turn = qwen3.rotation(model.config, position[None])

    def block(x: jax.Array, layer: tuple):
        weights, *own = layer

        def attend(q: jax.Array, k: jax.Array, v: jax.Array):
            mixed, kept = run(q[0], k[0], v[0], tuple(own))
            return mixed[None], kept

        return qwen3.run_block(model.config, weights, x, turn, attend)

    x = qwen3.embed_tokens(model, jnp.where(of.real, tokens, 0))[None]
    x, kept = jax.lax.scan(qwen3.remembered(model, block), x, (qwen3.block_weights(model), *shared))
    return x[0], kept


class _Tiles(NamedTuple):
    """The stream's tiles, those that meet most keys first, X G of them.

    Of a tile that is not there all counts are 0. It may start behind the stream's end: what it reads is some other
    window, what it adds is 0, or nothing.

    Attributes:
      row_start, step, left: int32[X G], its row's first token in the stream, which of the row's tiles it is, and how
        many tokens it has.
      prompt, before: int32[X G], of its row, and the prompt's tokens.
      steps: int32[X, 2], tiles of keys that each block meets: of prompts, and of its rows.
      whole: bool[], whether no tile of a block needs more.
    """

    row_start: jax.Array
    step: jax.Array
    left: jax.Array
    prompt: jax.Array
    before: jax.Array
    steps: jax.Array
    whole: jax.Array

    @staticmethod
    def of(stream: Stream, kv: qwen3.PromptKV | None, steps: jax.Array, tiling: Tiling) -> "_Tiles":
        size, together = tiling
        most = tiling.blocks(len(stream.row), len(stream.length)) * together
        count = -(-stream.length // size)
        ends, place = jnp.cumsum(count), jnp.arange(most)
        row = jnp.minimum(jnp.searchsorted(ends, place, side="right"), len(count) - 1)
        there = place < ends[-1]
        step = place - (ends - count)[row]
        before = jnp.zeros_like(row) if kv is None else kv.length[stream.prompt_index[row]]
        keys = jnp.where(there, jnp.stack([-(-before // size), step + 1]), 0)
        order = jnp.lexsort((-keys[1], -keys[0]))
        needed = keys[:, order].reshape(2, -1, together).max(-1)
        row, step, there, before = (x[order] for x in (row, step, there, before))
        left = jnp.where(there, jnp.clip(stream.length[row] - step * size, 0, size), 0)
        prompt = jnp.zeros_like(row) if kv is None else stream.prompt_index[row]
        behind = prompt, jnp.where(there, before, 0)
        return _Tiles(stream.start[row], step, left, *behind, steps, (needed <= steps.T).all())

    def block(self, number: jax.Array, together: int) -> "_Tiles":
        """Its tiles alone."""
        names = ("row_start", "step", "left", "prompt", "before")
        first = number * together
        cut = {name: jax.lax.dynamic_slice_in_dim(getattr(self, name), first, together) for name in names}
        return self._replace(**cut, steps=self.steps[number])

    def used(self) -> jax.Array:
        """Blocks that have tiles; they come first."""
        return (self.steps[:, 1] > 0).sum()

    def start(self, size: int) -> jax.Array:
        return self.row_start + self.step * size


def key_tiles(lengths: np.ndarray, before: np.ndarray, tiling: Tiling, blocks: int) -> np.ndarray:
    """Tiles of keys int32[X, 2] that each block meets, of prompts and of its rows: the most of any shard.

    Args:
      lengths, before: int[S, n], tokens of each row and of the prompt before it.
    """
    size, together = tiling
    count = -(-lengths // size)
    most = np.zeros((len(lengths), blocks * together, 2), np.int32)
    for keys, own, prompts in zip(most, count, -(-before // size), strict=True):
        steps = np.concatenate([np.arange(1, many + 1) for many in own])
        ahead = np.repeat(prompts, own)
        order = np.lexsort((-steps, -ahead))
        keys[: len(order)] = np.stack([ahead[order], steps[order]], axis=1)
    return most.reshape(-1, blocks, together, 2).max((0, 2))


Arrays = tuple[jax.Array, ...]  # q [N, H, C], k and v [N, K, C]; of responses the prompts' k and v [P, L, K, C], too


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(tiling: Tiling, arrays: Arrays, tiles: _Tiles) -> jax.Array:
    """Attention of the stream, [N, H, C]."""
    return _forward(tiling, arrays, tiles)[0]


def _forward(tiling: Tiling, arrays: Arrays, tiles: _Tiles) -> tuple[jax.Array, tuple]:
    q, k, v = _padded(tiling, arrays)
    kv_heads = k.shape[1]

    def block(number: jax.Array, carry: tuple) -> tuple:
        some = tiles.block(number, tiling.together)
        queries = grouped(_windows(q, some.start(tiling.tokens), tiling.tokens), kv_heads)
        state = jnp.full(queries.shape[:-1], LOWEST), jnp.zeros(queries.shape[:-1]), jnp.zeros(queries.shape)

        def add(state: tuple, key: jax.Array, value: jax.Array, mask: jax.Array) -> tuple:
            top, total, out = state
            scores = _scores(queries, key, mask)
            higher = jnp.maximum(top, scores.max(-1))
            weights, less = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            more = _product("gkau,gukc->gkac", weights.astype(value.dtype), value)
            return higher, total * less + weights.sum(-1), out * less[..., None] + more

        def behind(step: jax.Array, state: tuple) -> tuple:
            own = _own(some, step, tiling)
            return add(state, _windows(k, own.start, tiling.tokens), _windows(v, own.start, tiling.tokens), own.mask)

        def ahead(step: jax.Array, state: tuple) -> tuple:
            key, value = (_prompt_tile(x, some.prompt, step, tiling.tokens) for x in arrays[3:])
            return add(state, key, value, _prompt_mask(some, step, tiling))

        if len(arrays) > 3:
            state = jax.lax.fori_loop(0, some.steps[0], ahead, state)
        top, total, out = jax.lax.fori_loop(0, some.steps[1], behind, state)
        total = jnp.maximum(total, 1e-37)
        real = _real(some, tiling)
        out = jnp.where(real[..., None, None], ungrouped(out / total[..., None], tiling.tokens), 0)
        logsum = jnp.where(real[..., None], ungrouped((top + jnp.log(total))[..., None], tiling.tokens)[..., 0], 0)
        start = some.start(tiling.tokens)
        return _add_windows(carry[0], start, out.astype(q.dtype)), _add_windows(carry[1], start, logsum)

    blank = jnp.zeros_like(q), jnp.zeros(q.shape[:2], jnp.float32)
    out, logsum = jax.lax.fori_loop(0, tiles.used(), block, blank)
    out = jnp.where(tiles.whole, out[: len(arrays[0])], jnp.nan)
    return out, (arrays, tiles, out, logsum)


def _backward(tiling: Tiling, saved: tuple, bar: jax.Array) -> tuple:
    arrays, tiles, out, logsum = saved
    q, k, v = _padded(tiling, arrays)
    (bar_padded,) = _padded(tiling, (bar,))
    kv_heads, (_, heads, size) = k.shape[1], q.shape
    delta = (bar.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    delta = jnp.pad(delta, ((0, tiling.tokens), (0, 0)))

    def block(number: jax.Array, sums: tuple) -> tuple:
        some = tiles.block(number, tiling.together)
        start, real = some.start(tiling.tokens), _real(some, tiling)
        queries, bars = (grouped(_windows(x, start, tiling.tokens), kv_heads) for x in (q, bar_padded))
        shift, slope = (grouped(_windows(x, start, tiling.tokens)[..., None], kv_heads) for x in (logsum, delta))
        seen = grouped(jnp.broadcast_to(real[..., None, None], (*real.shape, heads, 1)), kv_heads)

        def grads(key: jax.Array, value: jax.Array, mask: jax.Array) -> tuple:
            weights = jnp.where(seen, jnp.exp(_scores(queries, key, mask) - shift), 0)
            value_bar = _product("gkau,gkac->gukc", weights.astype(bar.dtype), bars)
            scores_bar = weights * (_product("gkac,gukc->gkau", bars, value) - slope) * size**-0.5
            scores_bar = scores_bar.astype(q.dtype)
            return (
                _product("gkau,gukc->gkac", scores_bar, key),
                _product("gkau,gkac->gukc", scores_bar, queries),
                value_bar,
            )

        def behind(step: jax.Array, carry: tuple) -> tuple:
            of_queries, of_keys, of_values, *rest = carry
            own = _own(some, step, tiling)
            more = grads(_windows(k, own.start, tiling.tokens), _windows(v, own.start, tiling.tokens), own.mask)
            return (
                of_queries + more[0], _add_windows(of_keys, own.start, more[1]),
                _add_windows(of_values, own.start, more[2]), *rest,
            )  # fmt: skip

        def ahead(step: jax.Array, carry: tuple) -> tuple:
            of_queries, of_keys, of_values, *shared = carry
            key, value = (_prompt_tile(x, some.prompt, step, tiling.tokens) for x in arrays[3:])
            of_query, *more = grads(key, value, _prompt_mask(some, step, tiling))
            shared = [_add_prompt_tile(total, some.prompt, step, x) for total, x in zip(shared, more, strict=True)]
            return of_queries + of_query, of_keys, of_values, *shared

        carry = jnp.zeros(queries.shape), *sums[1:]
        if len(arrays) > 3:
            carry = jax.lax.fori_loop(0, some.steps[0], ahead, carry)
        of_queries, *rest = jax.lax.fori_loop(0, some.steps[1], behind, carry)
        of_queries = jnp.where(real[..., None, None], ungrouped(of_queries, tiling.tokens), 0)
        return _add_windows(sums[0], start, of_queries), *rest

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v, *arrays[3:]))
    found = jax.lax.fori_loop(0, tiles.used(), block, zeros)
    cut = (*(x[: len(bar)] for x in found[:3]), *found[3:])
    return tuple(x.astype(like.dtype) for x, like in zip(cut, arrays, strict=True)), None


_mix.defvjp(_forward, _backward)


class _Own(NamedTuple):
    """A tile of keys of each of a block's rows: where it starts in the stream, and mask bool[G, B, B] of queries."""

    start: jax.Array
    mask: jax.Array


def _own(some: _Tiles, step: jax.Array, tiling: Tiling) -> _Own:
    place = jnp.arange(tiling.tokens)
    key, query = step * tiling.tokens + place, some.step[:, None] * tiling.tokens + place
    start = jnp.where(step <= some.step, some.row_start + step * tiling.tokens, some.row_start)  # inside the stream
    return _Own(start, key[None, None, :] <= query[:, :, None])


def _prompt_mask(some: _Tiles, step: jax.Array, tiling: Tiling) -> jax.Array:
    seen = step * tiling.tokens + jnp.arange(tiling.tokens) < some.before[:, None]
    return jnp.broadcast_to(seen[:, None, :], (len(seen), tiling.tokens, tiling.tokens))


def _real(some: _Tiles, tiling: Tiling) -> jax.Array:
    """Which of the tiles' places have a token, bool[G, B]."""
    return jnp.arange(tiling.tokens) < some.left[:, None]


def _padded(tiling: Tiling, arrays: Arrays) -> Arrays:
    """The stream's arrays with a tile behind the end, so that no window of a tile that is there is moved to fit."""
    return tuple(jnp.pad(x, ((0, tiling.tokens), (0, 0), (0, 0))) for x in arrays[:3])


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """float32[G, K, A B, B] of queries [G, K, A B, C] and keys [G, B, K, C], masked."""
    scores = _product("gkac,gukc->gkau", q, k) * q.shape[-1] ** -0.5
    together, kv_heads, _, size = scores.shape
    by_query = scores.reshape(together, kv_heads, -1, size, size)
    return jnp.where(mask[:, None, None], by_query, MASKED).reshape(scores.shape)


def _windows(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """[G, B, ...] of the stream from each start int32[G] on."""
    return jax.vmap(lambda first: jax.lax.dynamic_slice_in_dim(x, first, size))(start)


def _add_windows(x: jax.Array, start: jax.Array, windows: jax.Array) -> jax.Array:
    """The stream with windows [G, B, ...] added from each start on; they may overlap."""
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, windows.ndim)), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
    )
    return jax.lax.scatter_add(x, start[:, None], windows.astype(x.dtype), numbers)


def _prompt_tile(x: jax.Array, prompt: jax.Array, step: jax.Array, size: int) -> jax.Array:
    """Tile [G, B, K, C] of the prompts' keys or values [P, L, K, C]."""
    return jax.lax.dynamic_slice_in_dim(x, step * size, size, axis=1)[prompt]


def _add_prompt_tile(x: jax.Array, prompt: jax.Array, step: jax.Array, tile: jax.Array) -> jax.Array:
    size = tile.shape[1]
    old = jax.lax.dynamic_slice_in_dim(x, step * size, size, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(x, old.at[prompt].add(tile), step * size, axis=1)
