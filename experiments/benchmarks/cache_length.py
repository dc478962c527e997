"""What keys and values take of memory over a call: the ladder of windows, pages of 16 tokens, the longest allowed.

    python experiments/benchmarks/cache_length.py --out results.json

A simulation of slots with the sampler's own stages; nothing is run. A byte-step is a token of cache held for a step.
Lengths are geometric and cut at the longest. Pages hold what each row has so far, which no sampler could better.
"""

import argparse
import json
import pathlib

import numpy as np

from gdro_jax.sampling import SamplingConfig
from gdro_jax.sampling.programs import Decoding, Stage, stages

CASES = (
    {"mean": 64, "longest": 512, "slots": 40, "rows": 128},
    {"mean": 1000, "longest": 4096, "slots": 64, "rows": 512},
)
PAGE, DRAWS = 16, 20


def main() -> None:
    """Simulates every case and writes one JSON object."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    known, rng, cases = parser.parse_args(), np.random.default_rng(0), []
    for case in CASES:
        draws = [np.minimum(rng.geometric(1 / case["mean"], case["rows"]), case["longest"]) for _ in range(DRAWS)]
        shares = np.mean([simulated(lengths, case["slots"], case["longest"]) for lengths in draws], axis=0)
        cases.append(case | {"ladder_share": round(shares[0], 3), "pages_share": round(shares[1], 3)})
    text = json.dumps({"page": PAGE, "draws": DRAWS, "cases": cases}, indent=2)
    known.out.write_text(text + "\n")
    print(text)


def simulated(lengths: np.ndarray, slots: int, longest: int) -> tuple[float, float]:
    """Byte-steps of the ladder and of pages, as shares of those of all slots at the longest window."""
    config = SamplingConfig(max_new_tokens=longest, stop_tokens=(1,), slots=slots)
    growing, shrinking = stages(config, slots)
    decoding = Decoding(growing, shrinking, lambda *given: None, lambda state, slots, window: Stage(slots, window))
    decoding.state = growing[0]
    left, waiting = lengths[:slots].copy(), list(lengths[slots:])
    held, steps, ladder, pages = np.zeros(len(left), int), 0, 0, 0
    while len(left):
        fewest = 0 if waiting or decoding.state.slots == shrinking[-1].slots else _next(shrinking, decoding.state.slots)
        steps, held = steps + 1, held + 1
        ladder += decoding.state.slots * decoding.state.window
        pages += int((-(-held // PAGE) * PAGE).sum())
        for at in np.flatnonzero(held >= left):
            if waiting:
                left[at], held[at] = waiting.pop(0), 0
        alive = held < left
        left, held = left[alive], held[alive]
        full = len(held) and held.max() >= decoding.state.window
        if len(left) and (steps % config.segment == 0 or full or (not waiting and len(left) <= fewest)):
            decoding.move(len(left), len(waiting), int(held.max()))
    return ladder / (steps * slots * longest), pages / (steps * slots * longest)


def _next(shrinking: list[Stage], slots: int) -> int:
    return max(stage.slots for stage in shrinking if stage.slots < slots)


if __name__ == "__main__":
    main()
