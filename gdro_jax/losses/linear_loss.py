"""A token loss and its gradients straight from hidden states and head weights, in one pass over chunks of tokens.

Where a token's loss depends on the log-probability of that token alone, its slope is known as soon as the log-sum-exp
is, so the gradients of hidden states and head are made in the forward pass, from the logits that are there anyway:
three matrix products instead of the four of `linear_logprob`, which makes the logits again on the way back. Nothing of
size [N, V] is held. Tokens that are not active are sorted behind the others and their chunks are never run: the head
costs what the real tokens cost. The idea of gradients in the forward pass: Liger Kernel, arXiv 2410.10989, section 3.2.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from gdro_jax.losses.linear_blocks import BLOCK, BLOCKED, WHOLE, Form
from gdro_jax.losses.linear_logprob import checked, chunk_rows

LossFn = Callable[..., Array]


class TokenLoss(NamedTuple):
    """`loss` float32, the sum over active tokens, differentiable; `logprobs` and `entropy` float32[N], constants.

    Where a token is not active both are 0.
    """

    loss: Array
    logprobs: Array
    entropy: Array


class _Static(NamedTuple):
    loss_fn: LossFn
    temperature: float
    chunk: int


class _Sums(NamedTuple):
    """What the loop carries; the gradients are None where none are asked for, which `Any` spares every use to ask."""

    loss: Array
    logprobs: Array
    entropy: Array
    hidden_bar: Any
    weight_bar: Any


def token_loss(
    loss_fn: LossFn,
    hidden: ArrayLike,
    weight: ArrayLike,
    targets: ArrayLike,
    active: ArrayLike,
    args: tuple[ArrayLike, ...] = (),
    temperature: float = 1.0,
    *,
    chunk: int | None = None,
) -> TokenLoss:
    """sum over active tokens of loss_fn(log softmax(hidden @ weight.T / temperature)[targets], *args).

    Args:
      loss_fn: (float32[n], *n-long slices of args) -> float32[n], token by token; traced once.
      hidden: float[N, D]; weight: float[V, D]; the loss is differentiable in these two.
      targets: int[N]; an active target outside [0, V) gives NaN, so that it is seen.
      active: bool[N]; the other tokens' values never matter.
      args: arrays [N], constants to the gradient.
      temperature: above 0, the one that the tokens were sampled at.
      chunk: tokens held at a time, for tuning; None: chosen from N and V. The result does not depend on it.

    Logits, sums and the head's gradient are float32 whatever the inputs are.

    Raises: ValueError for a temperature or chunk out of range, or shapes that do not match.
    """
    hidden, weight, targets = checked(hidden, weight, targets, temperature, chunk)
    for name, value in [("active", active), *((f"args[{i}]", arg) for i, arg in enumerate(args))]:
        if jnp.shape(value) != targets.shape:
            raise ValueError(f"{name} must have shape {targets.shape}, it has {jnp.shape(value)}")
    if targets.size == 0:
        return TokenLoss(jnp.float32(0), *(jnp.zeros(0, jnp.float32) for _ in range(2)))
    static = _Static(loss_fn, float(temperature), chunk or chunk_rows(hidden.shape[0], weight.shape[0]))
    live = jnp.asarray(active, bool)
    constants = tuple(jax.lax.stop_gradient(jnp.where(live, jnp.asarray(arg), 0)) for arg in args)
    return TokenLoss(*_token_loss(static, hidden, weight, targets, live, constants))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_loss(
    static: _Static, hidden: Array, weight: Array, targets: Array, active: Array, args: tuple[Array, ...]
) -> tuple[Array, Array, Array]:
    return _run(static, hidden, weight, targets, active, args, (False, False))[:3]


def _forward(static: _Static, *given: Any) -> tuple[tuple[Array, Array, Array], tuple[Array | None, Array | None]]:
    """A head that is not trained, as under adapters, gets no gradient and costs no product for one."""
    wanted = (given[0].perturbed, given[1].perturbed)
    hidden, weight, targets, active, args = jax.tree.map(
        lambda x: x.value, given, is_leaf=lambda x: hasattr(x, "perturbed")
    )
    out = _run(static, hidden, weight, targets, active, args, wanted)
    weight_bar = out.weight_bar.astype(weight.dtype) if wanted[1] else None
    return (out.loss, out.logprobs, out.entropy), (out.hidden_bar, weight_bar)


def _backward(static: _Static, saved: tuple[Array | None, Array | None], bars: tuple[Any, Any, Any]) -> tuple:
    if not isinstance(bars[0], jax.Array):  # a symbolic zero: nothing hangs on the loss
        return None, None, None, None, None
    return *(None if x is None else x * bars[0].astype(x.dtype) for x in saved), None, None, None


_token_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(
    static: _Static,
    hidden: Array,
    weight: Array,
    targets: Array,
    active: Array,
    args: tuple[Array, ...],
    wanted: tuple[bool, bool],
) -> _Sums:
    """All chunks that hold an active token, active tokens first; results in the order of the arguments."""
    rows, size = hidden.shape[0], min(static.chunk, hidden.shape[0])
    order = jnp.argsort(~active, stable=True)
    padded = -(-rows // size) * size
    taken = jnp.pad(order, (0, padded - rows))
    filled = jnp.arange(padded) < active.sum()  # the padding copies token 0, which is not active a second time
    h = jnp.where(filled[:, None], hidden[taken], 0)
    columns = (h, targets[taken], filled, *(arg[taken] for arg in args))
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    sums = _Sums(
        zeros(()),
        zeros(padded),
        zeros(padded),
        jnp.zeros((padded, hidden.shape[1]), hidden.dtype) if wanted[0] else None,
        zeros(weight.shape) if wanted[1] else None,
    )

    def chunks(form: Form, weight: Array, sums: _Sums, *columns: Array) -> _Sums:
        def step(number: Array, carry: tuple[_Sums, Any]) -> tuple[_Sums, Any]:
            sums, room = carry
            start = number * size
            slices = [jax.lax.dynamic_slice_in_dim(c, start, size) for c in columns]
            part, room = _chunk(form, static, wanted, room, weight, sums.weight_bar, *slices)
            put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
            hidden_bar = None if part.hidden_bar is None else put(sums.hidden_bar, part.hidden_bar)
            logprobs, entropy = put(sums.logprobs, part.logprobs), put(sums.entropy, part.entropy)
            return _Sums(sums.loss + part.loss, logprobs, entropy, hidden_bar, part.weight_bar), room

        begun = (sums, form.room(size, weight.shape[0]) if wanted[1] else None)
        if padded == size:
            return step(jnp.int32(0), begun)[0]
        return jax.lax.fori_loop(0, -(-active.sum(dtype=jnp.int32) // size), step, begun)[0]

    blocked = any(wanted) and weight.shape[0] >= 2 * BLOCK
    cpu = BLOCKED if blocked else WHOLE
    sums = jax.lax.platform_dependent(weight, sums, *columns, cpu=partial(chunks, cpu), default=partial(chunks, WHOLE))
    back = jnp.argsort(order)
    hidden_bar = None if sums.hidden_bar is None else sums.hidden_bar[back]
    return sums._replace(logprobs=sums.logprobs[back], entropy=sums.entropy[back], hidden_bar=hidden_bar)


def _chunk(
    form: Form,
    static: _Static,
    wanted: tuple[bool, bool],
    room: Any,
    weight: Array,
    weight_bar: Array | None,
    h: Array,
    target: Array,
    live: Array,
    *args: Array,
) -> tuple[_Sums, Any]:
    """One chunk: h [n, D], target and live [n], slices of args; the head's gradient is added to `weight_bar`."""
    head = form.ahead(h, weight, target, static.temperature, room)
    logprob, entropy = (jnp.where(live, x, 0.0) for x in (head.logprob, head.entropy))

    def objective(logprob: Array) -> Array:
        return jnp.where(live, static.loss_fn(logprob, *args), 0.0).sum()

    if not any(wanted):
        return _Sums(objective(logprob), logprob, entropy, None, None), None
    loss, g = jax.value_and_grad(objective)(logprob)
    *bars, room = form.back(head.held, g / static.temperature, h, weight, target, weight_bar, wanted[0])
    return _Sums(loss, logprob, entropy, *bars), room
