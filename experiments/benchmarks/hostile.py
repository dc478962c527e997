"""Strings meant to hang, crash, bloat or fool the maths verifier, and what grading them costs.

Usage: python experiments/benchmarks/hostile.py [--timeout 1] > experiments/benchmarks/results/hostile.json

Each string is graded among four ordinary right answers that a worker has to be asked about, by two workers, off the
main thread. One line of JSON: seconds of the longest hostile row beside the deadline, how many were wrong and how many
unscorable and why; the rate of the ordinary rows alone; the seconds that all take together, at two densities, beside
those that two workers need for the hostile rows and the ordinary ones if nothing else is lost; what the start of a
worker costs, and of the one after a killed one; and the peak memory of a worker that is given a memory bomb.
"""

import argparse
import json
import os
import resource
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from gdro_jax.rewards.math_verifier import MathVerifier
from gdro_jax.rewards.verifier import Grades


def box(text: str) -> str:
    return f"\\boxed{{{text}}}"


def matrix(size: int, entry: str) -> str:
    rows = ["&".join(entry.replace("{r}", str(r)).replace("{c}", str(c)) for c in range(size)) for r in range(size)]
    return "\\begin{pmatrix}" + "\\\\".join(rows) + "\\end{pmatrix}"


DEEP = 5000
HOSTILE = {
    # Hangs of the parser or of the comparison.
    "tower of tens": box("10^{10^{10^{10}}}"),
    "tower of nines": box("9^{9^{9^{9}}}"),
    "factorial": box("100000000!"),
    "factorial of a factorial": box("(10!)!"),
    "factorial of a power": box("(10^9)!"),
    "wide power": box("(x+y+z+w+1)^{300}"),
    "huge power of two": box("2^{2^{40}}"),
    "memory bomb": box("2^{2^{34}}"),
    "huge negative power": box("2^{-2^{40}}"),
    "root of a tower": box("\\sqrt[3]{10^{10^{12}}}"),
    "large binomial": box("\\binom{1000000000}{500000000}"),
    "long sum": box("\\sum_{n=1}^{10^{12}} \\frac{1}{n^3+n+1}"),
    "long product": box("\\prod_{n=1}^{100000} (x+n)"),
    "hard integral": box("\\int_0^1 e^{x^{x^{x}}} \\sin(x^{9}) dx"),
    "hard limit": box("\\lim_{n \\to \\infty} (1+\\sin(n)/n)^{n^2}"),
    "sine of a tower": box("\\sin(10^{10^{10}})"),
    "logarithm of a tower": box("\\log(10^{10^{10^{10}}})"),
    "repeating decimal": box("0." + "3" * 1900),
    "many digits": box("9" * 1990),
    "many digits squared": box("(" + "9" * 900 + ")^{9999999}"),
    "tiny decimal": box("1e-999999999"),
    "huge decimal": box("1e999999999"),
    "nested fractions": box("\\frac{1}{1+" * 30 + "x" + "}" * 30),
    "nested roots": box("\\sqrt{2+" * 30 + "x" + "}" * 30),
    "nested powers": box("x^{" * 30 + "2" + "}" * 30),
    "many unknowns": box("+".join(f"x_{{{n}}}^2" for n in range(150))),
    "many factors": box("".join(f"(x+{n})" for n in range(150))),
    "matrix power": box("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^{10^{10}}"),
    "large matrix": box(matrix(14, "x")),
    "determinant": box("\\det" + matrix(7, "x_{r}{c}")),
    "equations without end": box("=".join("x" * 300)),
    "signs without end": box("-" * 1900 + "5"),
    "plus or minus": box("\\pm" * 60 + "5"),
    "sets of sets": box("\\{" * 30 + "5" + "\\}" * 30),
    "commas": box("," * 1900),
    "all the small numbers": box(",".join(str(n) for n in range(500))),
    "both answers": box("5 \\text{ or } 6"),
    "an interval around": box("(4,6)"),
    "more than": box(">4"),
    # Size and depth.
    "two million characters": "x" * 2_000_000,
    "two million digits in a box": box("1" * 2_000_000),
    "boxes without end": "\\boxed{" * 300_000,
    "boxes and nothing": "\\boxed{}" * 250_000,
    "deep brackets": box("(" * DEEP + "5" + ")" * DEEP),
    "deep braces": box("{" * DEEP + "5" + "}" * DEEP),
    "deep roots": box("\\sqrt{" * DEEP + "5" + "}" * DEEP),
    "closing braces": box("7" + "}" * 100_000 + "\\boxed{6"),
    "backslashes": "\\" * 1_000_000,
    "dollars": box("$" * 1900),
    "spaces": " " * 2_000_000,
    # Code, controls, broken text.
    "abort": box("__import__('os').abort()"),
    "exit": box("exit()"),
    "exec": box("exec('while True: pass')"),
    "eval of a file": box("open('/etc/passwd').read()"),
    "lambda": box("(lambda: 5)()"),
    "class walk": box("().__class__.__mro__[1].__subclasses__()"),
    "input of a file": box("\\input{/etc/passwd}"),
    "write": box("\\immediate\\write18{rm -rf x}"),
    "definition": box("\\def\\x{\\x\\x}\\x"),
    "newcommand": box("\\newcommand{\\five}{5}\\five + 0 + y"),
    "format string": box("%s%n%d{0}{}"),
    "null byte": box("\x00"),
    "half a surrogate": box("\ud800"),
    "right to left": box("\u202e6"),
    "full width digits": box("\uff16"),
    "a reply of the worker": box('{"id": 0, "verdict": true}') + '\n{"id": 0, "verdict": true}\n',
    "not a number": box("nan"),
    "infinity": box("\\infty"),
    "nothing": "",
    "a box that never closes": "\\boxed{5",
    "a boxed word in prose": "I would box it as \\boxed 5",
}  # fmt: skip


def ordinary(count: int) -> list[str]:
    """Right answers to 5, none of which is the same string as another, or can be graded without a worker."""
    return [box(f"\\sqrt{{25+0\\cdot {n}}}") for n in range(count)]


def mixed(each: int = 4) -> list[str]:
    """Every hostile string followed by so many ordinary ones."""
    right = ordinary(each * len(HOSTILE))
    return [text for n, bad in enumerate(HOSTILE.values()) for text in (bad, *right[each * n : each * (n + 1)])]


def grade_off_the_main_thread(verifier: MathVerifier, rows: list[str]) -> tuple[Grades, float]:
    """Grades against the answer 5, and the seconds it took."""
    found: list[tuple[Grades, float]] = []

    def work() -> None:
        begun = time.perf_counter()
        grades = verifier.grade(rows, ["5"] * len(rows))
        found.append((grades, time.perf_counter() - begun))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


SETTLE = 5.0  # seconds that a new worker takes to be ready, and more


def starts() -> dict[str, float]:
    """Processor seconds of a worker's start, and seconds from the end of a killed one to the next one's first grade."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with MathVerifier(workers=1) as verifier:
        verifier.grade(ordinary(1), ["5"])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    with MathVerifier(workers=1, timeout=1.0) as verifier:
        verifier.grade(ordinary(1), ["5"])
        _, seconds = grade_off_the_main_thread(verifier, [HOSTILE["wide power"], *ordinary(2)[1:]])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"processor_seconds": round(cpu, 2), "seconds_after_a_killed_one": round(seconds - 1.0, 3)}


def memory_bomb() -> dict[str, object]:
    """How a worker that may use 384 MiB takes a power that needs 2 GiB."""
    with MathVerifier(workers=1, timeout=120.0, memory_mb=384) as verifier:
        verifier.grade(ordinary(1), ["5"])
        pid = verifier._pool._workers[0].pid
        grades = verifier.grade([HOSTILE["memory bomb"]], ["5"])
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmPeak"))
    return {"limit_mib": 384, "peak_mib": peak >> 10, "reason": grades.reasons[0]}


def kind(reason: str) -> str:
    """A reason without its numbers."""
    return "".join("n" if char.isdigit() else char for char in reason)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--timeout", type=float, default=1.0)
    timeout = parser.parse_args().timeout
    with MathVerifier(workers=2, timeout=timeout) as verifier:
        verifier.grade(ordinary(4), ["5"] * 4)
        time.sleep(SETTLE)
        alone = len(HOSTILE) * 4 / grade_off_the_main_thread(verifier, ordinary(4 * len(HOSTILE)))[1]
        slowest = {}
        for name, text in HOSTILE.items():
            slowest[name] = grade_off_the_main_thread(verifier, [text])[1]
        together = []
        for each in (49, 4):
            grades, seconds = grade_off_the_main_thread(verifier, mixed(each))
            rows = each * len(HOSTILE)
            together.append(
                {
                    "ordinary": rows,
                    "right": int(grades.scores.sum()),
                    "seconds": round(seconds, 1),
                    "seconds_if_nothing_is_lost": round(sum(slowest.values()) / 2 + rows / alone, 1),
                }
            )
    hostile = range(0, len(HOSTILE) * 5, 5)
    worst = max(slowest, key=lambda name: slowest[name])
    out = {
        "strings": len(HOSTILE),
        "rewarded": int(sum(grades.scores[row] for row in hostile)),
        "wrong": int(sum(grades.scorable[row] for row in hostile)),
        "unscorable": dict(Counter(kind(grades.reasons[row]) for row in hostile if row in grades.reasons)),
        "deadline": timeout,
        "slowest_string": worst,
        "slowest_seconds": round(slowest[worst], 2),
        "ordinary_per_second_alone": round(alone, 1),
        "together": together,
        "start": starts(),
        "memory_bomb": memory_bomb(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
    }
    print(json.dumps(out))


if __name__ == "__main__":
    sys.exit(main())
