"""The training step on heavy-tailed response lengths: how much of its work is padding, and its time, cut either way.

    python experiments/benchmarks/packing.py [--tile B] [--microbatches A] [--repeats N] [--no-time]
    python experiments/benchmarks/packing.py --mesh
    python experiments/benchmarks/packing.py --published

Prints one JSON line, with `--mesh` one for each number of shards. Workload W3: 16 prompts of 64 tokens, 8 rollouts
each of at most 512 tokens, lengths geometric with a mean of 64, the model of `train_step.py` W1b. Padding is given as
shares of the tokens that go through weights, of query-key pairs, and of the blocks' FLOPs with the prompts left out;
the prompts' own work is stated beside it, in runs of all prompts forward and backward. The head is run for real tokens
alone either way. Timings: whole steps after the first, the two sides in turn. `--mesh` cuts steps of more rows for
several shards, with the trainer's own code and nothing run on any device; of the prompts a tenth have rows of equal
rewards, which are without a gradient. `--published` does so for the shipped configurations of 64 chips, with prompts
whose lengths are log-normal, 96 tokens in the mean, padded to 1,400: an assumption, like those of benchmarks.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import train_step

from gdro_jax.models.config import work
from gdro_jax.models.presets import PRESETS
from gdro_jax.models.qwen3 import init
from gdro_jax.training import batching, config_io, packing, step
from gdro_jax.training.config import TrainConfig
from gdro_jax.training.optimiser import make_optimiser

SIZE = {"prompts": 16, "rollouts": 8, "prompt": 64, "length": 512, "vocabulary": 8192, "layers": 4}
MEAN = 64
CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def batch(seed: int) -> step.Batch:
    """`train_step.rollouts` with lengths."""
    out = train_step.rollouts(SIZE, 1)
    lengths = np.minimum(np.random.default_rng(seed).geometric(1 / MEAN, len(out.tokens)), SIZE["length"])
    return out._replace(mask=np.arange(SIZE["length"]) < lengths[:, None])


def cut(of: step.Batch, train: TrainConfig) -> batching.Pieces | packing.Packed:
    counts, rng = np.full(SIZE["prompts"], SIZE["rollouts"]), np.random.default_rng(0)
    if train.attention_tile is None:
        return batching.cut(counts, train.microbatches, rng, SIZE["rollouts"])
    return packing.pack_step(batching.cut(counts, 1, rng), train, of.prompt_mask, of.mask, of.rewards, of.scorable)


def shares(train: TrainConfig, seeds: range = range(10)) -> dict[str, float]:
    """Means over steps of other lengths."""
    found = []
    for seed in seeds:
        of = batch(seed)
        pieces = cut(of, train)
        lengths = packing.lengths(of.mask, of.scorable)
        before = np.full(SIZE["prompts"], SIZE["prompt"])
        spent, _ = packing.padding(pieces, train, lengths, before, SIZE["length"], SIZE["prompt"])
        packed = isinstance(pieces, packing.Packed)
        number = float(pieces.of_rows.ends[0, 1]) if packed else float(len(pieces.rows))
        prompts = packing.RUNS if packed else pieces.prompts.size / SIZE["prompts"]
        per_token, per_pair = work(train_step.architecture(SIZE))
        prompt = prompts * SIZE["prompts"] * SIZE["prompt"] * (per_token + SIZE["prompt"] * per_pair)
        total = spent.tokens * per_token + spent.pairs * per_pair
        found.append((
            spent.share(1.0, 0.0), spent.share(0.0, 1.0), spent.share(per_token, per_pair), number, prompts,
            prompt / (prompt + total),
        ))  # fmt: skip
    names = ("of_tokens", "of_pairs", "of_flops", "pieces", "runs_of_prompts", "prompts_share_of_all_flops")
    return {name: round(float(x), 4) for name, x in zip(names, np.mean(found, axis=0), strict=True)}


MESHES = ((1, 128, 64), (4, 128, 16), (4, 128, 32), (8, 512, 32), (8, 512, 64), (8, 1024, 128), (16, 2048, 64),
          (16, 2048, 128))  # shards, rows, microbatches  # fmt: skip


def on_mesh(shards: int, rows: int, microbatches: int, tile: int, seeds: range = range(10)) -> dict[str, float]:
    """Means of padding over steps of other lengths, and of the seconds that the cut takes."""
    each, longest, found = SIZE["rollouts"], SIZE["length"], []
    train = TrainConfig(attention_tile=tile, microbatches=microbatches, kl_coef=0.0)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        used, before = np.minimum(rng.geometric(1 / MEAN, rows), longest), np.full(rows // each, SIZE["prompt"])
        rewards = np.arange(rows) % 2 * np.repeat(rng.random(rows // each) > 0.1, each)
        pieces = batching.cut(np.full(rows // each, each), shards, rng, each)
        begun = time.perf_counter()
        mask, prompts = np.arange(longest) < used[:, None], np.ones((rows // each, SIZE["prompt"]), bool)
        cut = packing.pack_step(pieces, train, prompts, mask, rewards, np.ones(rows, bool))
        seconds = time.perf_counter() - begun
        spent, _ = packing.padding(cut, train, used, before, longest, SIZE["prompt"])
        flops = spent.share(*work(train_step.architecture(SIZE)))
        found.append((spent.share(1.0, 0.0), spent.share(0.0, 1.0), flops, float(cut.of_rows.ends[0, 1]), seconds))
    names = ("of_tokens", "of_pairs", "of_flops", "pieces", "seconds")
    return {name: round(float(x), 4) for name, x in zip(names, np.mean(found, axis=0), strict=True)}


PUBLISHED = {"1.7B": "qwen3_1_7b_dapo.yaml", "4B": "qwen3_4b_dapo.yaml", "8B": "qwen3_8b_dapo.yaml"}
CHIPS = 64
PROMPT, MEDIAN, SPREAD = 1400, 80, 0.6  # tokens of the longest prompt, and of the others, whose logarithms are normal


def of_slice(model: str, tensor: int, mean: int, tile: int | None, seeds: range = range(3)) -> dict[str, float]:
    """Means over steps of a shipped configuration with this `mesh.tensor`, and a microbatch a row of a shard."""
    config = config_io.load(CONFIGS / PUBLISHED[model], [])
    longest, each = config.sampling.max_new_tokens, config.controller.mean_rollouts
    rows, shards, updates = config.rows_per_step, CHIPS // tensor, config.train.minibatches
    microbatches = rows // updates // shards
    train = dataclasses.replace(config.train, attention_tile=tile, microbatches=microbatches)
    per_token, per_pair = work(PRESETS[model])
    found = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        used = np.minimum(rng.geometric(1 / mean, rows), longest)
        before = np.minimum(np.ceil(rng.lognormal(np.log(MEDIAN), SPREAD, rows // each)), PROMPT).astype(int)
        cuts = updates * shards * (1 if tile is not None else microbatches)
        cut: batching.Pieces | packing.Packed = batching.cut(np.full(rows // each, each), cuts, rng, each)
        if tile is not None:
            mask, rewards = np.arange(longest) < used[:, None], np.arange(rows) % 2.0
            there = np.arange(PROMPT) < before[:, None]
            cut = packing.pack_step(cut, train, there, mask, rewards, np.ones(rows, bool))
        responses, prompts = packing.padding(cut, train, used, before, longest, PROMPT)
        everything = responses.plus(prompts, packing.RUNS if tile is not None else 1)
        total = everything.tokens * per_token + everything.pairs * per_pair
        of_responses = responses.tokens * per_token + responses.pairs * per_pair
        shares = [responses.share(*weights) for weights in ((1, 0), (0, 1), (per_token, per_pair))]
        found.append((*shares, everything.share(per_token, per_pair), 1 - of_responses / total, total))
    names = ("of_tokens", "of_pairs", "of_flops", "of_all_flops", "prompts_share", "all_flops_forward")
    return {name: float(f"{x:.4g}") for name, x in zip(names, np.mean(found, axis=0), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile", type=int, default=32)
    parser.add_argument("--microbatches", type=int, default=64, help="in streams; padded rows take --padded")
    parser.add_argument("--padded", type=int, default=16, help="microbatches of padded rows")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--time", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--mesh", action="store_true", help="padding on several shards alone")
    parser.add_argument("--published", action="store_true", help="padding of the shipped slice configurations alone")
    known = parser.parse_args()
    if known.published:
        for model, tensor in (("1.7B", 1), ("1.7B", 2), ("1.7B", 4), ("4B", 4), ("8B", 4)):
            for mean in (512, 1024):
                line = {"model": model, "chips": CHIPS, "tensor": tensor, "mean": mean}
                line["padded"] = of_slice(model, tensor, mean, None)
                for tile in (128, 256):
                    line[f"tiles of {tile}"] = of_slice(model, tensor, mean, tile)
                print(json.dumps(line), flush=True)
        return
    if known.mesh:
        for shards, rows, microbatches in MESHES:
            line = {"workload": "W3 lengths on a mesh", "shards": shards, "rows": rows, "microbatches": microbatches}
            for tile in (16, 32, 64):
                line[f"tiles of {tile}"] = on_mesh(shards, rows, microbatches, tile)
            print(json.dumps(line))
        return
    base = {"kl_coef": 0.0, "learning_rate": 1e-5, "weight_decay": 0.01}
    padded = TrainConfig(microbatches=known.padded, **base)
    packed = TrainConfig(microbatches=known.microbatches, attention_tile=known.tile, **base)
    line = {"workload": "W3 training step", "jax": jax.__version__, "cores": len(os.sched_getaffinity(0)), **SIZE}
    line["padding"] = {"padded": shares(padded)} | {
        f"tiles of {tile}, {microbatches} microbatches": shares(
            TrainConfig(attention_tile=tile, microbatches=microbatches, **base)
        )
        for tile in (16, 32, 64)
        for microbatches in (128, 64, 32)
    }
    if known.time:
        update, sides = step.compiled_update(), {}
        for name, train in (("streams", packed), ("padded", padded)):
            model = init(train_step.architecture(SIZE), jax.random.key(0))
            of = batch(0)
            sides[name] = [
                train,
                step.Learner(model, make_optimiser(train).init(model)),
                of._replace(pieces=cut(of, train)),
            ]
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        losses: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(known.repeats + 1):
            for name, side in sides.items():
                begun = time.perf_counter()
                side[1], _, metrics, _ = jax.block_until_ready(update(side[1], None, side[2], side[0], 1.0))
                seconds[name].append(round(time.perf_counter() - begun, 3))
                losses[name].append(float(metrics["loss"]))
        np.testing.assert_allclose(losses["streams"], losses["padded"], rtol=1e-4, atol=1e-6)
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        line |= {
            "tile": known.tile, "microbatches": {"streams": known.microbatches, "padded": known.padded},
            "seconds": seconds, "ratio": round(medians["streams"] / medians["padded"], 3), "losses": losses,
        }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()
