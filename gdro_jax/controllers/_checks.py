"""Validation shared by the controllers: configuration fields and array shapes, with one form of message."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def reject(field: str, value: object, allowed: str) -> ValueError:
    """The error for a field whose value is not allowed: names the field, the value and what is allowed."""
    return ValueError(f"{field}={value!r} is not allowed: it must be {allowed}")


def number(
    field: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raises ValueError unless `value` is a real number in the interval from `low` to `high`."""
    allowed = f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise reject(field, value, allowed)
    if value < low or value > high or (open_low and value == low) or (open_high and value == high):
        raise reject(field, value, allowed)


def integer(field: str, value: object, low: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise reject(field, value, f"an integer >= {low}")


def choice(field: str, value: object, allowed: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of the strings `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise reject(field, value, "one of " + ", ".join(repr(name) for name in allowed))


def flag(field: str, value: object) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise reject(field, value, "True or False")


def int_vector(name: str, value: ArrayLike, length: int | None = None) -> jax.Array:
    """`value` as int32[length]; ValueError for another rank, length or dtype, and for what int32 cannot hold."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size:  # JAX would wrap it around
        for extreme in (int(value.min()), int(value.max())):
            if not -(2**31) <= extreme < 2**31:
                raise ValueError(f"{name} holds {extreme}: it must fit into int32")
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {array.dtype}: it must be an integer array")
    return _vector(name, array, length).astype(jnp.int32)


def id_vector(name: str, value: ArrayLike, size: int) -> jax.Array:
    """Ids as int32[P]; ValueError as of `int_vector`, and, where it can be seen, for one below `size` given twice."""
    ids = int_vector(name, value)
    if not isinstance(ids, jax.core.Tracer):
        known = np.sort(np.asarray(ids))
        twice = known[1:][(known[1:] == known[:-1]) & (known[1:] >= 0) & (known[1:] < size)]
        if twice.size:
            raise ValueError(f"{name} holds {int(twice[0])} twice: an id may not repeat")
    return ids


def bin_vector(value: ArrayLike, num_bins: int) -> jax.Array:
    """Bins as int32[P]; ValueError as of `int_vector`, and for a bin outside 0 ... num_bins - 1 where it can be seen.

    Under a transformation values are unknown: there such a bin is counted nowhere, or as another.
    """
    bins = int_vector("bins", value)
    if not isinstance(bins, jax.core.Tracer) and bins.size:
        for bin_ in (int(jnp.min(bins)), int(jnp.max(bins))):
            if not 0 <= bin_ < num_bins:
                raise ValueError(f"bins holds {bin_}: each must be in 0 ... {num_bins - 1}")
    return bins


def float_vector(name: str, value: ArrayLike, length: int | None = None) -> jax.Array:
    """`value` as float32[length]; ValueError for another rank or length."""
    return _vector(name, jnp.asarray(value), length).astype(jnp.float32)


def _vector(name: str, array: jax.Array, length: int | None) -> jax.Array:
    if array.ndim != 1 or (length is not None and array.shape[0] != length):
        wanted = "a vector" if length is None else f"a vector of length {length}"
        raise ValueError(f"{name} has shape {array.shape}: it must be {wanted}")
    return array
