"""What keys and values take of memory over a call, and what is read of them: slots of equal length, and pages.

    python experiments/benchmarks/cache_length.py --out results.json

A simulation of slots with the sampler's own stages; nothing is run. Lengths are geometric, cut at the longest. Shares
are of all slots at the longest length: `ladder` what a contiguous cache takes, `pool` what a pool of pages takes, as it
grows, `pages` what rows hold of it, on average over steps and at most. `read` are tokens per slot and step that a step
reads, response and prompt, with prompts as long as they are padded and with short ones: a contiguous cache reads its
whole length, and a padded prompt for all the rows of a tile; pages are read as far as they are full, by every row.
"""

import argparse
import json
import pathlib

import numpy as np

from gdro_jax.models.pages import own
from gdro_jax.sampling import SamplingConfig
from gdro_jax.sampling.programs import Decoding, Stage, stages, stages_in_pages

CASES = (
    {"mean": 64, "longest": 512, "slots": 40, "rows": 128, "page": 16, "prompt": 64, "short": 64, "rollouts": 8},
    {"mean": 1000, "longest": 4096, "slots": 64, "rows": 512, "page": 64, "prompt": 3200, "short": 200, "rollouts": 4},
    {
        "mean": 1000,
        "longest": 4096,
        "slots": 144,
        "rows": 1024,
        "page": 64,
        "prompt": 3200,
        "short": 200,
        "rollouts": 4,
    },
)
DRAWS, AT_ONCE = 20, 256


def main() -> None:
    """Simulates every case and writes one JSON object."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    known, rng, cases = parser.parse_args(), np.random.default_rng(0), []
    for case in CASES:
        draws = [np.minimum(rng.geometric(1 / case["mean"], case["rows"]), case["longest"]) for _ in range(DRAWS)]
        by_draw = [contiguous(lengths, case) | paged(lengths, case) for lengths in draws]
        figures = {name: [one[name] for one in by_draw] for name in by_draw[0]}
        cases.append(case | {name: round(float(np.mean(values)), 3) for name, values in figures.items()})
        cases[-1] |= {"pool_grew_past_first": sum(one["pool_at_most"] > one["pool_first"] for one in by_draw)}
    text = json.dumps({"draws": DRAWS, "cases": cases}, indent=2)
    known.out.write_text(text + "\n")
    print(text)


def contiguous(lengths: np.ndarray, case: dict[str, int]) -> dict[str, float]:
    """Shares and tokens read of a contiguous cache."""
    slots, longest = case["slots"], case["longest"]
    config = SamplingConfig(max_new_tokens=longest, stop_tokens=(1,), slots=slots)
    growing, shrinking = stages(config, slots)
    decoding = Decoding(growing, shrinking, lambda *given: None, lambda state, slots, window: Stage(slots, window))
    decoding.state = growing[0]
    rows, steps, ladder, slot_steps = Rows(lengths, slots), 0, 0, 0
    while len(rows.left):
        fewest = 0 if rows.waiting or decoding.state.slots == shrinking[-1].slots else _next(decoding, shrinking)
        steps, slot_steps = steps + 1, slot_steps + decoding.state.slots
        ladder += decoding.state.slots * decoding.state.window
        rows.step()
        full = bool(len(rows.left)) and rows.held.max() >= decoding.state.window
        drained = not rows.waiting and len(rows.left) <= fewest
        if len(rows.left) and (steps % config.segment == 0 or full or drained):
            decoding.move(len(rows.left), len(rows.waiting), full)
    prompt = case["prompt"] / min(case["rollouts"], 8)
    return {"ladder": ladder / (steps * slots * longest), "ladder_read": ladder / slot_steps + prompt}


def paged(lengths: np.ndarray, case: dict[str, int]) -> dict[str, float]:
    """Shares and tokens read of a cache in pages, for rows whose prompts fill what they are padded to."""
    slots, longest, page = case["slots"], case["longest"], case["page"]
    config = SamplingConfig(max_new_tokens=longest, stop_tokens=(1,), slots=slots)
    growing = stages_in_pages(config, slots)
    pools = [slots * own(stage.window, page) * page for stage in growing]
    rows, steps, held, pool, most, level, read, live = Rows(lengths, slots), 0, 0, 0, 0, 0, 0, 0
    while len(rows.left):
        taken = int((-(-(rows.held + 1) // page) * page).sum())
        level += taken > pools[level]
        steps, held, pool, most = steps + 1, held + taken, pool + pools[level], max(most, taken)
        read, live = read + rows.held.sum(), live + len(rows.left)
        rows.step()
    whole, beyond = slots * longest, AT_ONCE / 2
    return {
        "pages": held / (steps * whole),
        "pages_at_most": most / whole,
        "pool": pool / (steps * whole),
        "pool_first": pools[0] / whole,
        "pool_at_most": pools[level] / whole,
        "pages_read": read / live + case["prompt"] + beyond,
        "pages_read_short": read / live + case["short"] + beyond,
    }


class Rows:
    """Rows in slots, tokens held by each and tokens until it ends, and those that wait."""

    def __init__(self, lengths: np.ndarray, slots: int):
        self.left, self.waiting = lengths[:slots].copy(), list(lengths[slots:])
        self.held = np.zeros(len(self.left), int)

    def step(self) -> None:
        """One token more of each; who ends makes room for who waits."""
        self.held = self.held + 1
        for at in np.flatnonzero(self.held >= self.left):
            if self.waiting:
                self.left[at], self.held[at] = self.waiting.pop(0), 0
        alive = self.held < self.left
        self.left, self.held = self.left[alive], self.held[alive]


def _next(decoding: Decoding, shrinking: list[Stage]) -> int:
    return max(stage.slots for stage in shrinking if stage.slots < decoding.state.slots)


if __name__ == "__main__":
    main()
