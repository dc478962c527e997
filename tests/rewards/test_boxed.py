import pytest

from gdro_jax.rewards.boxed import AnswerTooLong, last_boxed, nesting_depth


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("no box", None),
        ("\\boxed", None),
        ("\\boxed 5", None),
        ("\\boxed{5", None),
        ("\\boxed{}", ""),
        ("\\boxed{5}", "5"),
        ("\\boxed {5}", "5"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("\\boxed{1} then \\boxed", "1"),
        ("\\boxed{\\frac{1}{2}} and {more}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right."),
        ("\\boxed{x = \\boxed{3}}", "3"),
        ("} } { \\boxed{4} } {", "4"),
        ("\\boxed{a\nb}", "a\nb"),
    ],
)
def test_last_boxed(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


def test_the_limit_is_on_the_answer_not_on_the_text() -> None:
    assert last_boxed("y" * 1_000_000 + "\\boxed{" + "1" * 2000 + "}" + "y" * 1_000_000) == "1" * 2000
    for text in ("\\boxed{" + "1" * 2001 + "}", "\\boxed{" + "1" * 2_000_000, "\\boxed{" * 300_000):
        with pytest.raises(AnswerTooLong):
            last_boxed(text)
    assert last_boxed("\\boxed{123}", limit=3) == "123"
    with pytest.raises(AnswerTooLong):
        last_boxed("\\boxed{1234}", limit=3)


def test_nesting_depth() -> None:
    assert [nesting_depth(text) for text in ("", "a", "(a)", "([{a}])", "()()", "(()")] == [0, 0, 1, 3, 1, 2]
    assert nesting_depth("(" * 5000) == 5000
