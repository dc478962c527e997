"""Compiles the training step for a TPU chip on any machine, no TPU needed, and prints what the compiler says of memory.

    python tpu/compile_check.py [--topology v5e:2x2] [--prompt-tokens L] [--config FILE] [--section.field=VALUE ...]

Needs `pip install 'gdro-jax[tpu]'`. Prints one JSON line. The step uses one chip of the topology, as the trainer does.
Exit codes: 0 it compiles; 2 bad usage, or libtpu is missing.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from gdro_jax.models import attention, qwen3
from gdro_jax.training import batching, config_io, setup, step
from gdro_jax.training.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles and returns the exit code."""
    parser = argparse.ArgumentParser(prog="compile_check.py", allow_abbrev=False)
    parser.add_argument("--topology", default="v5e:2x2", help="such as v5e:2x2, v6e:2x2, v5p:2x2x1")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="the padded length of every prompt")
    parser.add_argument("--config", metavar="FILE")
    known, fields = parser.parse_known_args(arguments)
    pairs = [field.removeprefix("--").partition("=") for field in fields]
    try:
        config = config_io.load(known.config, [(name, value) for name, _, value in pairs])
        chip = topologies.get_topology_desc(known.topology, platform="tpu").devices[0]
        architecture = qwen3.Qwen3Config.from_hf(setup.model_folder(config.model.path))
        kernel = attention.choose(config.model.attention, "tpu", architecture.head_dim, config.model.dtype)
    except (config_io.ConfigError, RuntimeError, ValueError, NotImplementedError) as error:
        return _refuse(f"{' '.join(str(error).split())} (a topology needs libtpu: pip install 'gdro-jax[tpu]')")
    found = check(config, architecture, kernel, chip, known.prompt_tokens)
    print(json.dumps({"topology": known.topology, "chip": chip.device_kind, "attention": kernel} | found))
    return 0


def check(
    config: Config, architecture: qwen3.Qwen3Config, kernel: str, chip: jax.Device, prompt_tokens: int
) -> dict[str, float]:
    """Compiles the step of a configuration for one chip; seconds, and bytes by the compiler's own analysis."""
    shapes = jax.eval_shape(lambda: arguments_of(config, architecture, kernel, prompt_tokens))
    place = jax.sharding.SingleDeviceSharding(chip)
    on_chip = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    learner, reference, batch = on_chip
    begun = time.perf_counter()
    lowered = jax.jit(step.update, static_argnames=("config", "temperature")).lower(
        learner, reference, batch, config=config.train, temperature=config.sampling.temperature
    )
    memory = lowered.compile().memory_analysis()
    return {
        "rows": config.rows_per_step,
        "compile_seconds": round(time.perf_counter() - begun, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def arguments_of(
    config: Config, architecture: qwen3.Qwen3Config, kernel: str, length: int
) -> tuple[step.Learner, qwen3.Qwen3 | None, step.Batch]:
    """A learner, the frozen policy and a batch of the configuration's shapes, prompts of `length` tokens."""
    prompts, rows, tokens = config.train.prompts_per_step, config.rows_per_step, config.sampling.max_new_tokens
    rollouts = np.full(prompts, config.controller.mean_rollouts)
    pieces = config.train.minibatches * config.train.microbatches
    model = qwen3.init(architecture, jax.random.key(0), config.model.param_dtype)
    model = qwen3.Qwen3(architecture, model.arrays(), config.model.dtype, config.model.remat, kernel)
    batch = step.Batch(
        prompts=jnp.zeros((prompts, length), jnp.int32),
        prompt_mask=jnp.ones((prompts, length), bool),
        weights=jnp.ones(prompts),
        prompt_index=jnp.asarray(batching.flat_index(rollouts)),
        tokens=jnp.zeros((rows, tokens), jnp.int32),
        mask=jnp.ones((rows, tokens), bool),
        logprobs=jnp.zeros((rows, tokens)),
        rewards=jnp.zeros(rows),
        scorable=jnp.ones(rows, bool),
        pieces=jax.tree.map(jnp.asarray, batching.cut(rollouts, pieces, np.random.default_rng(0))),
    )
    low_rank = config.model.lora_rank is not None
    trained = setup.adapters(config.model, architecture, jax.random.key(0)) if low_rank else model
    frozen = qwen3.working(model) if low_rank or config.train.kl_coef > 0 else None
    return step.Learner(trained, step.make_optimiser(config.train).init(trained)), frozen, batch


def _refuse(reason: str) -> int:
    sys.stderr.write(f"compile_check.py: {reason}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
