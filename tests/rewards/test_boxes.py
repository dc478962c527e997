"""Numbers and letters in boxes."""

import time

import numpy as np
import pytest

from gdro_jax.rewards import boxes, make, plain_numbers, shaping


def box(text: str) -> str:
    return f"so it is \\boxed{{{text}}}."


NUMBERS = [
    ("4.2", "4.2", True), ("4.20", "4.2", True), ("\\$1,234.50", "1234.5", True), ("1{,}234", "1234", True),
    ("1\\,234\\,567", "1234567", True), ("12,34", "1234", False),
    ("-3/4", "-0.75", True), ("\\frac{3}{4}", "0.75", True),
    ("\\dfrac{-3}{4}", "-0.75", True), ("3/0", "0", False), ("1.6 \\times 10^{-19}", "1.6e-19", True),
    ("6.02\\cdot10^{23}", "6.02e23", True), ("6.02e22", "6.02e23", False), ("45 \\text{ minutes}", "45", True),
    ("12 cm^2", "12", True), ("166\\text{ cm}^2", "166", True), ("90^\\circ", "90", True), ("4.2\\%", "4.2", True),
    ("1.0000001", "1", True), ("1.00001", "1", False), ("five", "5", False), ("x", "5", False), ("", "5", False),
    ("4.3", "4.2 within 0.1", True), ("4.31", "4.2 within 0.1", False), ("4.1\\%", "4.2 within 0.1", True),
    ("1e999", "5", False), ("nan", "5", False), ("5 6", "56", False), ("5 within 9", "6", False),
]  # fmt: skip


def test_numbers():
    verifier = make("numeric")
    grades = verifier.grade([box(given) for given, _, _ in NUMBERS], [gold for _, gold, _ in NUMBERS])
    assert [row for row, score in zip(NUMBERS, grades.scores, strict=True) if bool(score) != row[2]] == []
    assert grades.scorable.all()
    assert make("numeric").grade([box("5")], ["five"]).reasons == {0: "the gold answer is not a number"}
    assert verifier.check(["4", "4.2 within 0.1", "1/3", "five"]) == {3: "the gold answer is not a number"}


LETTERS = [
    ("B", True), ("(B)", True), ("\\text{B}", True), ("\\textbf{(B)}", True), ("B.", True), ("B) 12 m", True),
    ("$B$", True),
    ("b", False), ("C", False), ("AB", False), ("A, B", False), ("", False), ("Bob", False), ("12", False),
]  # fmt: skip


def test_letters():
    with make("choice") as verifier:
        grades = verifier.grade([box(text) for text, _ in LETTERS], ["B"] * len(LETTERS))
        assert [row for row, score in zip(LETTERS, grades.scores, strict=True) if bool(score) != row[1]] == []
        assert verifier.grade(["the answer is B", "\\boxed{A} no, \\boxed{B}"], ["B", "B"]).scores.tolist() == [0, 1]
        assert list(verifier.check(["A", "(C)", "12"])) == [2]


@pytest.mark.parametrize("kind", [boxes.NumericVerifier, boxes.ChoiceVerifier])
def test_hostile_responses_cost_little_and_earn_nothing(kind):
    responses = ["x" * 2_000_000, "\\boxed{" * 200_000, box("1" * 100_000), box("a" * 1900), box("1," * 900), None, 5,
                 box("\\text{" * 300), box("/".join("1" * 90)), box("e" * 199), box("B" * 199)]  # fmt: skip
    begun = time.process_time()
    grades = kind().grade(responses, ["B" if kind is boxes.ChoiceVerifier else "7"] * len(responses))
    assert not grades.scores.any() and time.process_time() - begun < 5.0
    assert not grades.scorable[[1, 2, 5, 6]].any()


def test_a_number_needs_no_more_than_its_length():
    begun = time.process_time()
    assert plain_numbers.read("a" * 5000) is None and plain_numbers.read("1" + "ab" * 99 + "{") is None
    assert time.process_time() - begun < 1.0


# Shaping ------------------------------------------------------------------------------------------------------------
def test_the_soft_overlong_penalty_is_that_of_dapo():
    lengths = [0, 12, 16, 18, 20, 24]
    np.testing.assert_allclose(shaping.soft_overlong(lengths, 20, 8), [0, 0, -0.5, -0.75, -1, -1])
    for buffer in (0, 21):
        with pytest.raises(ValueError, match="buffer"):
            shaping.soft_overlong(lengths, 20, buffer)


def test_what_is_not_asked_for_changes_nothing():
    scores, said = np.float32([1, 0, 1]), [box("5"), "5", "\\boxed{}"]
    off = shaping.shaped(
        scores, [1, 2, 3], said, max_length=4, overlong_buffer=None, overlong_penalty=1.0, format_reward=None
    )
    np.testing.assert_array_equal(off, scores)
    on = shaping.shaped(
        scores, [1, 4, 3], said, max_length=4, overlong_buffer=2, overlong_penalty=0.5, format_reward=0.25
    )
    np.testing.assert_allclose(on, [1.25, -0.5, 0.75])
