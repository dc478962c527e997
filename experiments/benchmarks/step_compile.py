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
from gdro_jax.training import chips, config_io, footprint, plan, setup

GIB = 2**30
CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def main() -> None:
    """Compiles and prints the line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("size", choices=("1.7B", "4B", "8B"))
    parser.add_argument("topology", help="such as v5e:8x8, v6e:4x4")
    parser.add_argument("--program", choices=("update", "sampler"), default="update")
    known, changes = parser.parse_known_args()
    file = CONFIGS / f"qwen3_{known.size.lower().replace('.', '_')}_dapo.yaml"
    pairs = [tuple(change.removeprefix("--").split("=", 1)) for change in changes]
    config = config_io.load(file, pairs)
    devices, architecture = chips.devices(known.topology), PRESETS[known.size]
    chip, layout = chips.chip(devices[0]), setup.layout(config, devices)
    shape = plan.shapes(config, config.data.max_prompt_tokens or 0, layout)
    line: dict[str, object] = {"model": known.size, "topology": known.topology, "chip": chip.name}
    line |= {"chips": len(devices), "mesh": dict(layout.mesh.shape) if layout.mesh is not None else None}
    line |= {"config": file.name, "changes": dict(pairs), "memory_gib": round(chip.memory / GIB, 2)}
    if known.program == "update":
        compiled = plan.compile_step(config, architecture, shape, devices[0], layout)
        work = plan.flops(config, architecture, shape) / len(devices)
        line |= {"program": "update", "shape": shape._asdict()} | said(compiled, chip)
        line |= {"flop_per_chip": work, "seconds_at_peak": round(work / chip.flops, 1)}
    else:
        sampler = plan.compile_sampler(config, architecture, shape, devices[0], layout)
        assert sampler is not None
        line |= {"program": "sampler", "stages": sampler.stages, "prompts": sampler.prompts, "rows": sampler.rows}
        line |= {name: said(program, chip) for name, program in sampler.programs.items()}
    print(json.dumps(line | {"jax": jax.__version__}), flush=True)


def said(compiled: footprint.Compiled, chip: chips.Chip) -> dict[str, object]:
    """What the compiler says of a program; `beside` is what lies on the chip meanwhile besides."""
    line: dict[str, object] = {"fits": plan.fits(compiled, chip), "compile_seconds": round(compiled.seconds, 1)}
    if compiled.refused is not None:
        return line | {"refused": compiled.refused[:300]}
    sizes = {name: getattr(compiled, name) for name in ("arguments", "temporary", "results", "beside", "total")}
    return line | {"gib": {name: round(size / GIB, 3) for name, size in sizes.items()}}


if __name__ == "__main__":
    main()
