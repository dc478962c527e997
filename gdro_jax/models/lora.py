"""Low-rank adapters (LoRA, arXiv 2106.09685, section 4.1): W + (alpha / r) A B, where A and B alone are trained.

B begins at zero, so an adapted model begins as its base. The sum is made in float32, a layer at a time, and then cast
as any parameter is: sampler, trainer and exported model compute with the same weights.
Letters: r rank, in and out of the matrix.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from gdro_jax import precision
from gdro_jax.models.config import ParamSpec, Qwen3Config, param_specs, stored_shape

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapters:
    """The factors of every adapted matrix, which is a pytree that can be differentiated and optimised.

    Attributes:
      arrays: `NAME_a` [layers, in, r] and `NAME_b` [layers, r, out] for each adapted NAME.
      scale: alpha / r.
    """

    arrays: dict[str, jax.Array]
    scale: float

    def scaled(self) -> dict[str, jax.Array]:
        """The same with the scale in B: what `effective` takes."""
        return {n: x * jnp.asarray(self.scale, x.dtype) if n.endswith("_b") else x for n, x in self.arrays.items()}


def targets(text: str) -> tuple[str, ...]:
    """`all`, or names of matrices separated by commas.

    Raises:
      ValueError: an unknown name, or none.
    """
    names = TARGETS if text == "all" else tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if not set(names) <= set(TARGETS):
        raise ValueError(f"must be all, or some of {', '.join(TARGETS)} separated by commas")
    return names


def adapter_specs(config: Qwen3Config, rank: int, names: tuple[str, ...]) -> dict[str, ParamSpec]:
    """Shape, axes and initialiser of every factor; A is normal of variance 1 / in, B zero.

    Raises:
      ValueError: a rank above what a matrix can have.
    """
    most = min(min(param_specs(config)[name].shape) for name in names)
    if rank > most:
        raise ValueError(f"lora_rank={rank}: must be at most {most}, the smaller side of the smallest matrix adapted")
    specs: dict[str, ParamSpec] = {}
    for name in names:
        spec = param_specs(config)[name]
        (rows, columns), (before, after) = spec.shape, spec.axes
        a = dataclasses.replace(spec, shape=(rows, rank), axes=(before, "rank"), scale=1 / math.sqrt(rows))
        b = dataclasses.replace(spec, shape=(rank, columns), axes=("rank", after), scale=0.0)
        specs |= {f"{name}_a": a, f"{name}_b": b}
    return specs


def init(
    config: Qwen3Config, key: jax.Array, *, rank: int, alpha: float, names: tuple[str, ...], dtype: str = "float32"
) -> Adapters:
    """Adapters that change nothing yet, every factor from its own folded key."""
    arrays = {}
    for i, (name, spec) in enumerate(adapter_specs(config, rank, names).items()):
        noise = jax.random.normal(jax.random.fold_in(key, i), stored_shape(config, spec), jnp.float32)
        arrays[name] = (noise * (spec.scale or 0.0)).astype(dtype)
    return Adapters(arrays=arrays, scale=alpha / rank)


def effective(weights: dict[str, jax.Array], dtype: jnp.dtype) -> dict[str, jax.Array]:
    """A layer's weights as they compute: adapters, of `Adapters.scaled`, added in float32, everything cast."""
    return {
        name: _sum(w, weights[f"{name}_a"], weights[f"{name}_b"]).astype(dtype)
        if f"{name}_a" in weights
        else w.astype(dtype)
        for name, w in weights.items()
        if not name.endswith(("_a", "_b"))
    }


@functools.partial(jax.jit, static_argnames="dtype")
def merged(w: jax.Array, a: jax.Array, b: jax.Array, dtype: str) -> jax.Array:
    """The same of a stacked matrix [layers, in, out], a layer at a time."""
    return jax.lax.map(lambda layer: _sum(*layer).astype(dtype), (w, a, b))


def _sum(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """float32[in, out]."""
    return w.astype(jnp.float32) + precision.matmul(a, b)
