"""The two halves of the head's loss pass over a chunk of tokens, before and after the slopes of the loss are known.

`WHOLE` makes the logits of the chunk in one product and leaves the rest to the compiler. `BLOCKED` goes through the
vocabulary a block at a time, so that a block's logits are still in the processor's cache when they are used: on a CPU
the products then run at 1.2 to 1.6 times the rate, and the chunk's logits cross the memory twice instead of ten times.
The result is the same up to rounding. Letters: n tokens, D width, V vocabulary, B of a block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from gdro_jax import precision
from gdro_jax.losses.linear_logprob import Softmax, head_logits, hidden_gradient, softmax, weight_gradient

BLOCK = 1024  # rows of the head in a block: 1 MiB of logits at 256 tokens
_NONE = -1e30  # a logit that weighs nothing, and finite: infinities would make NaN


class Head(NamedTuple):
    """float32[n] log-probability of the targets, NaN outside the vocabulary, entropy in nats, and what `back` needs."""

    logprob: Array
    entropy: Array
    held: Any


class Form(NamedTuple):
    """`ahead(hidden [n, D], weight [V, D], targets int32[n], temperature) -> Head`.

    `back(held, slope, hidden, weight, targets, weight_bar, for_hidden) -> (hidden_bar, weight_bar)`: float32[n] slopes
    of the loss in the log-probabilities, over the temperature, become the gradient of the hidden states, None unless
    `for_hidden`, and are added to that of the head, float32[V, D], or None where it gets none.
    """

    ahead: Callable[[Array, Array, Array, float], Head]
    back: Callable[..., tuple[Array | None, Array | None]]


def _ahead(hidden: Array, weight: Array, targets: Array, temperature: float) -> Head:
    out = softmax(head_logits(hidden, weight, temperature), targets)
    return Head(out.logprob, out.entropy, out)


def _back(
    held: Softmax,
    slope: Array,
    hidden: Array,
    weight: Array,
    targets: Array,
    weight_bar: Array | None,
    for_hidden: bool,
) -> tuple[Array | None, Array | None]:
    hot = jnp.arange(weight.shape[0]) == targets[:, None]
    logit_bar = jnp.where(hot, slope[:, None], 0) - (slope / held.total)[:, None] * held.exps
    hidden_bar = hidden_gradient(logit_bar, hidden, weight) if for_hidden else None
    return hidden_bar, None if weight_bar is None else weight_bar + weight_gradient(logit_bar, hidden, weight)


WHOLE = Form(_ahead, _back)


class _Stats(NamedTuple):
    """Running over blocks, float32[n]: largest logit, and relative to it the sum of exponentials and of their products
    with the logits; the target's logit; all logits so far, float32[blocks, B, n]."""

    top: Array
    total: Array
    mixed: Array
    chosen: Array
    logits: Array


class _Held(NamedTuple):
    logits: Array
    lse: Array


class _Block(NamedTuple):
    """Where block `number` begins, its rows of the head [B, D], and bool[B, 1] which are not of the one before: the
    last block ends with the vocabulary, so it may begin early."""

    start: Array
    weight: Array
    fresh: Array

    @classmethod
    def of(cls, number: Array, weight: Array) -> "_Block":
        start = jnp.minimum(number * BLOCK, weight.shape[0] - BLOCK)
        fresh = start + jnp.arange(BLOCK) >= number * BLOCK
        return cls(start, jax.lax.dynamic_slice_in_dim(weight, start, BLOCK), fresh[:, None])

    def hot(self, targets: Array) -> Array:
        """bool[B, n], where a token's target is."""
        return (self.start + jnp.arange(BLOCK)[:, None] == targets) & self.fresh


def _blocked_ahead(hidden: Array, weight: Array, targets: Array, temperature: float) -> Head:
    number = -(-weight.shape[0] // BLOCK)

    def step(at: Array, stats: _Stats) -> _Stats:
        block = _Block.of(at, weight)
        logits = jnp.where(block.fresh, head_logits(block.weight, hidden, temperature), _NONE)  # [B, n]
        top = jnp.maximum(stats.top, logits.max(0))
        exps, shrunk = jnp.exp(logits - top), jnp.exp(stats.top - top)
        place = jnp.clip(targets - block.start, 0, BLOCK - 1)
        found = jnp.take_along_axis(logits, place[None], axis=0)[0]
        return _Stats(
            top,
            stats.total * shrunk + exps.sum(0),
            stats.mixed * shrunk + (exps * logits).sum(0),
            jnp.where(targets // BLOCK == at, found, stats.chosen),
            jax.lax.dynamic_update_index_in_dim(stats.logits, logits, at, 0),
        )

    zeros = partial(jnp.zeros, dtype=jnp.float32)
    tokens = targets.shape
    begun = _Stats(
        jnp.full(tokens, _NONE), zeros(tokens), zeros(tokens), zeros(tokens), zeros((number, BLOCK, *tokens))
    )
    stats = jax.lax.fori_loop(0, number, step, begun)
    lse = stats.top + jnp.log(stats.total)
    inside = (targets >= 0) & (targets < weight.shape[0])
    logprob = jnp.where(inside, stats.chosen - lse, jnp.nan)
    return Head(logprob, lse - stats.mixed / stats.total, _Held(stats.logits, lse))


def _blocked_back(
    held: _Held, slope: Array, hidden: Array, weight: Array, targets: Array, weight_bar: Array | None, for_hidden: bool
) -> tuple[Array | None, Array | None]:
    def step(at: Array, sums: tuple[Any, Any]) -> tuple[Any, Any]:
        block, (hidden_bar, weight_bar) = _Block.of(at, weight), sums
        exps = jnp.exp(jax.lax.dynamic_index_in_dim(held.logits, at, 0, keepdims=False) - held.lse)
        logit_bar = jnp.where(block.hot(targets), slope, 0) - jnp.where(block.fresh, slope * exps, 0)
        logit_bar = logit_bar.astype(weight.dtype)
        if for_hidden:
            hidden_bar = hidden_bar + precision.matmul(logit_bar.T, block.weight)
        if weight_bar is not None:
            before = jax.lax.dynamic_slice_in_dim(weight_bar, block.start, BLOCK)
            after = before + precision.matmul(logit_bar, hidden.astype(weight.dtype))
            weight_bar = jax.lax.dynamic_update_slice_in_dim(weight_bar, after, block.start, 0)
        return hidden_bar, weight_bar

    begun = (jnp.zeros(hidden.shape, jnp.float32) if for_hidden else None, weight_bar)
    hidden_bar, weight_bar = jax.lax.fori_loop(0, len(held.logits), step, begun)
    return None if hidden_bar is None else hidden_bar.astype(hidden.dtype), weight_bar


BLOCKED = Form(_blocked_ahead, _blocked_back)
