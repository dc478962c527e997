"""Duplicates and overlaps are found through typesetting and small edits, and ordinary likeness is not taken for one."""

from gdro_jax.data import contamination
from gdro_jax.data.contamination import TRAINING, Overlap
from gdro_jax.data.sources import Problem

LONG = (
    "Let $ABC$ be a triangle with $AB = 13$, $BC = 14$ and $CA = 15$. A circle through $A$ touches $BC$ at its "
    "midpoint. Find the length of the chord that it cuts from the line $AB$."
)


def problems(*texts: str) -> list[Problem]:
    return [Problem(n, text, "1", "s") for n, text in enumerate(texts)]


def test_typesetting_is_no_difference_and_signs_are():
    found = contamination.find(problems("What is $2+3$?", "what is  2 + 3 ?", "What is $2-3$?", "What is $23$?"), {})
    assert found == [Overlap(1, 0, TRAINING, True)]
    same = problems("Find $\\left(\\frac12\\right)^2$", "find \\( ( \\frac12 )^2 \\)")
    assert contamination.find(same, {}) == [Overlap(1, 0, TRAINING, True)]


def test_overlaps_with_evaluation_sets_are_named():
    edited = f"Solve this. {LONG.replace('CA = 15', 'CA = 17')} Give a whole number."
    train = problems("1+1=", edited, "Find the length of the chord of a circle.", LONG.upper().replace("$", ""))
    found = contamination.find(train, {"other": problems("9"), "bench": problems("7", LONG, "1 + 1 =")})
    assert found == [
        Overlap(0, 2, "bench", True),
        Overlap(1, 1, "bench", False),
        Overlap(3, 1, "bench", True),
    ]


def test_a_question_with_options_is_found_without_them():
    asked = Problem(0, f"{LONG}\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer with the letter.", "B", "s", bare=LONG)
    short = Problem(1, "What is spin?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer with the letter.", "B", "s", bare="What is spin?")
    found = contamination.find(problems(LONG, "what is spin?"), {"bench": [asked, short]})
    assert found == [Overlap(0, 0, "bench", True), Overlap(1, 1, "bench", True)]


def test_a_shared_instruction_is_no_overlap():
    tail = "The answer is in the form m/n where m and n are relatively prime positive integers, please give m + n."
    train = problems(
        f"How many ways are there to walk from the corner of a grid to the opposite one in ten steps? {tail}"
    )
    bench = problems(
        f"A bag holds red and blue balls, and three of them are drawn without a look into the bag. {tail}" * 1
    )
    assert contamination.find(train, {"bench": bench}) == []


def test_nothing_is_found_in_nothing():
    assert contamination.find([], {"x": problems("1")}) == [] and contamination.find(problems("1"), {}) == []
