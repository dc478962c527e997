"""Tasks whose answer is an expression: reach a target with given numbers, as ``countdown(3,5,7)=22`` asks.

Many expressions are right, so the checker computes the one that was given, exactly and without ever running it.
"""

import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS = 200
"""Longest expression that is looked at."""
MAX_DIGITS = 9
"""Digits of the largest number in one."""

_GOLD = re.compile(r"countdown\(([0-9]{1,9}(?:,[0-9]{1,9}){1,15})\)=(-?[0-9]{1,12})")
_TOKEN = re.compile(r"\s*(?:([0-9]+)|([-+*/()]))")


class Countdown(NamedTuple):
    """Numbers, each to be used at most once, and what they must make."""

    numbers: tuple[int, ...]
    target: int


class _Wrong(Exception):
    """Not an expression, or one without a value."""


def parse_gold(gold: str) -> Countdown | None:
    """The task that a gold answer states; None if it states none."""
    match = _GOLD.fullmatch(gold.strip())
    return None if match is None else Countdown(tuple(map(int, match[1].split(","))), int(match[2]))


def solves(task: Countdown, expression: str) -> bool:
    """Whether an expression of ``+ - * /`` and brackets makes the target of some of the numbers, each used once."""
    if len(expression) > MAX_CHARS:
        return False
    try:
        parser = _Parser(expression)
        value = parser.sum()
        parser.end()
    except _Wrong:
        return False
    return value == task.target and not Counter(parser.numbers) - Counter(task.numbers)


class _Parser:
    """Recursive descent; at most as deep as the expression is long."""

    def __init__(self, text: str) -> None:
        self.numbers: list[int] = []
        self._tokens: list[str] = []
        place, text = 0, text.rstrip()
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise _Wrong
            self._tokens.append(match[1] or match[2])
            place = match.end()
        self._tokens.reverse()

    def end(self) -> None:
        if self._tokens:
            raise _Wrong

    def sum(self) -> Fraction:
        value = self._product()
        while (sign := self._take("+-")) is not None:
            term = self._product()
            value = value + term if sign == "+" else value - term
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while (sign := self._take("*/")) is not None:
            factor = self._factor()
            if sign == "/" and factor == 0:
                raise _Wrong
            value = value * factor if sign == "*" else value / factor
        return value

    def _factor(self) -> Fraction:
        if self._take("(") is not None:
            value = self.sum()
            if self._take(")") is None:
                raise _Wrong
            return value
        if not self._tokens or not self._tokens[-1].isdigit() or len(self._tokens[-1]) > MAX_DIGITS:
            raise _Wrong
        self.numbers.append(int(self._tokens.pop()))
        return Fraction(self.numbers[-1])

    def _take(self, allowed: str) -> str | None:
        return self._tokens.pop() if self._tokens and self._tokens[-1] in allowed else None
