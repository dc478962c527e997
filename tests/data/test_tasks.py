"""The library of tasks: every generated answer verifies, every perturbed one fails, answers found by other means."""

import itertools
import math
import random
import re
from fractions import Fraction

import pytest

from gdro_jax.data import tasks
from gdro_jax.data.files import DataError
from gdro_jax.data.sources import Problem
from gdro_jax.rewards import expression
from gdro_jax.rewards.exact import ExactVerifier

STRATA = [(name, level) for name, family in tasks.FAMILIES.items() for level in range(1, len(family.levels) + 1)]


def drawn(name: str, level: int, count: int = 60) -> list[Problem]:
    rng, family = random.Random(f"{name}{level}"), tasks.FAMILIES[name]
    return [Problem(0, *family.make(rng, **family.levels[level - 1]), name) for _ in range(count)]


def reach(numbers: list[int], texts: list[str], target: int) -> str | None:
    """An expression for the target, by trying everything."""
    for number, text in zip(numbers, texts, strict=True):
        if number == target:
            return text
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for n in range(len(numbers)) if n not in (i, j)]
        for sign in "+-*":
            a, b = numbers[i], numbers[j]
            value = {"+": a + b, "-": a - b, "*": a * b}[sign]
            more = [*(numbers[n] for n in rest), value], [*(texts[n] for n in rest), f"({texts[i]}{sign}{texts[j]})"]
            found = reach(*more, target)
            if found is not None:
                return found
    return None


def solve(name: str, prompt: str) -> str:
    """The answer by means that share nothing with the generators."""
    if name in ("add", "subtract", "multiply", "chain", "logic"):
        return str(eval(prompt.removesuffix("=")))
    numbers = [int(n) for n in re.findall(r"-?\d+", prompt)]
    if name == "divide":
        a, b = (int(n) for n in prompt.removesuffix("=").split(":"))
        quotient = next(q for q in itertools.count() if (q + 1) * b > a) if a < 10**5 else a // b
        return f"{quotient} r {a - quotient * b}"
    if name == "power_mod":
        a, e, m = numbers
        value = 1
        for _ in range(e):
            value = value * a % m
        return str(value)
    if name == "gcd":
        least = min(numbers)
        low = [d for d in range(1, math.isqrt(least) + 1) if least % d == 0]
        return str(max(d for d in [*low, *(least // d for d in low)] if all(n % d == 0 for n in numbers)))
    if name == "fractions":
        parts = [(sign, int(a), int(b)) for sign, a, b in re.findall(r"([+-]?)(\d+)/(\d+)", prompt)]
        bottom = math.prod(b for _, _, b in parts)
        top = sum((-1 if sign == "-" else 1) * a * bottom // b for sign, a, b in parts)
        shared = math.gcd(top, bottom)
        return str(top // shared) if bottom == shared else f"{top // shared}/{bottom // shared}"
    if name == "linear":
        left, right = prompt.removesuffix("?").split("=")
        at_0, at_1 = (_side(left, x) - _side(right, x) for x in (0, 1))
        assert at_0 % (at_0 - at_1) == 0  # a straight line crosses zero once
        return str(at_0 // (at_0 - at_1))
    if name == "base":
        return _base(*numbers)
    if name == "sequence":
        rows = [numbers]
        while len(rows[-1]) > 1:
            rows.append([b - a for a, b in itertools.pairwise(rows[-1])])
        return str(sum(row[-1] for row in rows))
    if name == "sort":
        return " ".join(sorted(re.findall(r"\d+", prompt), key=lambda n: (len(n), n)))
    if name == "count":
        letter, _, word = prompt.removesuffix(":").split(" ")
        return str(len(word) - len(word.replace(letter, "")))
    target, _, given = prompt.removeprefix("make ").removesuffix(":").partition(" of ")
    found = reach([int(n) for n in given.split()], given.split(), int(target))
    assert found is not None
    return found


def _side(text: str, x: int) -> int:
    return eval(re.sub(r"(\d)x", r"\1*x", text), {"x": x})


def _base(value: int, base: int) -> str:
    places = [base**n for n in range(40) if base**n <= value]
    out = ""
    for place in reversed(places):
        out += str(value // place)
        value %= place
    return out


@pytest.mark.parametrize(("name", "level"), STRATA)
def test_every_answer_verifies_and_every_perturbed_one_fails(name, level):
    rng = random.Random(0)
    problems = drawn(name, level)
    for problem in problems:
        answer = solve(name, problem.prompt)
        assert tasks.check(problem, answer) and tasks.check(problem, f" {answer}\n")
        for wrong in perturbed(answer, rng):
            assert not tasks.check(problem, wrong), (problem.prompt, answer, wrong)
        assert not tasks.check(problem, f"{problem.prompt}{answer}") and not tasks.check(problem, problem.answer + " =")
    assert len({problem.prompt for problem in problems}) >= (4 if name in ("logic", "base") else 20)


def perturbed(answer: str, rng: random.Random) -> list[str]:
    """Answers that say something else: a digit or letter changed, one more, one less, two swapped, another sign."""
    if "(" in answer or any(sign in answer[1:] for sign in "*+-"):  # an expression, whose value another one may have
        return [f"{answer}+1", f"({answer})*2-{answer}-1", answer.replace("(", "((", 1), f"{answer}=", ""]
    places = [n for n, char in enumerate(answer) if char.isdigit()]
    place = rng.choice(places)
    changed = answer[:place] + str((int(answer[place]) + rng.randrange(1, 10)) % 10) + answer[place + 1 :]
    out = [
        changed,
        f"{answer}1",
        f"1{answer}" if answer[0] != "-" else f"-1{answer[1:]}",
        f"-{answer}",
        "",
        "x",
        f"{answer}?",
    ]
    return [text for text in out if _plain(text) != _plain(answer)]


def _plain(text: str) -> object:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return text


def test_knobs_make_what_they_say():
    rng = random.Random(0)
    assert all(len(tasks.generate("add", rng, digits=7, terms=2).prompt) == 3 * 7 + 3 for _ in range(50))
    assert len(tasks.generate("logic", rng, terms=64).prompt) == 1 + 64 * 4 + 1
    assert tasks.generate("sort", rng, length=31).prompt.count(" ") == 32
    for name, family in tasks.FAMILIES.items():
        assert all(set(level) == set(family.largest) for level in family.levels)
        tasks.generate(name, rng, **family.largest)  # the hardest is still made
    for bad, words in (({"digit": 2}, "no knob"), ({"digits": 0}, "1..18"), ({"digits": 99}, "1..18")):
        with pytest.raises(ValueError, match=words):
            tasks.generate("add", rng, **bad)


@pytest.mark.parametrize("name", tasks.FAMILIES)
def test_any_knobs_make_problems_whose_answers_verify(name):
    rng, largest = random.Random(name), tasks.FAMILIES[name].largest
    for draw in range(60):
        knobs = {knob: most if draw % 5 == 0 else rng.randint(1, most) for knob, most in largest.items()}
        problem = tasks.generate(name, rng, **knobs)
        assert ExactVerifier().check([problem.answer]) == {}
        if name == "countdown":  # a search through eight numbers would take hours
            task = expression.parse_gold(problem.answer)
            assert task is not None and f"make {task.target} of {' '.join(map(str, task.numbers))}:" == problem.prompt
        else:
            answer = solve(name, problem.prompt)
            assert tasks.check(problem, answer), (problem, answer)
            assert not any(tasks.check(problem, wrong) for wrong in perturbed(answer, rng))


def test_a_set_is_the_same_whatever_else_is_asked_for_and_has_no_problem_twice():
    one = {p.prompt for p in tasks.build([("add", 2, 30)], seed=4)}
    more = tasks.build([("gcd", 1, 20), ("add", 2, 30), ("countdown", 1, 20)], seed=4)
    assert (
        {p.prompt for p in more if p.stratum == "add-2"} == one != {p.prompt for p in tasks.build([("add", 2, 30)], 5)}
    )
    assert [p.id for p in more] == list(range(70)) and len({p.prompt for p in more}) == 70
    assert {(p.stratum, p.level, p.subject) for p in more} >= {("gcd-1", "Level 1", "gcd")}
    assert ExactVerifier().check(p.answer for p in more) == {}


def test_names_of_sets():
    assert len(tasks.parse("tasks:add@1-2*5,logic@2*7,gcd@3*4")) == 21
    assert tasks.parse("tasks:add@1*5,seed=3") != tasks.parse("tasks:add@1*5") == tasks.parse("tasks:add@1*5,seed=0")
    assert {p.level for p in tasks.parse("tasks:linear*3")} == {"Level 1", "Level 2", "Level 3"}
    for bad, words in (
        ("tasks:", "names no task"),
        ("tasks:ad@1", "did you mean 'add'"),
        ("tasks:add@9", r"1\.\.5"),
        ("tasks:add@x", "FAMILY@LEVEL"),
        ("tasks:add@1*0", "count '0' is not allowed"),
        ("tasks:add@3-1", "levels 3-1 are none"),
        ("tasks:add@1,seed=-1", "seed '-1' is not allowed"),
        ("tasks:logic@1*500", "only .* distinct problems"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            tasks.parse(bad)
        assert "\n" not in str(caught.value)


def test_expressions_are_checked_exactly_and_never_run():
    task = expression.parse_gold("countdown(3,5,7)=22")
    assert task is not None
    for right in ("3*5+7", "7+5*3", "(3*5)+7", " 3 * 5 + 7 "):
        assert expression.solves(task, right)
    for wrong in (
        "22",
        "3*5+7+0",
        "5*5-3",
        "3**3",
        "__import__('os')",
        "3*5+7)",
        "(" * 150,
        "",
        "-3",
        "3*5+7=22",
        "7" * 201,
    ):
        assert not expression.solves(task, wrong)
    assert not ExactVerifier().score(["countdown(3,5,7)=22"], ["countdown(3,5,7)=22"])[0]
    assert expression.solves(expression.Countdown((4, 8, 1), 2), "8/4*1")
    assert not expression.solves(expression.Countdown((4, 8, 0), 2), "8/0")
