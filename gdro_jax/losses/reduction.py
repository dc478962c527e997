"""Losses as sums and denominators, and their exact reduction over microbatches.

A loss function here is `loss_sums_fn(params, batch, shared) -> LossSums`. `batch` is a mapping of arrays with the rows
first, `"row_weights"` among them; `shared` is any pytree that all rows use (a step's prompts, say), or None. Because
it returns sums, one microbatch or eight, one device or eight, give the same number.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

Params = TypeVar("Params")
Shared = TypeVar("Shared")
Batch = Mapping[str, Array]


class LossSums(NamedTuple):
    """What rows add up to. Sums of two sets of rows are the sums of their union; `per_row` is concatenated instead.

    `loss` is sum_i row_weights_i * per_row_i. The loss proper is `loss / denominator`, and a row's is
    `per_row / denominator`; None means that the row weights are absolute and nothing is left to divide by.
    The denominator does not depend on the parameters. `metrics` are sums over `tokens` tokens of `rows` rows.
    """

    loss: Array
    denominator: Array | None
    per_row: Array
    metrics: dict[str, Array]
    tokens: Array
    rows: Array


class LossOutput(NamedTuple):
    """`loss` scalar, `per_row` [R] (Eq. 6) with loss = sum(row_weights * per_row), `metrics`: means over tokens."""

    loss: Array
    per_row: Array
    metrics: dict[str, Array]


LossSumsFn = Callable[[Params, Batch, Shared], LossSums]


def finish(sums: LossSums) -> LossOutput:
    """The loss, the rows' losses and the mean metrics of complete sums. A step without rows gives 0, not NaN."""
    scale = _scale(sums)
    tokens = jnp.maximum(sums.tokens, 1.0)
    metrics = {name: value / tokens for name, value in sums.metrics.items()}
    metrics["response_length"] = sums.tokens / jnp.maximum(sums.rows, 1.0)
    return LossOutput(sums.loss * scale, sums.per_row * scale, metrics)


def finish_grad(grad: Params, sums: LossSums) -> Params:
    """Gradient of the loss from the gradient of `sums.loss`."""
    scale = _scale(sums)
    return jax.tree.map(lambda g: g * scale, grad)


def sums_and_grad(
    loss_sums_fn: LossSumsFn[Params, Shared], params: Params, batch: Batch, shared: Shared, microbatches: int = 1
) -> tuple[LossSums, Params]:
    """Sums over all rows and the gradient of `sums.loss`, one microbatch in memory at a time.

    The rows are dealt in order to `microbatches` equal parts; rows added to make them equal weigh 0, and
    `per_row` comes back without them. Gradients are summed in float32, bfloat16 parameters' too.
    Raises: ValueError if `microbatches < 1`, "row_weights" is missing, or the arrays differ in rows.
    """
    if microbatches < 1:
        raise ValueError(f"microbatches={microbatches} must be at least 1")
    rows = num_rows(batch)

    def one(part: Batch) -> tuple[LossSums, Params]:
        def objective(p: Params) -> tuple[Array, LossSums]:
            sums = loss_sums_fn(p, part, shared)
            return sums.loss, sums

        (_, sums), grad = jax.value_and_grad(objective, has_aux=True)(params)
        return sums, jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grad)

    if microbatches == 1:
        return one(batch)
    parts = split_rows(batch, microbatches)
    first = jax.tree.map(lambda x: x[0], parts)

    def totals(part: Batch) -> tuple[tuple[LossSums, Params], Array]:
        sums, grad = one(part)
        return (sums._replace(per_row=sums.per_row[:0]), grad), sums.per_row

    def step(carry: tuple[LossSums, Params], part: Batch) -> tuple[tuple[LossSums, Params], Array]:
        added, per_row = totals(part)
        return jax.tree.map(jnp.add, carry, added), per_row

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(totals, first)[0])

    (sums, grad), per_row = jax.lax.scan(step, zeros, parts)
    return sums._replace(per_row=per_row.reshape(-1)[:rows]), grad


def loss_and_grad(
    loss_sums_fn: LossSumsFn[Params, Shared], params: Params, batch: Batch, shared: Shared, microbatches: int = 1
) -> tuple[LossOutput, Params]:
    """The loss and its gradient on one device; `pmapped.loss_and_grad` gives the same over several. Jittable."""
    sums, grad = sums_and_grad(loss_sums_fn, params, batch, shared, microbatches)
    return finish(sums), finish_grad(grad, sums)


def num_rows(batch: Batch) -> int:
    """Rows of a batch. Raises: ValueError if "row_weights" is missing or the arrays differ in rows."""
    if "row_weights" not in batch:
        raise ValueError(f'batch must hold "row_weights", it holds {sorted(batch)}')
    rows = {name: jnp.shape(value)[0] if jnp.ndim(value) else None for name, value in batch.items()}
    if len(set(rows.values())) != 1:
        raise ValueError(f"batch arrays must all have the rows first, their first sizes are {rows}")
    return rows["row_weights"] or 0


def split_rows(batch: Batch, parts: int) -> dict[str, Array]:
    """Every array [R, ...] as [parts, ceil(R / parts), ...], in order; rows added at the end weigh 0.

    An added row copies row 0 in all but its weight, so that a model meets nothing there that it does not meet anyway.
    """
    rows = num_rows(batch)
    if rows == 0:
        raise ValueError("batch has no rows")
    each = -(-rows // parts)

    def deal(name: str, value: Array) -> Array:
        value = jnp.asarray(value)
        filler = jnp.zeros_like(value[:1]) if name == "row_weights" else value[:1]
        added = jnp.broadcast_to(filler, (each * parts - rows, *value.shape[1:]))
        return jnp.concatenate([value, added]).reshape(parts, each, *value.shape[1:])

    return {name: deal(name, value) for name, value in batch.items()}


def _scale(sums: LossSums) -> Array:
    """What the sums are multiplied by: 1 / denominator; 0 where there is nothing to divide by."""
    if sums.denominator is None:
        return jnp.ones((), jnp.float32)
    positive = sums.denominator > 0
    return jnp.where(positive, 1.0 / jnp.where(positive, sums.denominator, 1.0), 0.0)
