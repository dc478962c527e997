"""Verifiers that are functions of the user's: three outcomes, and no row that costs another."""

import threading
import time

import pytest

from gdro_jax.rewards import VerifierError, make

MODULE = """
import os, sys, time

def grade(response, answer):
    if response == "hang":
        while True:
            pass
    if response == "sleep":
        time.sleep(1000)
    if response == "crash":
        os.abort()
    if response == "raise":
        raise KeyError("no")
    if response == "memory":
        return bytearray(1 << 40) and True
    if response == "none":
        return None
    if response == "float":
        return 0.5
    if response == "print":
        print('{"id": 0, "verdict": true}')
        return 0
    if response.startswith("shout"):
        print("loud" * 500_000)
        sys.stderr.write("loud" * 500_000)
    return response[::-1] == answer
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


def test_outcomes_off_the_main_thread(module):
    rows = ["abc", "abd", "hang", "crash", "raise", "memory", "none", "float", "print", "cba", "cba"]
    found = []
    with make("mine:grade", workers=2, timeout=3.0) as verifier:
        thread = threading.Thread(target=lambda: found.append(verifier.grade(rows, ["cba"] * len(rows))))
        thread.start()
        thread.join(timeout=300)
        again = verifier.grade(["abc"], ["cba"])  # workers that were killed are there again
    (grades,) = found
    assert grades.scores.tolist() == [1] + [0] * 10 and again.scores.tolist() == [1]
    assert grades.scorable.tolist() == [True, True, False, False, False, False, False, False, True, True, True]
    assert "longer than 3 s" in grades.reasons[2] and "raised KeyError: 'no'" in grades.reasons[4]
    assert "raised MemoryError" in grades.reasons[5] and "no verdict" in grades.reasons[6]


def test_a_function_may_print_as_much_as_it_likes(module):
    rows = [f"shout {n}" for n in range(5)]
    with make("mine:grade", workers=1, timeout=60.0) as verifier:
        assert verifier.score(rows, [row[::-1] for row in rows]).tolist() == [1] * 5


def test_too_long_a_response_is_not_handed_over(module):
    with make("mine:grade", workers=1, timeout=60.0) as verifier:
        begun = time.monotonic()
        grades = verifier.grade(["x" * 2_000_000, None], ["x", "x"])
        assert not grades.scorable.any() and time.monotonic() - begun < 30.0


def test_a_function_that_is_not_there_stops_the_run(module):
    with make("mine:absent", workers=1) as verifier, pytest.raises(VerifierError, match="no attribute 'absent'"):
        verifier.grade(["x"], ["x"])


@pytest.mark.parametrize("name", ["maths", "mine", "mine:", ":grade", "a b:c", "mine:grade:more"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="is unknown; it must be one of exact, math, numeric, choice or package"):
        make(name)
