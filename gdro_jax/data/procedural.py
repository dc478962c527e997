"""Procedural reasoning problems with verifiable answers, graded by level: the embedded task set.

A stratum is a family at one level, such as `add-3`. Every problem is a short expression and an
answer that is a whole number, so that checking is exact. The shipped set is `embedded("train")` and
`embedded("heldout")`: fixed files with stable ids, disjoint from each other and from what the base was warmed up on.
"""

import dataclasses
import functools
import importlib.resources
import json
import random
from collections.abc import Callable, Iterator

from gdro_jax.data.sources import Problem

_DIGITS = "0123456789"


def _add(rng: random.Random, level: int) -> tuple[str, int]:
    """Addition: two digits and one (level 1), two and two (2), three and three (3)."""
    low, high = 10 ** max(level - 1, 1), 10 ** max(level, 2)
    a, b = rng.randrange(low, high), rng.randrange(1, 10) if level == 1 else rng.randrange(low, high)
    return f"{a}+{b}=", a + b


def _mod(rng: random.Random, level: int) -> tuple[str, int]:
    """Remainder of a three-digit number by 2 or 5 (level 1: the last digit decides) or by 3, 4 or 9 (level 2)."""
    a, m = rng.randrange(100, 1000), rng.choice((2, 5) if level == 1 else (3, 4, 9))
    return f"{a}%{m}=", a % m


def _sort(rng: random.Random, level: int) -> tuple[str, int]:
    """The digits 1 to 9 of a number in ascending order: three (level 1) or five (level 2)."""
    digits = [rng.choice(_DIGITS[1:]) for _ in range(3 if level == 1 else 5)]
    return f"sort{''.join(digits)}=", int("".join(sorted(digits)))


def _linear(rng: random.Random, level: int) -> tuple[str, int]:
    """The x of a x + b = c, with one-digit a and x (level 1) or x up to 29 (level 2)."""
    a, b = rng.randrange(2, 10), rng.randrange(1, 30)
    x = rng.randrange(1, 10) if level == 1 else rng.randrange(10, 30)
    return f"{a}x+{b}={a * x + b}?", x


def _chain(rng: random.Random, level: int) -> tuple[str, int]:
    """Level + 2 one-digit terms, each added or taken away."""
    terms = [rng.randrange(1, 10) * rng.choice((1, -1)) for _ in range(level + 2)]
    return f"{abs(terms[0])}" + "".join(f"{t:+d}" for t in terms[1:]) + "=", abs(terms[0]) + sum(terms[1:])


FAMILIES: dict[str, tuple[Callable[[random.Random, int], tuple[str, int]], int]] = {
    "add": (_add, 3),
    "mod": (_mod, 2),
    "sort": (_sort, 2),
    "linear": (_linear, 2),
    "chain": (_chain, 3),
}
"""Family name to (generator, number of levels)."""


def strata() -> list[str]:
    """Names of all strata, families in order, levels from 1."""
    return [f"{family}-{level}" for family, (_, levels) in FAMILIES.items() for level in range(1, levels + 1)]


def generate(stratum: str, rng: random.Random) -> tuple[str, str]:
    """One problem of a stratum: (prompt, answer).

    Raises:
      ValueError: an unknown stratum.
    """
    family, _, level = stratum.partition("-")
    if stratum not in strata():
        raise ValueError(f"stratum={stratum!r}: must be one of {', '.join(strata())}")
    prompt, answer = FAMILIES[family][0](rng, int(level))
    return prompt, str(answer)


def split(sizes: dict[str, dict[str, int]], seed: int) -> dict[str, list[Problem]]:
    """Disjoint sets of distinct problems.

    Args:
      sizes: set name to {stratum: number of problems}.
      seed: of the generator; Python's Mersenne twister, the same on every platform and version.

    Returns:
      Set name to its problems, shuffled, with dense ids in the order returned.

    Raises:
      ValueError: a stratum is too small for what is asked.
    """
    rng = random.Random(seed)
    drawn: dict[str, list[Problem]] = {name: [] for name in sizes}
    for stratum in strata():
        stream = _distinct(stratum, rng)
        for name, wanted in sizes.items():
            for _ in range(wanted.get(stratum, 0)):
                prompt, answer = next(stream)
                drawn[name].append(Problem(id=0, prompt=prompt, answer=answer, stratum=stratum))
    for problems in drawn.values():
        rng.shuffle(problems)
    return {name: [dataclasses.replace(p, id=i) for i, p in enumerate(problems)] for name, problems in drawn.items()}


@functools.cache
def embedded(name: str) -> tuple[Problem, ...]:
    """The shipped problems, `train` or `heldout`.

    Raises:
      ValueError: another name.
    """
    if name not in ("train", "heldout"):
        raise ValueError(f"embedded set {name!r}: must be 'train' or 'heldout'")
    text = (importlib.resources.files("gdro_jax") / "embedded" / f"{name}.jsonl").read_text()
    return tuple(Problem(**json.loads(line)) for line in text.splitlines())


def _distinct(stratum: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    misses = 0
    while misses < 10_000:
        prompt, answer = generate(stratum, rng)
        if prompt in seen:
            misses += 1
            continue
        misses = 0
        seen.add(prompt)
        yield prompt, answer
    raise ValueError(f"stratum {stratum}: only {len(seen)} distinct problems exist, more were asked for")
