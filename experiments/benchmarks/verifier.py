"""W5: responses graded per second, against math-verify called directly; scaling with workers; the hostile set's cost.

Usage: python experiments/benchmarks/verifier.py DATA [--repeats 3] > experiments/benchmarks/results/verifier.json

DATA is a folder with labelled_responses.jsonl (question, gt, code: responses, score: grades). One line of JSON:
`direct` and `pool` are responses per second of the same rows, in turn, medians over the repeats; `scaling` is the rate
of a pool on jobs that wait rather than compute, by workers, so that it shows the pool's own limit on any number of
cores; `agreement` is the share of the labels that the pool's grades equal.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

from gdro_jax.rewards.boxed import last_boxed
from gdro_jax.rewards.function import FunctionVerifier
from gdro_jax.rewards.math_verifier import MathVerifier

WAITING = "import time\ndef grade(response, answer):\n    time.sleep(0.02)\n    return True\n"
JOBS = 200


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    rows = [json.loads(line) for line in (asked.data / "labelled_responses.jsonl").read_text().splitlines()]
    responses = [response for row in rows for response in row["code"]]
    golds = [row["gt"] for row in rows for _ in row["code"]]
    labels = [float(label) for row in rows for label in row["score"]]
    direct, pool, distinct = [], [], len({(last_boxed(r), g) for r, g in zip(responses, golds, strict=True)})
    with MathVerifier(workers=1, timeout=60.0) as verifier:
        grades = verifier.grade(responses, golds)  # warms the worker up
        for _ in range(asked.repeats):
            direct.append(len(responses) / timed(lambda: call_directly(responses, golds)))
            pool.append(len(responses) / timed(lambda: verifier.grade(responses, golds)))
    out = {
        "name": "W5",
        "responses": len(responses),
        "distinct_pairs": distinct,
        "direct": round(statistics.median(direct), 1),
        "pool_one_worker": round(statistics.median(pool), 1),
        "ratios": [round(p / d, 2) for p, d in zip(pool, direct, strict=True)],
        "agreement": float((grades.scores == labels).mean()),
        "unscorable": int((~grades.scorable).sum()),
        "scaling": scaling(),
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(out))


def call_directly(responses: list[str], golds: list[str]) -> None:
    """What a trainer that calls the library would do: parse both, compare, every row."""
    from math_verify import parse, verify

    for response, gold in zip(responses, golds, strict=True):
        verify(
            parse(f"\\boxed{{{gold}}}", parsing_timeout=None),
            parse(response, parsing_timeout=None),
            timeout_seconds=None,
        )


def scaling() -> dict[str, float]:
    """Jobs of 20 ms of waiting per second, by workers."""
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "waiting.py").write_text(WAITING)
        os.chdir(folder)
        for workers in (1, 2, 4, 8):
            with FunctionVerifier("waiting:grade", workers=workers, timeout=60.0) as verifier:
                verifier.grade([f"warm {n}" for n in range(workers * 2)], ["x"] * workers * 2)
                rows = [f"{n}" for n in range(JOBS)]
                seconds = timed(lambda verifier=verifier, rows=rows: verifier.grade(rows, ["x"] * JOBS))
                out[str(workers)] = round(JOBS / seconds, 1)
    return out


def timed(work) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    sys.exit(main())
