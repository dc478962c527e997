"""What a compiled program takes: seconds to compile, bytes of a device by the compiler's own analysis."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np


class Compiled(NamedTuple):
    """Seconds of compilation and bytes on a device; `refused` is the compiler's reason where it did not fit.

    `beside` is what lies there at the same time without being given to the program.
    """

    seconds: float
    arguments: int = 0
    results: int = 0
    temporary: int = 0
    refused: str | None = None
    beside: int = 0

    @property
    def total(self) -> int:
        return self.arguments + self.results + self.temporary + self.beside


def measured(lowered: jax.stages.Lowered, beside: int = 0) -> tuple[Compiled, jax.stages.Compiled | None]:
    """Compiles; None where the compiler refused it for its memory."""
    begun = time.perf_counter()
    try:
        done = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = too_large(error)
        if refused is None:
            raise
        return Compiled(time.perf_counter() - begun, refused=refused, beside=beside), None
    seconds, memory = time.perf_counter() - begun, done.memory_analysis()
    assert memory is not None  # every backend that the trainer runs on analyses it
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = (memory.argument_size_in_bytes, results, memory.temp_size_in_bytes)
    return Compiled(seconds, *sizes, beside=beside), done


def too_large(error: jax.errors.JaxRuntimeError) -> str | None:
    """Why there was not enough memory, in one line; None for another error."""
    return str(error).strip().splitlines()[0] if "RESOURCE_EXHAUSTED" in str(error) else None


def held(tree: Any) -> int:
    """Bytes that a device holds of arrays, or of shapes with shardings."""
    return sum(_shard(x) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _shard(x: Any) -> int:
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return int(np.prod(shape))
