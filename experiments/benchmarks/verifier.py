"""W5: responses graded per second, against math-verify called directly; scaling with workers; the hostile set's cost.

Usage: python experiments/benchmarks/verifier.py DATA [--repeats 3] > experiments/benchmarks/results/verifier.json

DATA is a folder with labelled_responses.jsonl (question, gt, code: responses, score: grades). One line of JSON:
`direct` and `pool` are responses per second of the same rows, in turn, medians over the repeats, `processor_ms_each`
the processor time of one, in all processes; `grading` is the rate of answers that math-verify has to be asked about, by
1 and by 2 workers in turn, with the processor time that the workers spent on one; `waiting` is the rate on jobs that
wait rather than compute, by workers, so that it shows the pool's own limit on any number of cores; `agreement` is the
share of the labels that the pool's grades equal; `load` is of the whole machine at the end.
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
GRADED = 500


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    rows = [json.loads(line) for line in (asked.data / "labelled_responses.jsonl").read_text().splitlines()]
    responses = [response for row in rows for response in row["code"]]
    golds = [row["gt"] for row in rows for _ in row["code"]]
    labels = [float(label) for row in rows for label in row["score"]]
    cost: dict[str, list[float]] = {"direct": [], "pool": []}
    direct, pool, distinct = [], [], len({(last_boxed(r), g) for r, g in zip(responses, golds, strict=True)})
    with MathVerifier(workers=1, timeout=60.0) as verifier:
        grades = verifier.grade(responses, golds)  # warms the worker up
        for _ in range(asked.repeats):
            begun = time.process_time()
            direct.append(len(responses) / timed(lambda: call_directly(responses, golds)))
            middle, before = time.process_time(), spent(verifier)
            pool.append(len(responses) / timed(lambda: verifier.grade(responses, golds)))
            cost["direct"].append(1000 * (middle - begun) / len(responses))
            cost["pool"].append(1000 * (time.process_time() - middle + spent(verifier) - before) / len(responses))
    out = {
        "name": "W5",
        "responses": len(responses),
        "distinct_pairs": distinct,
        "direct": round(statistics.median(direct), 1),
        "pool_one_worker": round(statistics.median(pool), 1),
        "processor_ms_each": {name: round(statistics.median(values), 3) for name, values in cost.items()},
        "ratios": [round(p / d, 2) for p, d in zip(pool, direct, strict=True)],
        "agreement": float((grades.scores == labels).mean()),
        "unscorable": int((~grades.scorable).sum()),
        "grading": grading(asked.repeats),
        "waiting": waiting(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
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


def grading(repeats: int) -> dict[str, object]:
    """Answers graded per second by 1 and 2 workers, each of them another string and none a plain number."""
    with MathVerifier(workers=1, timeout=60.0) as one, MathVerifier(workers=2, timeout=60.0) as two:
        rates: dict[str, list[float]] = {"1": [], "2": []}
        cost: dict[str, list[float]] = {"1": [], "2": []}
        for repeat in range(repeats + 1):  # the first is not counted
            for name, verifier in (("1", one), ("2", two)):
                rows = [f"\\boxed{{\\sqrt{{25+0\\cdot {repeat * GRADED + n}}}}}" for n in range(GRADED)]
                before = spent(verifier)
                seconds = timed(lambda verifier=verifier, rows=rows: verifier.grade(rows, ["5"] * GRADED))
                if repeat:
                    rates[name].append(round(GRADED / seconds, 1))
                    cost[name].append(round(1000 * (spent(verifier) - before) / GRADED, 2))
    return {
        "per_second": rates,
        "processor_ms_each": cost,
        "ratio": round(statistics.median(rates["2"]) / statistics.median(rates["1"]), 2),
    }


def spent(verifier: MathVerifier) -> float:
    """Processor seconds of the workers so far."""
    out = 0.0
    for worker in verifier._pool._workers:
        fields = pathlib.Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        out += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return out


def waiting() -> dict[str, float]:
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
