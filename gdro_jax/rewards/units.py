r"""Units behind an answer: spellings of one are alike, another one of the same kind is converted, any other is not it.

Only lengths, times, and what is made of them; every other unit is passed over, as math-verify does.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from gdro_jax.rewards.spelling import TEXT_MACRO

MAX_CHARS = 200
"""Longest answer that a unit is looked for in."""

_SPELLINGS = {
    ("time", Fraction(1)): "s sec secs second seconds",
    ("time", Fraction(60)): "min mins minute minutes",
    ("time", Fraction(3600)): "h hr hrs hour hours",
    ("time", Fraction(86400)): "day days",
    ("length", Fraction(1, 1000)): "mm millimeter millimeters millimetre millimetres",
    ("length", Fraction(1, 100)): "cm centimeter centimeters centimetre centimetres",
    ("length", Fraction(1)): "m meter meters metre metres",
    ("length", Fraction(1000)): "km kilometer kilometers kilometre kilometres",
}
_UNITS = {name: unit for unit, names in _SPELLINGS.items() for name in names.split()}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "2": 2, "cubic": 3, "cubed": 3, "3": 3}
_WRAPPED = re.compile(TEXT_MACRO + r"\{([^{}]*)\}")
_TAIL = re.compile(r"(.*?[0-9)}])((?:" + TEXT_MACRO + r"\{[^{}]*\}|\\[,;:! ]|[A-Za-z/~.\s]|\^\{?[23]\}?)+)", re.DOTALL)
_PART = re.compile(r"(?:(square|sq|cubic)\.? )?([a-z]+)(?: ?\^\{?([23])\}?| (squared|cubed))?")


class Unit(NamedTuple):
    """What is measured, and how much of it in seconds and metres."""

    kind: str
    size: Fraction


class Quantity(NamedTuple):
    """An answer without its unit, and the unit."""

    value: str
    unit: Unit


def split(text: str, *, wrapped: bool = False) -> Quantity | None:
    r"""Of `12 cm`, `\frac{1}{2}\text{ km/h}`; None without a known unit, or, if `wrapped`, with a bare one."""
    if len(text) > MAX_CHARS:
        return None
    match = _TAIL.fullmatch(text.strip().rstrip("$").strip())
    if match is None or (wrapped and _WRAPPED.search(match[2]) is None):
        return None
    unit = read(match[2])
    return None if unit is None else Quantity(match[1], unit)


def read(text: str) -> Unit | None:
    r"""The unit that `km/h`, `$cm^2$`, `\text{ square metres}` or `minutes` is; None for one that is not known here."""
    name = re.sub(r"(?:\\[,;:! ]|[~$\s])+", " ", _WRAPPED.sub(r"\1", text)).strip(" .").casefold()
    above, slash, below = re.sub(r" ?/ ?| per ", "/", name).partition("/")
    over = _part(above)
    if over is None or not slash:
        return over
    under = _part(below)
    return None if under is None else Unit(f"{over.kind}/{under.kind}", over.size / under.size)


def _part(name: str) -> Unit | None:
    match = _PART.fullmatch(name)
    if match is None or match[2] not in _UNITS:
        return None
    (kind, size), power = _UNITS[match[2]], _POWERS.get(match[1] or match[3] or match[4], 1)
    return Unit(f"{kind}^{power}", size**power)
