r"""Reading one number out of an answer: thousands separators, powers of ten, fractions, percent signs and units."""

import re
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

MAX_NUMBER_CHARS = 200
"""Longest text that is read as a number."""
RELATIVE = Fraction(1, 1_000_000)
"""Relative difference at which two numbers still are the same, where the gold answer names none of its own."""

_WITHIN = re.compile(r"(?P<number>.+) within (?P<error>[0-9.e+-]+)")
_SEPARATOR = r"(?:,\\!\s?|,|\{,\}|\\,|\\!|\s|~)"
_GROUPED = re.compile(rf"(?<![0-9.,])[1-9][0-9]{{0,2}}(?:{_SEPARATOR}[0-9]{{3}})+(?!{_SEPARATOR}?[0-9])")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]{1,64})\}\{([^{}]{1,64})\}|([^/]{1,64})/([^/]{1,64})")
_POWER = re.compile(r"(?:\\times|\\cdot|[*x\u00d7])10\^(?:\{([+-]?[0-9]{1,3})\}|([+-]?[0-9]{1,3}))")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_UNIT = re.compile(
    r"(?:\\(?:text|mathrm|mbox|textbf)\{[^{}]*\}(?:\^\{?-?[0-9]\}?)?|[A-Za-z\u00b0/](?:\^\{?-?[0-9]\}?)?)+$"
)
_NOISE = re.compile(
    r"\\(?:left|right|quad)|\\?\$|\\?%|\^\{?\\circ\}?|\u00b0|(?<![0-9])(?:\s|~|\\[,;:!])+|(?:\s|~|\\[,;:!])+(?![0-9])"
)


class Target(NamedTuple):
    """A numeric gold answer and the absolute error that is allowed, None for the usual relative one."""

    number: Fraction
    error: Fraction | None


def target(gold: str) -> Target | None:
    """What ``4.2`` or ``4.2 within 0.1`` asks for; None if the gold answer is no number."""
    match = _WITHIN.fullmatch(gold.strip())
    number = read(gold if match is None else match["number"])
    if number is None:
        return None
    error = None if match is None else read(match["error"])
    return None if match is not None and error is None else Target(number, error)


def meets(wanted: Target, given: Fraction) -> bool:
    """Whether a number is near enough."""
    allowed = RELATIVE * abs(wanted.number) if wanted.error is None else wanted.error
    return abs(given - wanted.number) <= allowed


def read(text: str, *, units: bool = True) -> Fraction | None:
    r"""The number that a text is: ``-7``, ``1,234``, ``3/4``, ``\frac{3}{4}``, ``1.6 \times 10^{-19}``, ``6e3``.

    A percent sign, a dollar sign, degrees and, if `units`, a unit behind the number are passed over. None for anything
    else.
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    plain = _NOISE.sub("", _GROUPED.sub(_joined, text.strip()).replace("\u2212", "-"))
    value = _value(plain)
    return _value(_UNIT.sub("", plain)) if value is None and units else value


def _joined(grouped: re.Match[str]) -> str:
    return "".join(filter(str.isdigit, grouped[0]))


def _value(text: str) -> Fraction | None:
    text = _POWER.sub(lambda match: f"e{match[1] or match[2]}", text)
    if _DECIMAL.fullmatch(text):
        return Fraction(Decimal(text))
    sign, body = (-1, text[1:]) if text.startswith("-") else (1, text)
    match = _FRACTION.fullmatch(body)
    if match is None:
        return None
    above, below = (match[1], match[2]) if match[1] is not None else (match[3], match[4])
    if not (_DECIMAL.fullmatch(above) and _DECIMAL.fullmatch(below)) or not Decimal(below):
        return None
    return sign * Fraction(Decimal(above)) / Fraction(Decimal(below))
