"""Exact match of strings and numbers, in this process: for tasks whose responses are the answer itself."""

import re
from collections.abc import Iterable
from fractions import Fraction

from gdro_jax.rewards import expression
from gdro_jax.rewards.base import BaseVerifier, Rows

_NUMBER = re.compile(r"[+-]?[0-9]{1,64}(?:\.[0-9]{1,64}|/[0-9]{1,64})?")


class ExactVerifier(BaseVerifier):
    """Right if the stripped strings are equal, or both are numbers (``-7``, ``2.50``, ``3/4``) of equal value.

    A row without a gold answer, or whose response is no string, is unscorable.
    """

    def check(self, answers: Iterable[str]) -> dict[int, str]:
        """Rows of gold answers that cannot be used, and why."""
        golds = ((row, answer) for row, answer in enumerate(answers) if expression.parse_gold(answer) is None)
        verdicts = ((row, verdict(answer, answer)) for row, answer in golds)
        return {row: str(verdict) for row, verdict in verdicts if verdict is not True}

    def _verdicts(self, rows: Rows) -> list[bool | str]:
        return [verdict(response, answer) for response, answer in rows]


def verdict(response: object, answer: object) -> bool | str:
    """True, False, or why the row is unscorable; a gold answer ``countdown(...)`` asks for an expression."""
    if not isinstance(response, str):
        return "the response is not a string"
    if not isinstance(answer, str) or not answer.strip():
        return "the gold answer is not a non-empty string"
    given, gold = response.strip(), answer.strip()
    countdown = expression.parse_gold(gold)
    if countdown is not None:
        return expression.solves(countdown, given)
    if given == gold:
        return True
    value = _number(gold)
    return value is not None and value == _number(given)


def _number(text: str) -> Fraction | None:
    """The value of a plain integer, decimal or fraction; None for anything else, division by zero included."""
    if _NUMBER.fullmatch(text) is None:
        return None
    numerator, _, denominator = text.partition("/")
    if not denominator:
        return Fraction(numerator)
    return Fraction(int(numerator), int(denominator)) if int(denominator) else None
