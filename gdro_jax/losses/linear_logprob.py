"""Log-probs of chosen tokens straight from hidden states and head weights, never holding [N, V] logits.

Rows go through the head a chunk at a time (`lax.scan`), forward and backward: the forward keeps one log-sum-exp a row,
and the backward makes a chunk's logits again from it. Logits and sums are float32 whatever the inputs are. A problem
of at most `SINGLE_CHUNK` logits is one chunk without a loop.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gdro_jax import precision

SINGLE_CHUNK = 2**18  # logits (1 MiB in float32) that are never split
CHUNK_ROWS = 512  # rows a chunk has at a large vocabulary: each passes over the head and its gradient once
ROW_MULTIPLE = 8


class _Static(NamedTuple):
    temperature: float
    chunk: int | None
    entropy: bool


def token_logprobs(
    hidden: ArrayLike, weight: ArrayLike, targets: ArrayLike, temperature: float = 1.0, *, chunk: int | None = None
) -> Array:
    """log softmax(hidden @ weight.T / temperature)[targets], differentiable in `hidden` and `weight`.

    Args:
      hidden: float[N, D] final hidden states; weight: float[V, D] rows of the head, one a token.
      targets: int[N]; a target outside [0, V) gives NaN, so that it is seen if it is not masked.
      temperature: above 0, the one that the tokens were sampled at.
      chunk: rows held at a time, for tuning; None: chosen from N and V. The result does not depend on it.

    A row whose cotangent is 0 (a masked one) adds exactly nothing to the gradients, though its state be NaN or inf.

    Returns: float32[N]. Raises: ValueError for a temperature or chunk out of range, or shapes that do not match.
    """
    static = _Static(float(temperature), chunk, False)
    return _logprobs(static, *checked(hidden, weight, targets, static.temperature, chunk))[0]


def token_logprobs_and_entropy(
    hidden: ArrayLike, weight: ArrayLike, targets: ArrayLike, temperature: float = 1.0, *, chunk: int | None = None
) -> tuple[Array, Array]:
    """`token_logprobs` and, from the same pass, the distributions' entropies in nats, float32[N] each.

    Both are differentiable; for a metric alone put `jax.lax.stop_gradient` around the entropy.
    """
    static = _Static(float(temperature), chunk, True)
    return _logprobs(static, *checked(hidden, weight, targets, static.temperature, chunk))


def chunk_rows(rows: int, vocab: int) -> int:
    """Rows a chunk holds by default: all if their logits are few, else at most a quarter of them or 1 MiB of logits."""
    if rows * vocab <= SINGLE_CHUNK:
        return max(rows, 1)
    most = max(SINGLE_CHUNK // vocab, min(CHUNK_ROWS, rows // 4), 1)
    even = -(-rows // -(-rows // most))  # as many chunks, of even size
    return min(-(-even // ROW_MULTIPLE) * ROW_MULTIPLE, rows)


def checked(
    hidden: ArrayLike, weight: ArrayLike, targets: ArrayLike, temperature: float, chunk: int | None
) -> tuple[Array, Array, Array]:
    """hidden [N, D], weight [V, D] and int32 targets [N] as arrays; ValueError naming what is out of range."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1, or None to have it chosen")
    shapes = jnp.shape(hidden), jnp.shape(weight), jnp.shape(targets)
    fits = tuple(map(len, shapes)) == (2, 2, 1) and shapes[0][1] == shapes[1][1] and shapes[0][:1] == shapes[2]
    if not fits:
        raise ValueError(f"hidden, weight, targets must be [N, D], [V, D], [N]; they are {shapes}")
    return jnp.asarray(hidden), jnp.asarray(weight), jnp.asarray(targets, jnp.int32)


class Softmax(NamedTuple):
    """Of n rows of logits: exps [n, V] relative to each row's largest, their total, log-sum-exp, and of the target
    its log-probability (NaN outside the vocabulary) and the entropy in nats, float32[n] each."""

    exps: Array
    total: Array
    lse: Array
    logprob: Array
    entropy: Array


def head_logits(hidden: Array, weight: Array, temperature: float) -> Array:
    """float32[n, V] logits of hidden [n, D] at a temperature."""
    logits = precision.einsum("nd,vd->nv", hidden, weight)
    return logits if temperature == 1.0 else logits / temperature


def softmax(logits: Array, target: Array) -> Softmax:
    """What losses need of float32[n, V] logits and int32[n] targets."""
    top = logits.max(-1, keepdims=True)
    exps = jnp.exp(logits - top)
    total = exps.sum(-1)
    lse = top[:, 0] + jnp.log(total)
    inside = (target >= 0) & (target < logits.shape[1])
    chosen = jnp.take_along_axis(logits, jnp.where(inside, target, 0)[:, None], axis=1)[:, 0]
    entropy = lse - (exps * logits).sum(-1) / total
    return Softmax(exps, total, lse, jnp.where(inside, chosen - lse, jnp.nan), entropy)


def head_gradients(slope: Array, hidden: Array, weight: Array) -> tuple[Array, Array]:
    """Gradients of hidden [n, D] and float32[V, D] of the head from those of the logits before the temperature."""
    return hidden_gradient(slope, hidden, weight), weight_gradient(slope, hidden, weight)


def hidden_gradient(slope: Array, hidden: Array, weight: Array) -> Array:
    """The first of `head_gradients`."""
    product = precision.matmul(slope.astype(weight.dtype), weight)
    return product.astype(hidden.dtype)


def weight_gradient(slope: Array, hidden: Array, weight: Array) -> Array:
    """The second of `head_gradients`."""
    slope, hidden = slope.astype(weight.dtype), hidden.astype(weight.dtype)
    return precision.matmul(slope.T, hidden)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(static: _Static, hidden: Array, weight: Array, targets: Array) -> tuple[Array, Array]:
    return _forward(static, hidden, weight, targets)[0]


def _forward(
    static: _Static, hidden: Array, weight: Array, targets: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    rows, vocab = hidden.shape[0], weight.shape[0]

    def chunk(h: Array, target: Array) -> tuple[Array, Array, Array]:
        out = softmax(head_logits(h, weight, static.temperature), target)
        return out.logprob, out.entropy if static.entropy else jnp.zeros_like(out.lse), out.lse

    size = _chunk_size(static, rows, vocab)
    if size >= rows:
        logprob, entropy, lse = chunk(hidden, targets)
    else:
        _, parts = jax.lax.scan(lambda _, x: (None, chunk(*x)), None, (_split(hidden, size), _split(targets, size)))
        logprob, entropy, lse = (_join(part, rows) for part in parts)
    return (logprob, entropy), (hidden, weight, targets, lse, entropy)


def _backward(static: _Static, saved: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple[Array, Array, None]:
    hidden, weight, targets, lse, entropy = saved
    rows, vocab = hidden.shape[0], weight.shape[0]
    logprob_bar, entropy_bar = (jnp.asarray(c, jnp.float32) for c in cotangents)
    live = logprob_bar != 0
    if static.entropy:
        live |= entropy_bar != 0
    hidden = jnp.where(live[:, None], hidden, 0)
    lse = jnp.where(live, lse, jnp.inf)  # probabilities 0: the row is gone
    entropy = jnp.where(live, entropy, 0)

    def chunk(h: Array, target: Array, z: Array, ent: Array, g: Array, e: Array) -> tuple[Array, Array]:
        logits = head_logits(h, weight, static.temperature)
        prob = jnp.exp(logits - z[:, None])
        slope = jnp.where(jnp.arange(vocab) == target[:, None], g[:, None], 0) - g[:, None] * prob
        if static.entropy:  # d entropy / d logit = -p (log p + entropy)
            log_prob = jnp.where(prob > 0, logits - z[:, None], 0)
            slope -= e[:, None] * prob * (log_prob + ent[:, None])
        return head_gradients(slope / static.temperature, h, weight)

    size = _chunk_size(static, rows, vocab)
    arrays = (hidden, targets, lse, entropy, logprob_bar, entropy_bar)
    if size >= rows:
        hidden_bar, weight_bar = chunk(*arrays)
    else:

        def step(total: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
            h_bar, w_bar = chunk(*part)
            return total + w_bar, h_bar

        zero = jnp.zeros(weight.shape, jnp.float32)
        weight_bar, parts = jax.lax.scan(step, zero, tuple(_split(a, size) for a in arrays))
        hidden_bar = _join(parts, rows)
    return hidden_bar, weight_bar.astype(weight.dtype), None


_logprobs.defvjp(_forward, _backward)


def _chunk_size(static: _Static, rows: int, vocab: int) -> int:
    return chunk_rows(rows, vocab) if static.chunk is None else static.chunk


def _split(array: Array, size: int) -> Array:
    """[N, ...] as [chunks, size, ...] with zeros added; chunk c holds rows c, c + chunks, c + 2 chunks, ...

    Every chunk has rows of the whole range, so rows sharded over devices in order stay where they are.
    """
    chunks = -(-array.shape[0] // size)
    padding = [(0, chunks * size - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, padding).reshape(size, chunks, *array.shape[1:]).swapaxes(0, 1)


def _join(parts: Array, rows: int) -> Array:
    """Undoes `_split`."""
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])[:rows]
