"""What chips can do: memory, peak arithmetic, bandwidth; and one to compile for, here or of a TPU topology.

Figures: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e) and NVIDIA's data sheets, dense bfloat16.
"""

import os
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Chip(NamedTuple):
    """One device. `bandwidth` is 0 where it is not known; `measured`: `flops` is the rate of a product just run."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    measured: bool = False


GIB = 2**30
CHIPS = {  # by `jax.Device.device_kind`
    "TPU v4": Chip("TPU v4", 32 * GIB, 275e12, 1228e9),
    "TPU v5 lite": Chip("TPU v5e", 15.75 * GIB, 197e12, 819e9),  # of 16, what its compiler gives to programs
    "TPU v5": Chip("TPU v5p", 95 * GIB, 459e12, 2765e9),
    "TPU v6 lite": Chip("TPU v6e", 32 * GIB, 918e12, 1640e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100 80GB", 80 * GIB, 312e12, 2039e9),
    "NVIDIA H100 80GB HBM3": Chip("H100 80GB", 80 * GIB, 989e12, 3350e9),
    "NVIDIA H200": Chip("H200", 141 * GIB, 989e12, 4800e9),
}


def devices(topology: str | None) -> list[jax.Device]:
    """The devices of this job, or of a TPU topology such as `v5e:8x8`, for which libtpu compiles without a TPU.

    Raises:
      ValueError: no such topology, or libtpu is missing; one line.
    """
    if topology is None:
        return jax.devices()
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--topology={topology}: {reason} (it is a name such as v5e:2x2, and needs libtpu: pip install -e '.[tpu]')"
        ) from None


def chip(at: jax.Device) -> Chip:
    """What a device can do; one that is not in the table is asked for its memory and measured.

    Of a GPU that is here, memory is what JAX gives to programs: 3/4 of it, unless it is told otherwise.
    """
    live = at.platform in ("gpu", "cuda")
    held = (at.memory_stats() or {}).get("bytes_limit") if live or at.device_kind not in CHIPS else None
    if at.device_kind in CHIPS:
        known = CHIPS[at.device_kind]
        return known if held is None else known._replace(memory=min(known.memory, float(held)))
    memory = held if held is not None else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Chip(at.device_kind, float(memory), _matrix_rate(), 0.0, measured=True)


def _matrix_rate(size: int = 1024, tries: int = 5) -> float:
    """FLOP/s of float32 matrix products on the default device, the best of a few."""
    multiply, x = jax.jit(jnp.matmul), jnp.ones((size, size))
    multiply(x, x).block_until_ready()
    best = 0.0
    for _ in range(tries):
        begun = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best
