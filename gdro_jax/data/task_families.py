"""The families of `gdro_jax.data.tasks`: each a generator whose knobs say how hard its problems are."""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

LARGEST_TARGET = 10**12 - 1
"""Of countdown, whose checker reads twelve digits."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of tasks.

    Attributes:
        name: of the family.
        make: from a generator and its knobs to (prompt, answer).
        levels: knobs of each level, easiest first.
        largest: the largest value of each knob; the smallest is 1.
    """

    name: str
    make: Callable[..., tuple[str, str]]
    levels: tuple[Mapping[str, int], ...]
    largest: Mapping[str, int]


def _digits(rng: random.Random, count: int) -> int:
    """A number of so many digits, no leading zero."""
    return rng.randrange(10 ** (count - 1), 10**count)


def add(rng: random.Random, digits: int, terms: int) -> tuple[str, str]:
    """A sum of `terms` numbers of `digits` digits."""
    numbers = [_digits(rng, digits) for _ in range(terms + 1)]
    return "+".join(map(str, numbers)) + "=", str(sum(numbers))


def subtract(rng: random.Random, digits: int) -> tuple[str, str]:
    """A difference of two numbers of `digits` digits, often below zero."""
    a, b = _digits(rng, digits), _digits(rng, digits)
    return f"{a}-{b}=", str(a - b)


def multiply(rng: random.Random, digits: int, by: int) -> tuple[str, str]:
    """A product of a number of `digits` digits and one of `by` digits."""
    a, b = _digits(rng, digits), _digits(rng, by)
    return f"{a}*{b}=", str(a * b)


def divide(rng: random.Random, digits: int, by: int) -> tuple[str, str]:
    """Quotient and remainder, as `q r m`, of a number of `digits` digits by one of `by` digits."""
    b = max(_digits(rng, by), 2)
    a = _digits(rng, digits)
    return f"{a}:{b}=", f"{a // b} r {a % b}"


def power_mod(rng: random.Random, base: int, exponent: int) -> tuple[str, str]:
    """A power, modulo a number up to 20: `base` digits, exponent up to 2 ** `exponent`."""
    a, e, m = _digits(rng, base), rng.randrange(2, 2**exponent + 2), rng.randrange(2, 21)
    return f"{a}^{e} mod {m}=", str(pow(a, e, m))


def gcd(rng: random.Random, digits: int, common: int) -> tuple[str, str]:
    """Greatest common divisor of two numbers that share a factor of up to `common` digits."""
    shared = rng.randrange(1, 10**common)
    a, b = shared * rng.randrange(2, 10**digits), shared * rng.randrange(2, 10**digits)
    return f"gcd({a},{b})=", str(math.gcd(a, b))


def fractions(rng: random.Random, digits: int, terms: int) -> tuple[str, str]:
    """A sum or difference of fractions, in lowest terms (a whole number where it is one)."""
    parts = [Fraction(rng.randrange(1, 10**digits), rng.randrange(2, 10**digits + 1)) for _ in range(terms + 1)]
    signs = ["", *(rng.choice("+-") for _ in range(terms))]
    total = sum((part if sign != "-" else -part for sign, part in zip(signs, parts, strict=True)), Fraction(0))
    text = "".join(f"{sign}{part.numerator}/{part.denominator}" for sign, part in zip(signs, parts, strict=True))
    return f"{text}=", str(total)


def linear(rng: random.Random, digits: int, sides: int) -> tuple[str, str]:
    """The x of an equation with x on one side (`sides` 1) or both (2)."""
    x = rng.randrange(-(10**digits) + 1, 10**digits)
    a, b = rng.randrange(2, 10), rng.randrange(1, 10**digits)
    c = rng.choice([n for n in range(2, 10) if n != a]) if sides > 1 else 0
    right = a * x + b - c * x
    return (f"{a}x+{b}={c}x{right:+d}?" if c else f"{a}x+{b}={right}?"), str(x)


def chain(rng: random.Random, terms: int, depth: int) -> tuple[str, str]:
    """A chain of `terms` operations on one-digit numbers, the first few of them bracketed `depth` deep."""
    text, value = "", 0
    first = rng.randrange(1, 10)
    text, value = str(first), first
    for place in range(terms):
        sign, number = rng.choice("+-*" if place < depth else "+-"), rng.randrange(1, 10)
        value = {"+": value + number, "-": value - number, "*": value * number}[sign]
        text = f"({text}{sign}{number})" if place < depth else f"{text}{sign}{number}"
    return f"{text}=", str(value)


def base(rng: random.Random, digits: int, largest: int) -> tuple[str, str]:
    """A number of `digits` digits written in a base from 2 to `largest` + 1 (at most 10)."""
    b, n = rng.randrange(2, min(largest + 1, 10) + 1), _digits(rng, digits)
    left, out = n, ""
    while left:
        left, digit = divmod(left, b)
        out = f"{digit}{out}"
    return f"{n} in base {b}=", out


def sequence(rng: random.Random, order: int, size: int) -> tuple[str, str]:
    """The next term of a polynomial sequence of degree `order`, of which order + 4 terms are given."""
    coefficients = [rng.randrange(-size, size + 1) for _ in range(order)] + [rng.randrange(1, size + 1)]
    terms = [sum(c * n**power for power, c in enumerate(coefficients)) for n in range(order + 5)]
    return ",".join(map(str, terms[:-1])) + ",?", str(terms[-1])


def sort(rng: random.Random, length: int, digits: int) -> tuple[str, str]:
    """`length` + 1 numbers of up to `digits` digits in ascending order, separated by spaces."""
    numbers = [rng.randrange(10**digits) for _ in range(length + 1)]
    return f"sort {' '.join(map(str, numbers))}:", " ".join(map(str, sorted(numbers)))


def count(rng: random.Random, length: int, letters: int) -> tuple[str, str]:
    """How often a letter stands in a word of `length` letters made of `letters` + 1 different ones."""
    alphabet = rng.sample("abcdefghijklmnopqrstuvwxyz", letters + 1)
    word = "".join(rng.choice(alphabet) for _ in range(length))
    letter = rng.choice(alphabet)
    return f"{letter} in {word}:", str(word.count(letter))


def logic(rng: random.Random, terms: int) -> tuple[str, str]:
    """The value, 0 or 1, of `terms` + 1 truth values joined by and, or and xor, read from the left."""
    value = rng.randrange(2)
    text = str(value)
    for _ in range(terms):
        sign, other = rng.choice("&|^"), rng.randrange(2)
        value = {"&": value & other, "|": value | other, "^": value ^ other}[sign]
        text = f"({text}{sign}{other})"
    return f"{text}=", str(value)


def countdown(rng: random.Random, numbers: int, digits: int) -> tuple[str, str]:
    """An expression that makes a target of `numbers` + 1 numbers, each used at most once; many are right."""
    given = [rng.randrange(1, 10**digits) for _ in range(numbers + 1)]
    used = rng.sample(given, rng.randrange(2, numbers + 2))
    target = used[0]
    for number in used[1:]:
        made = {"+": target + number, "-": target - number, "*": target * number}[rng.choice("+-*")]
        target = made if abs(made) <= LARGEST_TARGET else target - number if target > 0 else target + number
    return f"make {target} of {' '.join(map(str, given))}:", f"countdown({','.join(map(str, given))})={target}"


def _family(make: Callable[..., tuple[str, str]], largest: Mapping[str, int], *levels: tuple[int, ...]) -> Family:
    named = tuple(dict(zip(largest, values, strict=True)) for values in levels)
    return Family(name=make.__name__, make=make, levels=named, largest=largest)


ALL = (
    _family(add, {"digits": 18, "terms": 16}, (1, 1), (2, 1), (3, 1), (3, 3), (6, 4)),
    _family(subtract, {"digits": 18}, (1,), (2,), (3,), (6,)),
    _family(multiply, {"digits": 9, "by": 9}, (1, 1), (2, 1), (2, 2), (4, 3)),
    _family(divide, {"digits": 12, "by": 6}, (2, 1), (3, 1), (4, 2)),
    _family(power_mod, {"base": 6, "exponent": 12}, (1, 2), (2, 4), (3, 8)),
    _family(gcd, {"digits": 6, "common": 6}, (1, 1), (2, 1), (3, 2)),
    _family(fractions, {"digits": 4, "terms": 8}, (1, 1), (1, 2), (2, 2)),
    _family(linear, {"digits": 6, "sides": 2}, (1, 1), (2, 1), (2, 2)),
    _family(chain, {"terms": 32, "depth": 32}, (3, 1), (5, 2), (8, 4)),
    _family(base, {"digits": 9, "largest": 9}, (1, 1), (2, 4), (3, 8)),
    _family(sequence, {"order": 5, "size": 20}, (1, 5), (2, 5), (3, 5)),
    _family(sort, {"length": 32, "digits": 6}, (3, 1), (5, 2), (9, 3)),
    _family(count, {"length": 64, "letters": 25}, (6, 2), (12, 3), (24, 3)),
    _family(logic, {"terms": 64}, (2,), (4,), (8,)),
    _family(countdown, {"numbers": 7, "digits": 4}, (1, 1), (2, 1), (3, 2)),
)
"""Every family."""
