"""One training step of a small Qwen3 on random data: seconds, peak memory, share of the machine's matrix rate.

    python experiments/benchmarks/train_step.py W1b|W2|growth [--microbatches A] [--repeats N] [--scale AXIS=FACTOR]

Prints one JSON line. W1b: 16 prompts of 64 tokens, 8 rollouts each of 128 tokens, vocabulary 8,192. W2: 2 prompts of
64, 8 rollouts each of 192, vocabulary 151,936. growth: 4 prompts of 64, 8 rollouts each of 128, vocabulary 4,096, 2
layers; `growth.py` runs it. Model: 4 layers, width 256, feed-forward 768, 8 heads, 4 KV heads of
32, tied embeddings, float32; GRPO without a reference, AdamW. `--scale` multiplies one of prompts, rollouts, prompt,
length, vocabulary, layers. Wall seconds depend on what else runs; CPU seconds nearly do not.
"""

import argparse
import json
import os
import resource
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdro_jax.losses import grpo
from gdro_jax.models import qwen3
from gdro_jax.training import batching, step
from gdro_jax.training.config import TrainConfig
from gdro_jax.training.optimiser import make_optimiser

SIZES = {
    "W1b": {"prompts": 16, "rollouts": 8, "prompt": 64, "length": 128, "vocabulary": 8192, "layers": 4},
    "growth": {"prompts": 4, "rollouts": 8, "prompt": 64, "length": 128, "vocabulary": 4096, "layers": 2},
    "W2": {"prompts": 2, "rollouts": 8, "prompt": 64, "length": 192, "vocabulary": 151936, "layers": 4},
}


def architecture(size: dict[str, int]) -> qwen3.Qwen3Config:
    return qwen3.Qwen3Config(
        vocab_size=size["vocabulary"],
        hidden_size=256,
        intermediate_size=768,
        num_layers=size["layers"],
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        max_positions=4096,
    )


def rollouts(size: dict[str, int], pieces: int) -> step.Batch:
    """Random tokens, rewards, and old log-probs that are uniform plus noise, so that ratios are not all 1."""
    rng = np.random.default_rng(0)
    counts = np.full(size["prompts"], size["rollouts"])
    rows, vocab = int(counts.sum()), size["vocabulary"]
    shape = (rows, size["length"])
    return step.Batch(
        prompts=rng.integers(0, vocab, (size["prompts"], size["prompt"])).astype(np.int32),
        prompt_mask=np.ones((size["prompts"], size["prompt"]), bool),
        weights=np.ones(size["prompts"], np.float32),
        prompt_index=batching.flat_index(counts),
        tokens=rng.integers(0, vocab, shape).astype(np.int32),
        mask=np.ones(shape, bool),
        logprobs=(-np.log(vocab) + 0.1 * rng.standard_normal(shape)).astype(np.float32),
        rewards=rng.random(rows).astype(np.float32),
        scorable=np.ones(rows, bool),
        pieces=batching.cut(counts, pieces, rng, size["rollouts"]),
    )


def flops(size: dict[str, int]) -> float:
    """Of a step with prompts shared and the head in three products; forward and twice that backward."""
    c = architecture(size)
    qo, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    matrices = c.num_layers * (2 * c.hidden_size * (qo + kv) + 3 * c.hidden_size * c.intermediate_size)
    rows = size["prompts"] * size["rollouts"]
    tokens = size["prompts"] * size["prompt"] + rows * size["length"]
    pairs = size["prompts"] * size["prompt"] ** 2 + rows * size["length"] * (size["prompt"] + size["length"])
    attention = c.num_layers * 2 * qo * pairs
    return 6.0 * (matrices * tokens + attention + rows * size["length"] * c.hidden_size * c.vocab_size)


def check() -> float:
    """Largest relative difference of loss and gradient norm between the step and whole sequences with all logits."""
    size = {"prompts": 2, "rollouts": 3, "prompt": 6, "length": 5, "vocabulary": 64, "layers": 2}
    config = TrainConfig(microbatches=2, kl_coef=0.0)
    model, batch = qwen3.init(architecture(size), jax.random.key(0)), rollouts(size, 2)
    result = jax.jit(step.update, static_argnames=("config", "temperature"))(
        step.Learner(model, make_optimiser(config).init(model)), None, batch, config, 1.0
    )
    whole = np.concatenate([batch.prompts[batch.prompt_index], batch.tokens], axis=1)
    advantages = grpo.group_advantages(batch.rewards, batch.prompt_index, size["prompts"])

    def loss(model: qwen3.Qwen3) -> jax.Array:
        logits = qwen3.logits(model, whole, np.ones(whole.shape, bool))[:, size["prompt"] - 1 : -1]
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.tokens[..., None], -1)[..., 0]
        return grpo.policy_loss(logprobs, batch.logprobs, advantages, batch.mask).loss

    value, grad = jax.jit(jax.value_and_grad(loss))(model)
    pairs = ((result.metrics["loss"], value), (result.metrics["grad_norm"], optax.global_norm(grad)))
    worst = max(abs(float(a) / float(b) - 1) for a, b in pairs)
    if not worst < 1e-4:
        raise SystemExit(f"the step differs from the naive one by {worst:.1e}: not timed")
    return worst


def matrix_rate() -> float:
    """Largest FLOP/s of products of this size in a few tries."""
    x = jax.random.normal(jax.random.key(0), (1024, 1024))
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    best = 0.0
    for _ in range(20):
        begun = time.perf_counter()
        multiply(x).block_until_ready()
        best = max(best, 2 * 1024**3 / (time.perf_counter() - begun))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=sorted(SIZES))
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", default="prompts=1", metavar="AXIS=FACTOR")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="against the naive step")
    known = parser.parse_args()
    size = dict(SIZES[known.workload])
    axis, _, factor = known.scale.partition("=")
    size[axis] = int(size[axis] * float(factor))

    config = TrainConfig(microbatches=known.microbatches, kl_coef=0.0, learning_rate=1e-5, weight_decay=0.01)
    update = step.compiled_update()
    model = qwen3.init(architecture(size), jax.random.key(0))
    learner = step.Learner(model, make_optimiser(config).init(model))
    del model
    batch = rollouts(size, known.microbatches)
    wall, cpu, losses = [], [], []
    for _ in range(known.repeats + 1):
        begun, spent = time.perf_counter(), time.process_time()
        learner, _, metrics, _ = jax.block_until_ready(update(learner, None, batch, config, 1.0))
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - spent)
        losses.append(float(metrics["loss"]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if not np.isfinite(losses).all():
        raise SystemExit(f"losses={losses}: not finite")
    worst = check() if known.check else float("nan")
    seconds, work = statistics.median(wall[1:]), flops(size)
    rate = matrix_rate()
    line = {
        "workload": known.workload, "library": "gdro-jax", "jax": jax.__version__, **size,
        "scale": known.scale, "microbatches": known.microbatches, "cores": len(os.sched_getaffinity(0)),
        "first_call_s": round(wall[0], 3), "times_s": [round(t, 3) for t in wall[1:]],
        "median_s": round(seconds, 4), "cpu_s": round(statistics.median(cpu[1:]), 4), "peak_rss_mib": round(peak, 1),
        "flops": work, "matrix_flops_per_s": round(rate), "share_of_matrix_rate": round(work / seconds / rate, 3),
        "difference_from_naive": float(f"{worst:.1e}") if known.check else None,
        "losses": [round(x, 6) for x in losses],
        "parameters": int(sum(x.size for x in jax.tree.leaves(learner.model))),
    }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()
