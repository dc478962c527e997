"""Sampling benchmarks, one JSON line each: `python experiments/benchmarks/sampling.py WORKLOAD`.

w1a       16 prompts of 64 tokens x 8 rollouts, 128 new tokens each, log-probs returned
w3        the same rows in 40 slots, up to 512 new tokens, 128 of 8,192 tokens stopping a row
w3-fixed  the same rows all at once, decoded until the longest ends, as fixed-batch loops do
w3-graded w3 while math-verify grades real responses, one for each row: --data FOLDER with labelled_responses.jsonl;
          --hard takes those alone that a worker must be asked about, some of them again
cache     log-probs of the shipped base against the trainer's, by what keys and values are kept in
flat      decode seconds per token while the prompts already finished grow, 256 of 4 rows each

Qwen3 of 4 layers, width 256, feed-forward 768, 8 heads over 4 KV heads of 32, vocabulary 8,192, random float32 weights.
Seconds are medians of calls after the first; memory is the peak of this process.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import resource
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from gdro_jax.models import qwen3
from gdro_jax.sampling import Sampler, SamplingConfig, empty

MODEL = qwen3.Qwen3Config(
    vocab_size=8192, hidden_size=256, intermediate_size=768, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32
)
PROMPTS, ROLLOUTS, PROMPT_TOKENS, STOPS = 16, 8, 64, tuple(range(128))


def main() -> None:
    """Runs one workload and prints its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=("w1a", "w3", "w3-fixed", "w3-graded", "cache", "flat"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=pathlib.Path, help="of w3-graded")
    parser.add_argument("--hard", action="store_true", help="of w3-graded")
    parser.add_argument("--workers", type=int, default=2, help="that grade, of w3-graded")
    parser.add_argument("--slots", type=int, default=40, help="of w3")
    asked = parser.parse_args()
    model = random_model()
    line: dict[str, object] = {
        "workload": asked.workload,
        "jax": jax.__version__,
        "cores": len(os.sched_getaffinity(0)),
    }
    line |= {"device": str(jax.devices()[0]), "machine": platform.machine()}
    match asked.workload:
        case "w1a":
            line |= speed(model, SamplingConfig(max_new_tokens=128), asked.repeats)
            line |= limits(model, line["tokens_per_second"])
        case "w3":
            config = SamplingConfig(max_new_tokens=512, stop_tokens=STOPS, slots=asked.slots)
            line |= speed(model, config, asked.repeats)
        case "w3-fixed":
            config = SamplingConfig(max_new_tokens=512, stop_tokens=STOPS, segment=512)
            line |= speed(model, config, asked.repeats)
        case "w3-graded":
            config = SamplingConfig(max_new_tokens=512, stop_tokens=STOPS, slots=asked.slots)
            line |= graded(model, config, asked.repeats, asked.data, asked.workers, asked.hard)
        case "cache":
            line |= cache()
        case "flat":
            line |= flat(model, asked.repeats)
    print(json.dumps(line))


def peak_mib() -> float:
    """Of this process until now."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def random_model() -> qwen3.Qwen3:
    """Normal weights of 0.02, as `qwen3.init` has them, made on the host: only the sampler's programs are compiled."""
    rng, arrays = np.random.default_rng(0), {}
    for name, spec in qwen3.param_specs(MODEL).items():
        shape = qwen3.stored_shape(MODEL, spec)
        noise = np.ones(shape) if spec.scale is None else spec.scale * rng.standard_normal(shape, np.float32)
        arrays[name] = jnp.asarray(noise, jnp.float32)
    return qwen3.Qwen3(MODEL, arrays)


def prompts(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts int32[number, 64] with their mask."""
    tokens = np.random.default_rng(0).integers(128, MODEL.vocab_size, (number, PROMPT_TOKENS)).astype(np.int32)
    return tokens, np.ones(tokens.shape, bool)


def speed(model: qwen3.Qwen3, config: SamplingConfig, repeats: int) -> dict[str, object]:
    """Tokens a second and the useful share of slot-steps for 16 prompts x 8 rollouts."""
    sampler = Sampler(model, config)
    tokens, mask = prompts(PROMPTS)
    index = np.repeat(np.arange(PROMPTS, dtype=np.int32), ROLLOUTS)
    seconds, drawn, steps = [], [], []
    for number in range(repeats + 1):
        begun = time.perf_counter()
        out = sampler.rows(tokens, mask, index, index, jax.random.key(number))
        seconds.append(time.perf_counter() - begun)
        drawn.append(int(out.mask.sum()))
        steps.append(sampler.slot_steps)
    rates = [n / s for n, s in zip(drawn[1:], seconds[1:], strict=True)]
    return {
        "rows": len(index),
        "tokens": drawn[1:],
        "seconds": [round(s, 3) for s in seconds[1:]],
        "first_call_seconds": round(seconds[0], 2),
        "tokens_per_second": round(statistics.median(rates), 1),
        "useful_share": round(sum(drawn[1:]) / sum(steps[1:]), 4),
        "peak_mib": peak_mib(),
    }


class Replaced:
    """Grades real responses in place of what was sampled: the answer given for a row is the row's number."""

    def __init__(self, data: pathlib.Path, verifier, rows: int, hard: bool):
        lines = [json.loads(line) for line in (data / "labelled_responses.jsonl").read_text().splitlines()]
        pairs = [(response, line["gt"]) for line in lines for response in line["code"]]
        if hard:
            pairs = [pair for pair in pairs if by_worker(pair)]
        spread = pairs[:: max(1, len(pairs) // rows)]
        self.pairs, self._verifier = list(itertools.islice(itertools.cycle(spread), rows)), verifier

    def grade(self, responses: list[str], answers: list[str]):
        pairs = [self.pairs[int(row)] for row in answers]
        return self._verifier.grade([response for response, _ in pairs], [gold for _, gold in pairs])


def by_worker(pair: tuple[str, str]) -> bool:
    """Whether a worker is asked about a response and gold answer, which are no plain numbers or spelled unlike."""
    from gdro_jax.rewards import base, math_verifier

    return isinstance(math_verifier._plan(*pair), base.Pair)


class Numbers:
    """Token ids as text."""

    def batch_decode(self, ids: list[list[int]], **settings: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in ids]


def graded(
    model: qwen3.Qwen3, config: SamplingConfig, repeats: int, data: pathlib.Path, workers: int, hard: bool
) -> dict[str, object]:
    """What is left of grading when the last row has ended, and how long it takes if it is left until then."""
    from gdro_jax import rewards  # the other workloads are measured without what these import
    from gdro_jax.training.overlap import Grader

    sampler = Sampler(model, config)
    tokens, mask = prompts(PROMPTS)
    index = np.repeat(np.arange(PROMPTS, dtype=np.int32), ROLLOUTS)
    rows, sampled, waited, alone, scored = [str(row) for row in range(len(index))], [], [], [], 0
    with rewards.make("math", workers=workers, timeout=30.0) as math:
        verifier = Replaced(data, math, len(index), hard)
        verifier.grade([], rows)  # workers start
        for number in range(repeats + 1):
            out, begun = empty(len(index), config.max_new_tokens), time.perf_counter()
            with Grader(verifier, Numbers(), STOPS, rows) as grader:
                for progress in sampler.stream(out, tokens, mask, index, index, jax.random.key(number)):
                    grader.submit(out, progress.rows)
                last = time.perf_counter()
                scored += int(grader.result()[0].scorable.sum())
            sampled.append(last - begun)
            waited.append(time.perf_counter() - last)
            begun = time.perf_counter()
            verifier.grade([], rows)
            alone.append(time.perf_counter() - begun)
    shares = [w / (s + w) for w, s in zip(waited[1:], sampled[1:], strict=True)]
    return {
        "rows": len(index),
        "workers": workers,
        "asked_of_workers": sum(map(by_worker, verifier.pairs)),
        "scorable": scored // (repeats + 1),
        "sample_seconds": [round(s, 3) for s in sampled[1:]],
        "wait_seconds": [round(s, 3) for s in waited[1:]],
        "grading_alone_seconds": [round(s, 3) for s in alone[1:]],
        "wait_share": round(statistics.median(shares), 4),
    }


def cache() -> dict[str, object]:
    """Mean and largest difference of log-probs over tokens, and bytes that a token of a row keeps."""
    import importlib.resources

    from gdro_jax.models import hf
    from gdro_jax.training import agreement

    model = hf.load(pathlib.Path(str(importlib.resources.files("gdro_jax") / "embedded" / "base")))
    tokens = np.random.default_rng(0).integers(8, model.config.vocab_size, (32, 8)).astype(np.int32)
    index, gaps = np.repeat(np.arange(32, dtype=np.int32), 4), {}
    vectors = 2 * model.config.num_layers * model.config.num_kv_heads
    for dtype, size in ((None, 4 * model.config.head_dim), ("bfloat16", 2 * model.config.head_dim),
                        ("int8", model.config.head_dim + 4)):  # fmt: skip
        sampler = Sampler(model, SamplingConfig(max_new_tokens=64, cache_dtype=dtype))
        asked = (tokens, np.ones(tokens.shape, bool), index, index, jax.random.key(0))
        gap = agreement.measure(sampler, model, *asked, 1.0, 64)
        gaps[dtype or "float32"] = {"mean": gap.mean, "largest": gap.largest, "tokens": gap.tokens}
        gaps[dtype or "float32"] |= {"bytes_per_token": vectors * size}
    return {"head_dim": model.config.head_dim, "gaps": gaps}


def limits(model: qwen3.Qwen3, tokens_per_second: float) -> dict[str, object]:
    """Floating-point operations and bytes a token needs, and their shares of the rates this machine reaches alone.

    A token needs its row's own keys and values, its share of its prompt's, which its prompt's rows read together, and
    its share of the weights, which all rows read together.
    """
    matrices = sum(x.size for x in jax.tree.leaves(model) if x.ndim > 1)  # the tied head is one of them
    attention = 2 * MODEL.num_layers * MODEL.num_heads * MODEL.head_dim * (PROMPT_TOKENS + 64)  # 64: mean of 0..127
    vector = 4 * 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim
    rows = PROMPTS * ROLLOUTS
    needed = {"own": 64 * vector, "prompt": PROMPT_TOKENS * vector / ROLLOUTS, "weights": 4 * matrices / rows}
    a, b = jnp.ones((128, 256)), jnp.ones((256, 8192))
    product = 2 * 128 * 256 * 8192 / _seconds(jax.jit(lambda a, b: a @ b), a, b)
    read = 4 * 2**24 / _seconds(jax.jit(jnp.sum), jnp.ones(2**24))
    return {
        "flop_per_token": 2 * (matrices + attention),
        "bytes_per_token": {name: round(size) for name, size in needed.items()},
        "measured_flop_per_second": round(product),
        "measured_read_bytes_per_second": round(read),
        "share_of_flop": round(tokens_per_second * 2 * (matrices + attention) / product, 3),
        "share_of_bandwidth": round(tokens_per_second * sum(needed.values()) / read, 3),
    }


def _seconds(function, *arguments) -> float:
    jax.block_until_ready(function(*arguments))
    spent = []
    for _ in range(15):
        begun = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        spent.append(time.perf_counter() - begun)
    return statistics.median(spent)


def flat(model: qwen3.Qwen3, repeats: int) -> dict[str, object]:
    """Microseconds a token of each quarter of a call over 256 prompts in 16 slots, medians over calls and each of them.

    All rows have 48 tokens, so that every slot is busy from the first step to the last.
    """
    sampler = Sampler(model, SamplingConfig(max_new_tokens=48, slots=16))
    tokens, mask = prompts(256)
    index, calls = np.repeat(np.arange(256, dtype=np.int32), 4), []
    for number in range(repeats + 1):  # the first call compiles
        begun, marks = time.perf_counter(), []
        for progress in sampler.stream(empty(1024, 48), tokens, mask, index, index, jax.random.key(number)):
            marks.append((progress.tokens, time.perf_counter() - begun))
        size = len(marks) // 4
        ends = [marks[0], *(marks[size * quarter - 1] for quarter in (1, 2, 3, 4))]
        calls.append([round(1e6 * (b[1] - a[1]) / (b[0] - a[0]), 1) for a, b in itertools.pairwise(ends)])
    medians = [round(statistics.median(quarter), 1) for quarter in zip(*calls[1:], strict=True)]
    return {"prompts": 256, "slots": 16, "microseconds_per_token_by_quarter": medians, "calls": calls[1:]}


if __name__ == "__main__":
    main()
