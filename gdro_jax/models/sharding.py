"""The one table from logical axes of parameters to mesh axes, and the shardings that follow from it."""

import math

import jax
import numpy as np

from gdro_jax.models.config import ParamSpec, Qwen3Config, stored_shape

TENSOR_AXIS = "tensor"
"""The mesh axis that heads, MLP columns and vocabulary lie along; rows lie along all others."""

MESH_AXES: dict[str, str | None] = {
    "embed": "fsdp",
    "heads": TENSOR_AXIS,
    "kv_heads": TENSOR_AXIS,
    "mlp": TENSOR_AXIS,
    "vocab": TENSOR_AXIS,
    "head_dim": None,
    "rank": None,
}


def row_axes(mesh: jax.sharding.Mesh | None) -> tuple[str, ...]:
    """The axes that rows lie along; none without a mesh."""
    return () if mesh is None else tuple(axis for axis in mesh.axis_names if axis != TENSOR_AXIS)


def row_shards(mesh: jax.sharding.Mesh | None) -> int:
    """How many parts rows lie in."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in row_axes(mesh))


def over_heads(x: jax.Array, axis: int) -> jax.Array:
    """`x` with its heads, which lie along `axis`, over the tensor axis of the mesh it is on, where that divides."""
    mesh = jax.sharding.get_abstract_mesh()
    if TENSOR_AXIS not in mesh.auto_axes or x.shape[axis] % mesh.shape[TENSOR_AXIS]:
        return x
    spec = [TENSOR_AXIS if a == axis else jax.P.UNCONSTRAINED for a in range(x.ndim)]
    return jax.lax.with_sharding_constraint(x, jax.P(*spec))


def param_sharding(config: Qwen3Config, spec: ParamSpec, mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """How one stored parameter lies on a mesh.

    A dimension is split where its mesh axis exists in `mesh` and divides it evenly, and is replicated otherwise;
    the layer axis is never split. Axis types of `mesh` are taken as `Auto`: the compiler places what is computed.

    Args:
      config: the architecture.
      spec: one entry of `param_specs(config)`.
      mesh: any axis names; only those of `MESH_AXES` matter.
    """
    axes = (None, *spec.axes) if spec.stacked else spec.axes
    sizes = dict(mesh.shape)
    split: list[str | None] = []
    for size, axis in zip(stored_shape(config, spec), axes, strict=True):
        name = None if axis is None else MESH_AXES[axis]
        split.append(name if name in sizes and size % sizes[name] == 0 else None)
    types = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    auto = jax.sharding.Mesh(np.asarray(mesh.devices), mesh.axis_names, axis_types=types)
    return jax.sharding.NamedSharding(auto, jax.sharding.PartitionSpec(*split))
