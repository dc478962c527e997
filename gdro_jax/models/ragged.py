"""Rows end to end in one stream of tokens: `qwen3.prefill` and `qwen3.extend` without padding.

Everything but attention works on the stream itself. Attention takes rows in groups, each of one of a few compiled
shapes; which groups there are is data, so the loop over them is dynamic, and its gradient is a second such loop that
makes each group's attention again (as `recompute` does within one).
Letters: N tokens of the stream, n rows, g groups, P prompts, L prompt tokens, H heads, K KV heads, C head size.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gdro_jax.models import attention, qwen3

Shape = tuple[int, int, int]  # of a group: rows, tokens a row, and keys of the prompt before each
Shapes = tuple[Shape, ...]
Grads = tuple[jax.Array, ...]


class Groups(NamedTuple):
    """Rows that attention takes together.

    Attributes:
      first, last: int32[g], a group holds the rows first <= i < last.
      size: int32[g], its shape as a position in the tuple of `Shape` that the program was compiled for.
      begin, end: int32[], the groups begin <= i < end are run.
    """

    first: jax.Array
    last: jax.Array
    size: jax.Array
    begin: jax.Array
    end: jax.Array


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
    model: qwen3.Qwen3, tokens: jax.Array, of: Stream, groups: Groups, shapes: Shapes
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values [layers, N, K, C], and each prompt's last final hidden state [n, D]; see `qwen3.prefill`.

    Args: those of `extend`, of prompts.
    """
    mix = partial(_mix, (model.kernel, shapes))

    def run(q: jax.Array, k: jax.Array, v: jax.Array, _: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return mix((q, k, v), None, of, groups), (k, v)

    x, (k, v) = _blocks(model, tokens, of, of.step, run, ())
    return k, v, qwen3.final_norm(model, x[of.start + jnp.maximum(of.length - 1, 0)])


def extend(
    model: qwen3.Qwen3, tokens: jax.Array, kv: qwen3.PromptKV, of: Stream, groups: Groups, shapes: Shapes
) -> jax.Array:
    """Final hidden states [N, D]; see `qwen3.extend`. What stands where the stream is empty is finite and meaningless.

    Args:
      model: the policy.
      tokens: int32[N], the stream.
      kv: of P prompts.
      of: where the rows lie.
      groups: every row with tokens in one of them.
      shapes: of the groups; static. A group that its shape does not hold, rows or their prompts, comes out as NaN.
    """
    mix = partial(_mix, (model.kernel, shapes))

    def run(q: jax.Array, k: jax.Array, v: jax.Array, shared: tuple) -> tuple[jax.Array, None]:
        return mix((q, k, v, *shared), kv.mask, of, groups), None

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


Static = tuple[str, Shapes]  # the kernel, and the groups' shapes
Arrays = tuple[jax.Array, ...]  # q [N, H, C], k and v [N, K, C]; of responses the prompts' k and v [P, L, K, C], too


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(static: Static, arrays: Arrays, mask: jax.Array | None, of: Stream, groups: Groups) -> jax.Array:
    """Attention of the stream, [N, H, C]; mask bool[P, L] of the prompts before it, None where there are none."""

    def one(shape: Shape, group: jax.Array, out: jax.Array) -> jax.Array:
        found = _Group.find(shape, group, of, groups)
        mixed = found.attention(static[0], mask)(*found.take(arrays))
        mixed = jnp.where(found.fits(mask), mixed, jnp.nan)
        return out.at[found.place].set(mixed, mode="drop")

    return _loop(static[1], one, groups, jnp.zeros_like(arrays[0]))


def _forward(static: Static, *given) -> tuple[jax.Array, tuple]:
    return _mix(static, *given), given


def _backward(static: Static, saved: tuple, bar: jax.Array) -> tuple:
    arrays, mask, of, groups = saved

    def one(shape: Shape, group: jax.Array, sums: Grads) -> Grads:
        found = _Group.find(shape, group, of, groups)
        _, back = jax.vjp(found.attention(static[0], mask), *found.take(arrays))
        bars = back(found.take_tokens(bar))
        put = (total.at[found.place].set(x, mode="drop") for total, x in zip(sums[:3], bars[:3], strict=True))
        shared = (
            total.at[found.prompts, : found.before].add(x.astype(total.dtype))
            for total, x in zip(sums[3:], bars[3:], strict=True)
        )
        return *put, *shared

    zeros = [jnp.zeros_like(x) for x in arrays[:3]] + [jnp.zeros(x.shape, jnp.float32) for x in arrays[3:]]
    sums = _loop(static[1], one, groups, tuple(zeros))
    return tuple(x.astype(like.dtype) for x, like in zip(sums, arrays, strict=True)), None, None, None


_mix.defvjp(_forward, _backward)


def _loop(shapes: Shapes, one, groups: Groups, start):
    """`one(shape, group, carry)` of every group in turn."""

    def body(group: jax.Array, carry):
        return jax.lax.switch(groups.size[group], [partial(one, shape) for shape in shapes], group, carry)

    return jax.lax.fori_loop(groups.begin, groups.end, body, start)


class _Group(NamedTuple):
    """A group's rows, padded to its shape: place int32[rows, tokens] in the stream, N where there is none; `whole` says
    whether no row has more tokens."""

    place: jax.Array
    real: jax.Array
    prompts: jax.Array
    before: int
    whole: jax.Array

    @staticmethod
    def find(shape: Shape, group: jax.Array, of: Stream, groups: Groups) -> "_Group":
        wanted = groups.first[group] + jnp.arange(shape[0])
        row = jnp.minimum(wanted, len(of.length) - 1)
        count = jnp.where(wanted < groups.last[group], of.length[row], 0)
        steps = jnp.arange(shape[1])
        real = steps < count[:, None]
        place = jnp.where(real, of.start[row][:, None] + steps, len(of.row))
        return _Group(place, real, of.prompt_index[row], shape[2], (count <= shape[1]).all())

    def fits(self, mask: jax.Array | None) -> jax.Array:
        """Whether the shape holds all tokens of the group's rows, and of what stands before them."""
        if mask is None:
            return self.whole
        return self.whole & ~(self.real[:, 0] & mask[self.prompts, self.before :].any(-1)).any()

    def take_tokens(self, x: jax.Array) -> jax.Array:
        return x.at[self.place].get(mode="fill", fill_value=0)

    def take(self, arrays: Arrays) -> Arrays:
        return *(self.take_tokens(x) for x in arrays[:3]), *(x[self.prompts, : self.before] for x in arrays[3:])

    def attention(self, kernel: str, mask: jax.Array | None):
        before = None if mask is None else mask[self.prompts, : self.before]
        causal = attention.causal(kernel, self.real, before, remade=True)
        return lambda q, k, v, *shared: causal(q, k, v, shared or None)
