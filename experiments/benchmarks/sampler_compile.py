"""Compiles the sampler for a TPU slice on any machine, no TPU needed: memory of a chip by the compiler's own analysis.

    python experiments/benchmarks/sampler_compile.py [--topology v5e:4x4] [--tensor 4] [--cache-dtype int8] ...

Needs `pip install -e '.[tpu]'`. One JSON line. Rows lie along the slice, heads along `--tensor` chips; the two
programs that hold most are compiled: prompts run and rows seated, and a segment of decoding at the longest window. A
program that does not fit is a result: `refused`, in the compiler's words. `grow_gib` is what lies on a chip while the
cache grows to the size compiled from half of that: weights, prompts, the old cache and the new one. `--cache paged`
holds prompts and responses in one pool, `cache_gib`; `--window` is how many tokens it has for a slot on average.
"""

import argparse
import json
import os
import re
import time
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from gdro_jax.models import attention, qwen3
from gdro_jax.models.presets import PRESETS
from gdro_jax.models.sharding import param_sharding
from gdro_jax.sampling import SamplingConfig
from gdro_jax.sampling.programs import Asked, Programs, tile
from gdro_jax.sampling.sampler import reader

GIB = 2**30


def main() -> None:
    """Compiles and prints the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(PRESETS), default="8B")
    parser.add_argument("--topology", default="v5e:4x4", help="such as v5e:4x4, v5p:2x2x4")
    parser.add_argument("--tensor", type=int, default=4, help="chips that share a row's heads")
    parser.add_argument("--prompts", type=int, default=4, help="of a shard, each decoded by --rollouts rows")
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=3200)
    parser.add_argument("--new-tokens", type=int, default=4096)
    parser.add_argument("--slots", type=int, default=16, help="rows of a shard decoded at a time")
    parser.add_argument("--cache-dtype", choices=("bfloat16", "int8"))
    parser.add_argument("--cache", choices=("contiguous", "paged"), default="contiguous")
    parser.add_argument("--page-tokens", type=int, default=64)
    parser.add_argument("--window", type=int, help="tokens of response with room in a slot, by default all")
    asked = parser.parse_args()
    devices = np.asarray(topologies.get_topology_desc(asked.topology, platform="tpu").devices)
    shape = (devices.size // asked.tensor, asked.tensor)
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.Mesh(devices.reshape(shape), ("data", "tensor"), axis_types=types)
    config = SamplingConfig(
        max_new_tokens=asked.new_tokens,
        stop_tokens=(151_643,),
        slots=asked.slots,
        cache_dtype=asked.cache_dtype,
        cache=asked.cache,
        page_tokens=asked.page_tokens,
    )
    line: dict[str, object] = dict(vars(asked)) | {"chip": devices.flat[0].device_kind, "chips": devices.size}
    line |= compiled(mesh, config, asked)
    print(json.dumps(line | {"jax": jax.__version__}))


def compiled(mesh: jax.sharding.Mesh, config: SamplingConfig, asked: argparse.Namespace) -> dict[str, object]:
    """Seconds and GiB of a chip for each program."""
    arguments = shapes(mesh, asked)
    model, window = arguments[0], asked.window or asked.new_tokens
    programs = Programs(config, mesh, reader(model, config, mesh))
    settings = {"slots": asked.slots, "window": window, "impl": "threefry2x32"}
    line: dict[str, Any] = {"attention": model.kernel, "window": window, "weights_gib": held_by_chip(model)}
    begin, line["start"] = timed(programs.starting, *arguments, **settings)
    if begin is None:  # where the state lies is known of a compiled program only
        return line
    held = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(lambda *a: programs.starting(*a, **settings), *arguments),
        begin.output_shardings,
    )
    leave_at = jax.ShapeDtypeStruct((), jnp.int32, sharding=arguments[2].sharding)
    line |= {"prompts_gib": held_by_chip(held[0].prompts), "cache_gib": held_by_chip(held[1].cache)}
    line["grow_gib"] = round(line["weights_gib"] + line["prompts_gib"] + 1.5 * line["cache_gib"], 3)
    rows = asked.prompts * asked.rollouts
    _, line["segment"] = timed(programs.decoding, arguments[0], *held, leave_at, tile=tile(asked.prompts, rows))
    return line


def shapes(mesh: jax.sharding.Mesh, asked: argparse.Namespace) -> tuple:
    """Model, call and seed as the programs take them, without their numbers."""
    architecture = PRESETS[asked.model]
    plain = jax.eval_shape(lambda: qwen3.init(architecture, jax.random.key(0), "bfloat16").arrays())
    specs = qwen3.param_specs(architecture)
    arrays = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=param_sharding(architecture, specs[name], mesh))
        for name, x in plain.items()
    }
    shards, rows = mesh.shape["data"], asked.prompts * asked.rollouts
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def of(*shape: int, dtype: jax.typing.DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shards * shape[0], *shape[1:]), dtype, sharding=split)

    prompts = (asked.prompts, asked.prompt_tokens)
    call = Asked(of(*prompts), of(*prompts, dtype=bool), of(rows), of(rows), of(rows), of(rows), of(1))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    kernel = attention.choose("auto", "tpu", architecture.head_dim, "bfloat16")
    model = qwen3.Qwen3(architecture, arrays, kernel=kernel)
    return model, call, jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=everywhere)


def timed(function, *arguments, **settings) -> tuple[jax.stages.Compiled | None, dict[str, object]]:
    """The compiled program, None where it was refused, and what the compiler says of it."""
    lowered = function.lower(*arguments, **settings)
    begun = time.perf_counter()
    try:
        done = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        needed = re.search(r"Used ([\d.]+[GM]) of ([\d.]+[GM])", said)
        if needed is None and "RESOURCE_EXHAUSTED" not in said:
            raise  # refused for another reason than memory: a fault
        return None, {"refused": said[:300] if needed is None else needed[0]}
    return done, memory(done) | {"compile_seconds": round(time.perf_counter() - begun, 1)}


def held_by_chip(tree: object) -> float:
    """GiB that one chip holds of it."""
    return round(
        sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)) / GIB, 3
    )


def memory(done: jax.stages.Compiled) -> dict[str, float]:
    """GiB by the compiler's analysis; what is both argument and result is counted once."""
    m = done.memory_analysis()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return {"total_gib": round(peak / GIB, 3), "temporary_gib": round(m.temp_size_in_bytes / GIB, 3)}


if __name__ == "__main__":
    main()
