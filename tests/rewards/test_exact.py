import numpy as np
import pytest

from gdro_jax import rewards
from gdro_jax.rewards.exact import ExactVerifier


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("12", "12", True),
        (" 12\n", "12", True),
        ("012", "12", True),
        ("12.0", "12", True),
        ("-0", "0", True),
        ("1/2", "0.5", True),
        ("+3", "3", True),
        ("13", "12", False),
        ("12 12", "12", False),
        ("12.", "12", False),
        ("", "12", False),
        ("1/0", "12", False),
        ("12", "1/0", False),
        ("1_2", "12", False),
        ("1e1", "10", False),
        ("\u0661\u0662", "12", False),
        ("9" * 2_000_000, "12", False),
        ("abc", "abc", True),
        ("ABC", "abc", False),
        ("\x00\ud800", "12", False),
    ],
)
def test_exact(response: str, answer: str, right: bool) -> None:
    grades = ExactVerifier().grade([response], [answer])
    assert grades.scores.tolist() == [float(right)]
    assert grades.scorable.all() and not grades.reasons


def test_what_cannot_be_graded_is_unscorable_and_says_why() -> None:
    responses, answers = ["1", "1", None, "1"], ["", None, "1", "1"]
    grades = ExactVerifier().grade(responses, answers)  # type: ignore[arg-type, list-item]
    np.testing.assert_array_equal(grades.scorable, [False, False, False, True])
    np.testing.assert_array_equal(grades.scores, [0, 0, 0, 1])
    assert sorted(grades.reasons) == [0, 1, 2] and "gold" in grades.reasons[0] and "response" in grades.reasons[2]


def test_dtypes_and_shapes_with_no_row_too() -> None:
    for rows in (0, 3):
        grades = ExactVerifier().grade(["1"] * rows, ["1"] * rows)
        assert grades.scores.dtype == np.float32 and grades.scorable.dtype == np.bool_
        assert grades.scores.shape == grades.scorable.shape == (rows,)


def test_make_by_name() -> None:
    assert rewards.names() == ("exact", "math", "numeric", "choice")
    with rewards.make("exact", workers=1, timeout=1.0) as verifier:
        assert verifier.grade(["1"], ["1"]).scores.tolist() == [1.0]
    with pytest.raises(ValueError, match=r"verifier: 'mth' is unknown.*exact, math, numeric.*did you mean 'math'"):
        rewards.make("mth")
    with pytest.raises(ValueError, match="timeout: 0"):
        rewards.make("math", timeout=0)
    with pytest.raises(ValueError, match="1 of them for 2 responses"):
        ExactVerifier().grade(["1", "2"], ["1"])
