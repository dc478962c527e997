"""A loss and its gradient over local devices with `jax.pmap`, equal to the one-device result.

Rows are dealt to the devices in order; a prompt's rollouts may lie on several, because advantages and row weights are
made for the whole step before. Sums, denominators and gradients are added with `psum`, and divided once. Which model
made the log-probs is the loss function's affair. Since jax 0.8 `jax.pmap` is `jit` of `shard_map` over local devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array

from gdro_jax.losses.reduction import (
    Batch,
    LossOutput,
    LossSums,
    LossSumsFn,
    Params,
    Shared,
    finish,
    finish_grad,
    num_rows,
    split_rows,
    sums_and_grad,
)

AXIS = "devices"


def loss_and_grad(
    loss_sums_fn: LossSumsFn[Params, Shared],
    params: Params,
    batch: Batch,
    shared: Shared,
    *,
    num_devices: int | None = None,
    microbatches: int = 1,
) -> tuple[LossOutput, Params]:
    """Loss, per-row losses, metrics and gradient over `num_devices` local devices.

    Args:
      loss_sums_fn: `(params, rows, shared) -> LossSums`, such as a model's log-probs and then `grpo.loss_sums`. It is
        the key under which the compiled program is kept, so pass the same object every step, not a new lambda.
      params: pytree of arrays, copied to every device.
      batch: arrays with the rows first, `"row_weights"` (absolute) among them. R need not divide by the devices: rows
        of weight 0 fill up.
      shared: pytree that every device sees whole (prompts that the rows index, reference parameters), or None.
      num_devices: the first so many local devices; None: all.
      microbatches: parts each device's rows are taken in.

    Returns: as `reduction.loss_and_grad`: `per_row` [R] in the batch's order, and gradients that lie where the
      parameters lie.
    Raises: ValueError for a number of devices that is not there, and for a batch without "row_weights" or rows.
    """
    available = jax.local_device_count()
    count = available if num_devices is None else num_devices
    if not 1 <= count <= available:
        raise ValueError(f"num_devices={count} must be in [1, {available}], the local devices")
    sums, grad, per_row = _mapped(loss_sums_fn, microbatches, params, split_rows(batch, count), shared)
    sums = sums._replace(per_row=per_row.reshape(-1)[: num_rows(batch)])
    return finish(sums), jax.tree.map(_place_like, finish_grad(grad, sums), params)


def make(
    loss_sums_fn: LossSumsFn[Params, Shared], *, num_devices: int | None = None, microbatches: int = 1
) -> Callable[[Params, Batch, Shared], tuple[LossOutput, Params]]:
    """`loss_and_grad` of one loss function: `(params, batch, shared) -> (LossOutput, gradient)`."""

    def call(params: Params, batch: Batch, shared: Shared) -> tuple[LossOutput, Params]:
        return loss_and_grad(loss_sums_fn, params, batch, shared, num_devices=num_devices, microbatches=microbatches)

    return call


@partial(
    jax.pmap,
    axis_name=AXIS,
    static_broadcasted_argnums=(0, 1),
    in_axes=(None, None, None, 0, None),
    out_axes=(None, None, 0),
)
def _mapped(
    loss_sums_fn: LossSumsFn[Params, Shared], microbatches: int, params: Params, rows: Batch, shared: Shared
) -> tuple[LossSums, Params, Array]:
    sums, grad = sums_and_grad(loss_sums_fn, params, rows, shared, microbatches)
    totals = jax.lax.psum((sums._replace(per_row=sums.per_row[:0]), grad), AXIS)
    return *totals, sums.per_row


def _place_like(grad: Array, param: Any) -> Array:
    return jax.device_put(grad, param.sharding) if isinstance(param, Array) else grad
