"""Program size and compile time by depth: neither should grow, but for decoding from 4 to `decode.UNROLLED` layers.

    python experiments/benchmarks/model_compile.py --out results.json

Compiles (nothing is run, no weights are made) the widths of Qwen3-0.6B at 4, 12 and 36 layers: logits, the gradient of
their sum, and one decoding step.
"""

import argparse
import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp

from gdro_jax.models import decode, qwen3
from gdro_jax.models.presets import PRESETS

DEPTHS = (4, 12, 36)
ROWS, LENGTH = 4, 64


def main() -> None:
    """Measures all depths in turn, a few rounds, and writes one JSON object."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3, help="compilations of each program; 0 for its size alone")
    known = parser.parse_args()
    results = {name: {str(depth): {} for depth in DEPTHS} for name in ("logits", "gradient", "decode")}
    for name, per_depth in results.items():
        for depth in DEPTHS:
            per_depth[str(depth)]["lines"] = len(lower(name, depth).as_text().splitlines())
    for _ in range(known.rounds):
        for name, per_depth in results.items():
            for depth in DEPTHS:
                measure(name, depth, per_depth[str(depth)])
    text = json.dumps({"jax": jax.__version__, "backend": jax.default_backend(), "programs": results}, indent=2)
    known.out.write_text(text + "\n")
    print(text)


def measure(name: str, depth: int, into: dict) -> None:
    """One compilation: CPU seconds, which say the same on a shared machine, and instructions after optimisation."""
    jax.clear_caches()
    lowered = lower(name, depth)
    begun = time.process_time()
    compiled = lowered.compile()
    into.setdefault("cpu_seconds", []).append(round(time.process_time() - begun, 2))
    into["instructions"] = sum(" = " in line for line in compiled.as_text().splitlines())


def lower(name: str, depth: int) -> jax.stages.Lowered:
    """The named program of a model of this depth, from shapes alone."""
    cfg = dataclasses.replace(PRESETS["0.6B"], num_layers=depth)
    model = jax.eval_shape(lambda: qwen3.init(cfg, jax.random.key(0), "bfloat16"))
    tokens, mask = jnp.zeros((ROWS, LENGTH), jnp.int32), jnp.ones((ROWS, LENGTH), bool)
    if name == "decode":
        own = jnp.arange(ROWS)
        tiles = jax.eval_shape(lambda: decode.tiles_of(own, ROWS, 2))
        prompts = jax.eval_shape(lambda m: decode.lay_out(qwen3.prefill(m, tokens, mask)[0]), model)
        cache = jax.eval_shape(lambda p: decode.empty_cache(p, ROWS, LENGTH), prompts)
        return jax.jit(decode.decode).lower(model, tokens[:, 0], own, own, prompts, tiles, cache)

    def total(model: qwen3.Qwen3) -> jax.Array:
        return qwen3.logits(model, tokens, mask).sum()

    return jax.jit(total if name == "logits" else jax.grad(total)).lower(model)


if __name__ == "__main__":
    main()
