"""Compiles the published training steps for TPU slices on any machine, no TPU needed, as `gdro plan` does.

    python experiments/benchmarks/step_compile.py 1.7B v5e:8x8 [--section.field=VALUE ...] >> results.jsonl

Needs `pip install 'gdro-jax[tpu]'`. One JSON line: the shipped configuration `qwen3_SIZE_dapo.yaml` with the changes
given, on its mesh over the slice; memory of a chip by the compiler's own analysis. No weights are read.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from gdro_jax.models.presets import PRESETS
from gdro_jax.training import chips, config_io, plan, setup

GIB = 2**30
CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def main() -> None:
    """Compiles and prints the line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("size", choices=("1.7B", "4B", "8B"))
    parser.add_argument("topology", help="such as v5e:8x8, v6e:4x4")
    known, changes = parser.parse_known_args()
    file = CONFIGS / f"qwen3_{known.size.lower().replace('.', '_')}_dapo.yaml"
    pairs = [tuple(change.removeprefix("--").split("=", 1)) for change in changes]
    config = config_io.load(file, pairs)
    devices, architecture = chips.devices(known.topology), PRESETS[known.size]
    chip, layout = chips.chip(devices[0]), setup.layout(config, devices)
    shape = plan.shapes(config, config.data.max_prompt_tokens or 0, layout)
    compiled = plan.compile_step(config, architecture, shape, devices[0], layout)
    work = plan.flops(config, architecture, shape) / len(devices)
    line: dict[str, object] = {"model": known.size, "topology": known.topology, "chip": chip.name}
    line |= {"chips": len(devices), "mesh": dict(layout.mesh.shape) if layout.mesh is not None else None}
    line |= {"config": file.name, "changes": dict(pairs), "shape": shape._asdict(), "fits": plan.fits(compiled, chip)}
    line |= {"memory_gib": round(chip.memory / GIB, 2), "compile_seconds": round(compiled.seconds, 1)}
    if compiled.refused is None:
        parts = {"arguments": compiled.arguments, "temporary": compiled.temporary, "results": compiled.results}
        line |= {"gib": {name: round(size / GIB, 3) for name, size in (parts | {"total": compiled.total}).items()}}
    else:
        line["refused"] = compiled.refused[:300]
    line |= {"flop_per_chip": work, "seconds_at_peak": round(work / chip.flops, 1), "jax": jax.__version__}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
