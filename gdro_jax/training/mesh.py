"""A training step over a mesh: which device works on which rows, and where parameters and optimiser states lie.

Rows lie along every mesh axis but `tensor`: along `data` each device holds whole parameters, along `fsdp` a slice of
them, gathered where they are used; along `tensor` heads, MLP columns and vocabulary are split (`models.sharding`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gdro_jax.models.config import Qwen3Config, param_specs, stored_shape
from gdro_jax.models.sharding import TENSOR_AXIS, param_sharding, row_axes, row_shards

Tree = TypeVar("Tree")
AXES = ("data", "fsdp", TENSOR_AXIS)


class Layout(NamedTuple):
    """Where a step runs; static and hashable. `mesh` None is one device."""

    mesh: Mesh | None = None

    @property
    def shards(self) -> int:
        """How many pieces are worked on at the same time."""
        return row_shards(self.mesh)

    def over_shards(self, function: Callable[[Any], Any], arguments: Any) -> Any:
        """`function` of each shard's arguments, arrays [shards, ...] in and out; each device does its own."""
        if self.mesh is None:
            return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], arguments)))
        mapped = jax.vmap(function, spmd_axis_name=row_axes(self.mesh))
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):  # for kernels, which the compiler cannot split
            return self._split(mapped(self._split(arguments)))

    def keep(self, config: Qwen3Config, tree: Tree) -> Tree:
        """Inside `jit`: a pytree with parameters, or arrays of their names and shapes, laid where `put` does."""
        if self.mesh is None:
            return tree
        return jax.tree.map(jax.lax.with_sharding_constraint, tree, self._places(config, tree))

    def put(self, config: Qwen3Config, tree: Tree) -> Tree:
        """On the host: such a pytree laid on the mesh; in a job of several processes each passes the same arrays."""
        return tree if self.mesh is None else jax.device_put(tree, self._places(config, tree))

    def made(self, config: Qwen3Config, function: Callable[..., Tree], *arguments: Any) -> Tree:
        """On the host: what `function` makes, where `put` would lay it, so that no device ever holds all of it."""
        return jax.jit(lambda *given: self.keep(config, function(*given)))(*arguments)

    def shapes(self, config: Qwen3Config, tree: Tree) -> Tree:
        """Shapes and dtypes of such a pytree with where `put` would lay it, to compile for."""
        if self.mesh is None:
            return tree
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, self._places(config, tree)
        )

    def whole(self, tree: Tree) -> Tree:
        """On the host: arrays of a batch on every device; in a job of several processes each passes the same."""
        if self.mesh is None:
            return tree
        everywhere = NamedSharding(self.mesh, PartitionSpec())

        def one(x: Any) -> jax.Array:
            if isinstance(x, jax.Array):
                return jax.device_put(x, everywhere)
            return jax.make_array_from_callback(np.shape(x), everywhere, lambda part: np.asarray(x)[part])

        return jax.tree.map(one, tree)

    def _split(self, tree: Tree) -> Tree:
        """Along rows; what is split along `tensor`, such as keys and values, stays so."""
        assert self.mesh is not None
        mesh, rows = self.mesh, row_axes(self.mesh)

        def one(x: jax.Array) -> jax.Array:
            others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(rows, *others)))

        return jax.tree.map(one, tree)

    def _places(self, config: Qwen3Config, tree: Any) -> Any:
        """What has no parameter's name and shape (counters, factored moments) is on every device."""
        assert self.mesh is not None
        specs, mesh = param_specs(config), self.mesh

        def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
            found = next((name for name in reversed(names) if name in specs), None)
            if found is None or leaf.shape != stored_shape(config, specs[found]):
                return NamedSharding(mesh, PartitionSpec())
            return param_sharding(config, specs[found], mesh)

        return jax.tree_util.tree_map_with_path(place, tree)


ONE_DEVICE = Layout()


def make(data: int | None = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Layout:
    """A layout over all devices of the job, or over those given; one device needs none.

    Args:
      data: None for as many as are left.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    left, rest = divmod(len(devices), fsdp * tensor)
    if data is None and (rest or not left):
        raise ValueError(f"fsdp={fsdp}, tensor={tensor}: their product must divide the {len(devices)} devices")
    data = left if data is None else data
    if data * fsdp * tensor != len(devices):
        raise ValueError(f"data={data}, fsdp={fsdp}, tensor={tensor}: must multiply to the {len(devices)} devices")
    if len(devices) == 1:
        return ONE_DEVICE
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    placed = mesh_utils.create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True)
    return Layout(Mesh(placed, AXES, axis_types=types))
