"""At least fifty hostile strings: none earns a reward, and the ordinary answers among them are graded all the same."""

import importlib.util
import pathlib

import pytest

from gdro_jax.rewards import math_verifier
from gdro_jax.rewards.base import Pair
from gdro_jax.rewards.math_verifier import MathVerifier

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks" / "hostile.py"


@pytest.fixture(scope="module")
def hostile():
    spec = importlib.util.spec_from_file_location("hostile", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_enough_of_them(hostile):
    assert len(set(hostile.HOSTILE.values())) == len(hostile.HOSTILE) >= 50


def test_the_ordinary_answers_among_them_reach_a_worker(hostile):
    plans = [math_verifier._plan(text, "5") for text in hostile.ordinary(300)]
    assert all(isinstance(plan, Pair) and plan.given is not None for plan in plans) and len(set(plans)) == 300


@pytest.mark.slow
def test_hostile_responses_earn_nothing_and_cost_their_own_row_alone(hostile):
    rows = hostile.mixed()
    with MathVerifier(workers=2, timeout=20.0) as verifier:
        grades, _ = hostile.grade_off_the_main_thread(verifier, rows)
    bad = [row for row in range(len(rows)) if row % 5 == 0]
    assert [list(hostile.HOSTILE)[row // 5] for row in bad if grades.scores[row]] == []
    assert all(grades.scores[row] == 1 for row in range(len(rows)) if row % 5)
    assert set(grades.reasons) <= set(bad)
