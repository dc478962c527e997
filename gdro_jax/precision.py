"""How matrix products are made, the same in models and losses.

Left to itself JAX multiplies float32 matrices in fewer bits on TPUs (bfloat16) and NVIDIA GPUs (TF32).
"""

import jax
import jax.numpy as jnp


def of(*arrays: jax.Array) -> jax.lax.Precision | None:
    """The precision for a product of these: all of its bits where one is float32, else the platform's own."""
    return jax.lax.Precision.HIGHEST if any(x.dtype == jnp.float32 for x in arrays) else None


def einsum(form: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """float32 product of two arrays."""
    return jnp.einsum(form, x, y, preferred_element_type=jnp.float32, precision=of(x, y))


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """float32 product of two arrays."""
    return jnp.matmul(x, y, preferred_element_type=jnp.float32, precision=of(x, y))
