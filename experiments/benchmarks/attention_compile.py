"""Attention compiled ahead of time for a TPU, no TPU needed: what the compiler says of memory, forward and backward.

    python experiments/benchmarks/attention_compile.py --out results.json [--topology v5e:4x4]

Needs `pip install 'gdro-jax[tpu]'`. Heads of Qwen3-1.7B in bfloat16: responses over their prompts as the trainer runs
them, on one chip and with heads split over four. Nothing is run.
"""

import argparse
import json
import os
import pathlib
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from gdro_jax.models import attention
from gdro_jax.models.presets import PRESETS

MODEL = PRESETS["1.7B"]
ROWS = 4
LENGTHS = ((512, 2048), (1024, 4096))  # of prompts and of responses


def main() -> None:
    """Compiles every case and writes one JSON object."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--topology", default="v5e:4x4")
    known = parser.parse_args()
    chips = topologies.get_topology_desc(known.topology, platform="tpu").devices
    what = {"jax": jax.__version__, "topology": known.topology, "chip": chips[0].device_kind, "rows": ROWS}
    cases: list[dict[str, object]] = []
    for prompt, response in LENGTHS:
        for tensor in (1, 4):
            types = (jax.sharding.AxisType.Auto,) * 2
            mesh = jax.sharding.Mesh(np.array(chips[:tensor]).reshape(1, tensor), ("data", "tensor"), axis_types=types)
            for kernel in ("xla", "splash"):
                cases.append({"prompt": prompt, "response": response, "tensor": tensor, "kernel": kernel})
                cases[-1] |= {"forward": compiled(kernel, prompt, response, mesh, backward=False)}
                cases[-1] |= {"backward": compiled(kernel, prompt, response, mesh, backward=True)}
                print(json.dumps(cases[-1]), flush=True)
                known.out.write_text(json.dumps(what | {"cases": cases}, indent=2) + "\n")


def compiled(kernel: str, prompt: int, response: int, mesh: jax.sharding.Mesh, *, backward: bool) -> dict[str, object]:
    """Temporary bytes of one chip and seconds, or what the compiler says where it does not fit."""
    size, heads = MODEL.head_dim, jax.P(None, None, "tensor")

    def of(length: int, number: int) -> jax.ShapeDtypeStruct:
        place = jax.sharding.NamedSharding(mesh, heads)
        return jax.ShapeDtypeStruct((ROWS, length, number, size), jnp.bfloat16, sharding=place)

    def mask(length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((ROWS, length), bool, sharding=jax.sharding.NamedSharding(mesh, jax.P()))

    def run(q, k, v, shared_k, shared_v, real, before):
        return attention.causal(kernel, real, before)(q, k, v, (shared_k, shared_v))

    def grad(*given):
        return jax.grad(lambda *x: run(*x, *given[5:]).astype(jnp.float32).sum(), argnums=range(5))(*given[:5])

    own, shared = of(response, MODEL.num_kv_heads), of(prompt, MODEL.num_kv_heads)
    given = (of(response, MODEL.num_heads), own, own, shared, shared, mask(response), mask(prompt))
    begun = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = jax.jit(grad if backward else run).lower(*given)
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        return {"refused": " ".join(str(error).split())[:200]}
    return {"temporary_bytes": memory.temp_size_in_bytes, "seconds": round(time.perf_counter() - begun, 1)}


if __name__ == "__main__":
    main()
