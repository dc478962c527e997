"""Controllers alone: milliseconds to plan and to update, and to allocate exactly, for four sizes of a step.

    python experiments/benchmarks/controllers.py [--repeats N]

Workload W4: 10 bins, arms 2..3n for a mean of n rollouts; 512 prompts x 4, 256 x 4, 512 x 16, 4096 x 16. `plan` is
classify, weigh and allot, `update` learns from the outcome, `both` are one after the other, `allocate` is the exact
dynamic program over bins alone (the most probable counts that meet the budget). All jitted; medians after warm-up.
Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from gdro_jax import controllers
from gdro_jax.controllers import allocation

SIZES = ((512, 4), (256, 4), (512, 16), (4096, 16))
BINS = 10


def median_ms(run: Callable[[], object], repeats: int) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        times.append(1e3 * (time.perf_counter() - begun))
    return round(statistics.median(times), 3)


def measure(name: str, prompts: int, mean: int, repeats: int) -> dict[str, float]:
    rng, total = np.random.default_rng(0), 4 * prompts
    settings = {"edges": tuple(np.linspace(0.1, 0.9, BINS - 1).tolist()), "min_rollouts": 2, "max_rollouts": 3 * mean}
    rule = controllers.make(name, num_prompts=total, prompts_per_step=prompts, mean_rollouts=mean, **settings)
    plan, update = jax.jit(rule.plan), jax.jit(rule.update)
    state, key = rule.init(jax.random.key(0)), jax.random.key(1)
    for step in range(8):  # until the bins are all in use
        ids = (np.arange(prompts, dtype=np.int32) + step * prompts) % total
        drawn, state = plan(state, ids, jax.random.fold_in(key, step))
        count = np.asarray(drawn.rollouts)
        if count.sum() != prompts * mean:
            raise SystemExit(f"{name}: {count.sum()} rollouts planned, the budget is {prompts * mean}")
        correct = rng.binomial(count, ids / total).astype(np.int32)
        outcome = controllers.Outcome(
            num_correct=correct,
            num_rollouts=count,
            num_unscorable=np.zeros(prompts, np.int32),
            signal=rng.random(prompts).astype(np.float32),
            reward_variance=(correct * (count - correct) / (count * (count - 1))).astype(np.float32),
        )
        state = update(state, drawn, outcome)

    def both() -> object:
        now, planned = plan(state, ids, key)
        return update(planned, now, outcome)

    return {
        "plan_ms": median_ms(lambda: plan(state, ids, key), repeats),
        "update_ms": median_ms(lambda: update(state, drawn, outcome), repeats),
        "both_ms": median_ms(both, repeats),
    }


def allocate_ms(prompts: int, mean: int, repeats: int) -> float:
    rng, arms = np.random.default_rng(0), np.arange(2, 3 * mean + 1)
    counts = rng.multinomial(prompts, np.full(BINS, 1 / BINS)).astype(np.int32)
    log_probs = np.asarray(jax.nn.log_softmax(rng.normal(0, 1, (BINS, len(arms))).astype(np.float32), axis=-1))
    run = jax.jit(allocation.max_probability, static_argnames=("arms", "budget"))
    fixed = {"arms": tuple(arms.tolist()), "budget": prompts * mean}
    return median_ms(lambda: run(log_probs, counts, **fixed), repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    repeats = parser.parse_args().repeats
    line: dict[str, object] = {"workload": "W4", "jax": jax.__version__, "cores": len(os.sched_getaffinity(0))}
    for prompts, mean in SIZES:
        found: dict[str, float] = {}
        for name in ("joint", "rollout_gdro_published"):
            found |= {f"{name}.{k}": v for k, v in measure(name, prompts, mean, repeats).items()}
        line[f"{prompts}x{mean}"] = found | {"allocate_ms": allocate_ms(prompts, mean, repeats)}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
