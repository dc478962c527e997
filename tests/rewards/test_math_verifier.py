import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gdro_jax.rewards import math_verifier, worker_pool
from gdro_jax.rewards.math_verifier import MathVerifier
from gdro_jax.rewards.worker_pool import VerifierError, WorkerPool


def box(answer: str) -> str:
    return f"so the answer is \\boxed{{{answer}}}."


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    with MathVerifier(workers=1, timeout=20.0) as made:
        yield made


PAIRS = [
    ("5", "5", True),
    ("05", "5", True),
    ("x=5", "5", True),
    ("\\frac{1}{2}", "0.5", True),
    ("\\dfrac12", "\\frac{1}{2}", True),
    ("2\\sqrt{2}", "\\sqrt{8}", True),
    ("(1,2)", "(1, 2)", True),
    ("(2,1)", "(1,2)", False),
    ("\\{2,1\\}", "\\{1,2\\}", True),
    ("[0,1)", "[0, 1)", True),
    ("[0,1]", "[0, 1)", False),
    ("50\\%", "50", True),
    ("10{,}000", "10000", True),
    ("x^2+2x+1", "(x+1)^2", True),
    ("1\\frac{1}{2}", "\\frac{3}{2}", True),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", True),
    ("\\text{Evelyn}", "Evelyn", True),
    ("6", "5", False),
    ("5 or 6", "5", False),
    ("", "5", False),
    ("\\frac{1}{0}", "5", False),
]


def test_pairs(verifier: MathVerifier) -> None:
    grades = verifier.grade([box(given) for given, _, _ in PAIRS], [gold for _, gold, _ in PAIRS])
    wrong = [pair for pair, score in zip(PAIRS, grades.scores, strict=True) if bool(score) != pair[2]]
    assert wrong == [] and grades.scorable.all()
    assert grades.scores.dtype == np.float32


def test_the_last_complete_box_counts_and_no_box_is_wrong(verifier: MathVerifier) -> None:
    responses = ["\\boxed{4} \\boxed{5}", "\\boxed{5} \\boxed{4}", "\\boxed{5} and \\boxed{4", "the answer is 5", "5"]
    grades = verifier.grade(responses, ["5"] * len(responses))
    assert grades.scores.tolist() == [1, 0, 1, 0, 0] and grades.scorable.all()


def test_gold_answers_may_be_boxed_and_must_be_there(verifier: MathVerifier) -> None:
    golds = ["thus \\boxed{5}", "", "  ", None, "\\boxed{}", "5" * 3000]
    grades = verifier.grade([box("5")] * len(golds), golds)  # type: ignore[arg-type]
    assert grades.scores.tolist() == [1, 0, 0, 0, 0, 0]
    assert grades.scorable.tolist() == [True] + [False] * 5
    assert set(grades.reasons) == {1, 2, 3, 4, 5}


UNUSABLE = [
    *("TODO", "???", "N/A", "\\text{N/A}", "None", "nan", "tbd", "!", "x = ", "see figure 3", "no value here"),
    *("\\frac{1}{", "\\sqrt{", "(5", "5)", "2/0", "(" * 40 + "5" + ")" * 40),
    *("x within 0.1", "1e5 within .", "", None),
]
USABLE = [
    *("5", "x=5", "x>2", "(1,2)", "A, B", "x or y", "5 or 6", "\\infty", "\\emptyset", "5 apples", "10 square meters"),
    *("Evelyn", "\\text{Evelyn}", "\\text{no solution}", "\\text{Monday and Tuesday}", "none", "\\text{(C)}"),
    *("E_{1},E_{2}", "np.arcsin(10/13)", "-1./3", "m_{\\max }=n^{2}-n-1", "\\frac{12}{5,\\!525}", "1\\frac12"),
    *("4.2 within 0.1", "\\sqrt{2} within 0.01", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "4 5"),
]


def test_gold_answers_that_no_response_could_match_are_found(verifier: MathVerifier) -> None:
    assert [gold for row, gold in enumerate(UNUSABLE) if row not in verifier.check(UNUSABLE)] == []  # type: ignore[arg-type]
    assert {USABLE[row]: why for row, why in verifier.check(USABLE).items()} == {}


def test_the_gold_answer_is_looked_at_before_the_response(verifier: MathVerifier) -> None:
    golds = ["???", "TODO", "(" * 40 + "5" + ")" * 40, "\\frac{1}{"]
    grades = verifier.grade([box(gold) for gold in golds[:3]] + [box("7+x")], golds)
    assert not grades.scorable.any() and all("the gold answer" in why for why in grades.reasons.values())


HARMLESS = [
    "",
    "\x00",
    "\ud800",
    "x" * 2_000_000,
    "\\boxed",
    "\\boxed{",
    "\\boxed{}}}}}",
    box("\x00"),
    box("\ud800"),
    box("__import__('os').abort()"),
    box("exec('while True: pass')"),
    box("lambda: 0"),
    box("(lambda: 5)()"),
    box("five ( ) 5"),
    box("NaN"),
    box("\\infty"),
    box("1e999999999"),
    box("$" * 1000),
    box("7" * 1500),
    box("\\frac" * 20),
    box("1,2,3,4,5"),
    box("\\pm 5"),
]
REFUSED = [
    None,
    5,
    box("1" * 2_000_000),
    "\\boxed{" * 300_000,
    box("(" * 500 + ")" * 500),
    box("{" * 200 + "5" + "}" * 200),
    box("\\sqrt{" * 40 + "5" + "}" * 40),
]


def test_hostile_responses_without_a_worker_lost(verifier: MathVerifier) -> None:
    before = [worker.pid for worker in verifier._pool._workers]
    responses = HARMLESS + REFUSED + [box("5")]
    grades = verifier.grade(responses, ["5"] * len(responses))  # type: ignore[arg-type]
    assert grades.scores.tolist() == [0] * (len(responses) - 1) + [1]
    assert grades.scorable.tolist() == [True] * len(HARMLESS) + [False] * len(REFUSED) + [True]
    assert before == [worker.pid for worker in verifier._pool._workers]


HANGS = ["10^{10^{10^{10}}}", "9^{9^{9^{9}}}", "100000000!", "(x+y+z+w+1)^{300}"]


def test_a_hang_costs_its_row_and_its_worker_alone_and_off_the_main_thread() -> None:
    responses = [box("\\frac{2}{4}"), *map(box, HANGS), box("\\frac{3}{6}"), box("\\frac{1}{3}")]
    results: list[math_verifier.Grades] = []
    with MathVerifier(workers=2, timeout=2.0) as verifier:
        thread = threading.Thread(target=lambda: results.append(verifier.grade(responses, ["\\frac{1}{2}"] * 7)))
        thread.start()
        thread.join(timeout=300.0)
        assert not thread.is_alive()
    (grades,) = results
    assert grades.scorable.tolist() == [True, False, False, False, False, True, True]
    assert grades.scores.tolist() == [1, 0, 0, 0, 0, 1, 0]
    assert all("longer than 2 s" in reason for reason in grades.reasons.values())


@pytest.mark.parametrize("whole", [False, True])
def test_workers_that_die_while_idle_are_replaced_and_cost_nothing(whole: bool) -> None:
    with MathVerifier(workers=1, timeout=20.0) as verifier:
        assert verifier.score([box("\\frac{2}{4}")], ["0.5"]).tolist() == [1.0]
        worker = verifier._pool._workers[0]
        os.kill(worker.process.pid if whole else worker.pid, signal.SIGKILL)
        if whole:
            worker.process.wait()
        grades = verifier.grade([box("\\frac{3}{6}")], ["0.5"])
        assert grades.scores.tolist() == [1.0] and grades.scorable.all()


def test_what_is_killed_is_a_copy_and_the_next_one_imports_nothing() -> None:
    with MathVerifier(workers=1, timeout=3.0) as verifier:
        assert verifier.score([box("\\sqrt{25}")], ["5"]).tolist() == [1.0]
        worker = verifier._pool._workers[0]
        if worker.copy is None:
            pytest.skip("this platform does not say how many threads a process has")
        pids = {worker.pid}
        grades = verifier.grade([*map(box, HANGS[:2]), box("\\sqrt{25+0}")], ["5"] * 3)
        assert grades.scores.tolist() == [0, 0, 1] and grades.scorable.tolist() == [False, False, True]
        assert verifier._pool._workers == [worker] and worker.pid not in pids and not verifier._pool._spares
        last = worker.pid
    assert _gone([last])


FAKE = """
import json, os, sys
print('{"ready": true}', flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if job["given"] == "crash":
        os.abort()
    if job["given"] == "exit":
        sys.exit(3)
    print(json.dumps({"id": job["id"], "verdict": True}), flush=True)
"""


def test_a_crash_costs_its_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(worker_pool, "WORKER_PROGRAM", tmp_path / "fake.py")
    with MathVerifier(workers=2, timeout=20.0) as verifier:
        grades = verifier.grade([box(text) for text in ("a", "crash", "b", "exit", "c")], ["g"] * 5)
    assert grades.scorable.tolist() == [True, False, True, False, True]
    assert grades.scores.tolist() == [1, 0, 1, 0, 1]
    assert grades.reasons[3] == "the worker ended with code 3"


def test_equal_rows_are_graded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with MathVerifier(workers=1) as verifier:
        given: list[int] = []
        monkeypatch.setattr(verifier._pool, "run", lambda jobs: given.append(len(jobs)) or [True] * len(jobs))
        assert verifier.score([box("x"), box("y"), box("x")], ["z"] * 3).tolist() == [1, 1, 1]
    assert given == [2]


def test_workers_that_never_start_stop_the_run_and_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit('math-verify is not installed')")
    monkeypatch.setattr(worker_pool, "WORKER_PROGRAM", tmp_path / "broken.py")
    with (
        MathVerifier(workers=1) as verifier,
        pytest.raises(VerifierError, match="3 times in a row: math-verify is not"),
    ):
        verifier.grade([box("x")], ["y"])


def test_memory_is_limited() -> None:
    """A worker that asks for more than it may have is told so, and the row is unscorable."""
    pool = WorkerPool(workers=1, timeout=60.0, memory_mb=1024)
    try:
        pool.run([{"gold": "x", "given": "y"}])  # ready by now, so its limits are set
        status = Path(f"/proc/{pool._workers[0].pid}/limits")
        if not status.exists():
            pytest.skip("this platform does not show a process's limits")
        line = next(line for line in status.read_text().splitlines() if line.startswith("Max address space"))
        assert line.split()[3] == str(1024 << 20)
    finally:
        pool.close()


def test_exhausted_memory_and_recursion_are_unscorable_not_wrong() -> None:
    program = """
import sys; sys.path.insert(0, sys.argv[1])
import _worker, math_verify.parser as parser
grader = _worker._Grader()
assert grader.verdict("5", "6") is False and grader.verdict("5", "x+") is False
def exhausted(*args, **kwargs): raise MemoryError
parser.parse_latex_cached = grader._noting(exhausted)
print(grader.verdict("5", "7+x"))
assert "jax" not in sys.modules and "gdro_jax" not in sys.modules
"""
    folder = str(worker_pool.WORKER_PROGRAM.parent)
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "math-verify gave up: MemoryError"


def test_a_memory_bomb_is_stopped_at_the_limit_and_unscorable() -> None:
    with MathVerifier(workers=1, timeout=120.0, memory_mb=384) as verifier:
        assert verifier.score([box("\\sqrt{25}")], ["5"]).tolist() == [1.0]
        pid = verifier._pool._workers[0].pid
        grades = verifier.grade([box("2^{2^{34}}"), box("\\sqrt{25+0}")], ["5", "5"])
        assert grades.scores.tolist() == [0.0, 1.0] and grades.reasons == {0: "math-verify gave up: MemoryError"}
        status = Path(f"/proc/{pid}/status")
        if status.exists():  # it really did ask for it
            peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmPeak"))
            assert 300 << 10 < peak <= 384 << 10


def test_closing_ends_the_workers_and_a_closed_verifier_says_so() -> None:
    verifier = MathVerifier(workers=2)
    processes = [worker.process for worker in verifier._pool._workers]
    verifier.close()
    verifier.close()
    assert all(process.returncode is not None for process in processes)
    with pytest.raises(VerifierError, match="closed"):
        verifier.grade([box("x")], ["y"])


def test_a_worker_ends_when_its_parent_is_gone() -> None:
    program = """
import os
from gdro_jax.rewards.math_verifier import MathVerifier
verifier = MathVerifier(workers=1)
verifier.score(["\\\\boxed{\\\\sqrt{25}}"], ["5"])
worker = verifier._pool._workers[0]
print(worker.process.pid, worker.pid, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert _gone([int(pid) for pid in done.stdout.split()])


def _gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline and any(map(_alive, pids)):
        time.sleep(0.1)
    return not any(map(_alive, pids))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"workers": 0}, "workers: 0"), ({"timeout": 0.0}, "timeout: 0"), ({"timeout": float("nan")}, "timeout: nan")],
)
def test_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MathVerifier(**settings)  # type: ignore[arg-type]


@pytest.mark.skipif(
    "GDRO_SHARED_DATA" not in os.environ, reason="GDRO_SHARED_DATA (the folder of real data) is not set"
)
def test_agreement_with_graded_responses_of_a_language_model() -> None:
    lines = (Path(os.environ["GDRO_SHARED_DATA"]) / "labelled_responses.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    responses = [response for row in rows for response in row["code"]]
    answers = [row["gt"] for row in rows for _ in row["code"]]
    labels = np.array([label for row in rows for label in row["score"]], dtype=np.float32)
    with MathVerifier(workers=2, timeout=20.0) as verifier:
        grades = verifier.grade(responses, answers)
        assert set(verifier.check(answers)) == set(grades.reasons)  # one problem's gold answer is a mangled time of day
    assert len(grades.reasons) == 8 and labels.size == 800
    assert np.mean(grades.scores == labels) >= 0.998
