"""What the head's loss pass costs on TPUs by the compiler's own count, and what a kernel of our own could save.

    python experiments/benchmarks/head_roofline.py >> experiments/benchmarks/results/head_roofline.jsonl

Needs `pip install 'gdro-jax[tpu]'`, no TPU. One JSON line for each model and chip, of the head as a chip of the shipped
configurations has it, a tensor part of the vocabulary. For chunks of so many tokens one round of the loop in
`losses.linear_loss` is compiled: three products, loss and gradients, the head's own gradient added in place. FLOPs and
bytes of memory traffic are the compiler's; seconds are of 4,096 tokens at the chip's peak rate and at its bandwidth,
one after the other at the worst, at the same time at the best. `floor` is what no kernel goes below: the products.
`step` is the arithmetic of everything else for the same response, its prompt left out (`packed`, short prompts) or
padded (`padded`), with the blocks made again and a reference policy.
"""

import json
import os
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from gdro_jax.losses import linear_loss
from gdro_jax.losses.linear_blocks import WHOLE
from gdro_jax.models import presets
from gdro_jax.models.config import work
from gdro_jax.training import chips

TOKENS, PROMPT = 4096, 3200
TENSOR = {"1.7B": 1, "4B": 4, "8B": 4}
TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1")
CHUNKS = (256, 512, 1024, 2048, 4096)


def clipped(logprob: jax.Array, old: jax.Array, advantage: jax.Array) -> jax.Array:
    """Eq. 5, token by token."""
    ratio = jnp.exp(logprob - old)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.28) * advantage)


def one_round(device: jax.Device, chunk: int, width: int, vocab: int) -> tuple[float, float]:
    """FLOPs and bytes of a chunk."""
    place = jax.sharding.SingleDeviceSharding(device)

    def of(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    static = linear_loss._Static(clipped, 1.0, chunk)
    given = (of((vocab, width), "bfloat16"), of((vocab, width), "float32"), of((chunk, width), "bfloat16"))
    given += (of((chunk,), "int32"), of((chunk,), "bool"), of((chunk,), "float32"), of((chunk,), "float32"))
    run = jax.jit(partial(linear_loss._chunk, WHOLE, static, (True, True), None), donate_argnums=1)
    analysis = run.lower(*given).compile().cost_analysis()
    return float(analysis["flops"]), float(analysis["bytes accessed"])


def main() -> None:
    """Compiles and prints."""
    for model, tensor in TENSOR.items():
        config = presets.PRESETS[model]
        per_token, per_pair = work(config)
        head = 2.0 * config.hidden_size * config.vocab_size
        for topology in TOPOLOGIES:
            device = chips.devices(topology)[0]
            chip = chips.chip(device)
            line: dict[str, object] = {"model": model, "chip": chip.name, "tensor": tensor, "jax": jax.__version__}
            line["floor_seconds"] = 3 * head * TOKENS / tensor / chip.flops
            pairs = {"packed": TOKENS * TOKENS / 2, "padded": TOKENS * (PROMPT + TOKENS / 2) + PROMPT * PROMPT / 2}
            for case, count in pairs.items():
                tokens = TOKENS + (PROMPT if case == "padded" else 0)
                blocks = 5 * (tokens * per_token + count * per_pair)  # two forward, two backward, the reference
                line[f"head_share_of_{case}_step"] = round(4 * head * TOKENS / (4 * head * TOKENS + blocks), 4)
            for chunk in CHUNKS:
                flops, moved = one_round(device, chunk, config.hidden_size, config.vocab_size // tensor)
                rounds = TOKENS / chunk
                line[f"chunk_{chunk}"] = {
                    "flop": flops, "bytes": moved,
                    "seconds_arithmetic": round(flops * rounds / chip.flops, 6),
                    "seconds_memory": round(moved * rounds / chip.bandwidth, 6),
                }  # fmt: skip
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
