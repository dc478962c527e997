"""A library of procedural tasks: families with difficulty knobs, levels that are settings of them, exact checkers.

Every draw is a function of (seed, family, level) alone. `gdro_jax.data.procedural` is the smaller, older set that the
shipped base was made from; its problems do not change.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches

from gdro_jax.data import task_families
from gdro_jax.data.files import DataError
from gdro_jax.data.sources import Problem
from gdro_jax.data.task_families import Family
from gdro_jax.rewards.exact import verdict

PREFIX = "tasks:"
"""What names a set of tasks where a file of problems is expected: `tasks:add@1-3,countdown@2*500,gcd`."""
DEFAULT_COUNT = 200
"""Problems of each stratum where none is asked for."""
_MISSES = 5_000

FAMILIES: Mapping[str, Family] = {family.name: family for family in task_families.ALL}


def generate(name: str, rng: random.Random, **knobs: int) -> Problem:
    """One problem of a family with the knobs given (the rest as at its first level); its stratum is the family.

    Raises:
        ValueError: an unknown family or knob, or a knob out of its range.
    """
    family = _family(name)
    values = dict(family.levels[0])
    for knob, value in knobs.items():
        if knob not in values:
            raise ValueError(f"{name}: {knob!r} is no knob of it; it has {', '.join(values)}")
        if not 1 <= value <= family.largest[knob]:
            raise ValueError(f"{name}: {knob}={value!r} is not allowed; it must be in 1..{family.largest[knob]}")
        values[knob] = value
    prompt, answer = family.make(rng, **values)
    return Problem(0, prompt, answer, name)


def check(problem: Problem, response: str) -> bool:
    """Whether a response answers a problem of this library: exact, the answer alone, spaces around it forgiven."""
    return verdict(response, problem.answer) is True


def build(strata: Sequence[tuple[str, int, int]], seed: int) -> tuple[Problem, ...]:
    """Distinct problems with dense ids, shuffled.

    Args:
        strata: family, level from 1, and how many.
        seed: of everything drawn; a stratum's problems do not depend on what else is asked for.

    Raises:
        ValueError: an unknown family, a level it lacks, or more problems than there are.
    """
    problems = [problem for name, level, count in strata for problem in _distinct(name, level, count, seed)]
    random.Random(f"{seed} order").shuffle(problems)
    return tuple(Problem(n, p.prompt, p.answer, p.stratum, p.level, p.subject) for n, p in enumerate(problems))


def parse(text: str) -> tuple[Problem, ...]:
    """The problems that a text such as `tasks:add@1-3*100,countdown@2,seed=5` names.

    Raises:
        DataError: in one line, what in it cannot be understood.
    """
    seed, strata = 0, []
    for item in filter(None, text.removeprefix(PREFIX).split(",")):
        try:
            if item.startswith("seed="):
                seed = _whole("seed", item.removeprefix("seed="), least=0)
                continue
            rest, _, count = item.partition("*")
            name, _, levels = rest.partition("@")
            first, _, last = levels.partition("-")
            family = _family(name)
            low = _whole("level", first) if first else 1
            high = _whole("level", last) if last else low if first else len(family.levels)
            if high < low:
                raise ValueError(f"levels {low}-{high} are none; the lower one is given first")
            number = _whole("count", count) if count else DEFAULT_COUNT
            strata += [(name, level, number) for level in range(low, high + 1)]
        except ValueError as error:
            raise DataError(f"{text}: {item!r}: {error}; FAMILY@LEVEL-LEVEL*COUNT is needed") from None
    try:
        problems = build(strata, seed)
    except ValueError as error:
        raise DataError(f"{text}: {error}") from None
    if not problems:
        raise DataError(f"{text}: names no task; it must name some of {', '.join(FAMILIES)}")
    return problems


def _whole(what: str, text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{what} {text!r} is not allowed; it must be a whole number of at least {least}")
    return int(text)


def _family(name: str) -> Family:
    if name in FAMILIES:
        return FAMILIES[name]
    close = get_close_matches(name, FAMILIES, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"family {name!r} is unknown; it must be one of {', '.join(FAMILIES)}{hint}")


def _distinct(name: str, level: int, count: int, seed: int) -> Iterator[Problem]:
    family = _family(name)
    if not 1 <= level <= len(family.levels):
        raise ValueError(f"{name}: level {level} is not allowed; it must be in 1..{len(family.levels)}")
    rng, seen, misses = random.Random(f"{seed} {name} {level}"), set[str](), 0
    while len(seen) < count:
        prompt, answer = family.make(rng, **family.levels[level - 1])
        if prompt in seen:
            misses += 1
            if misses > _MISSES:
                raise ValueError(
                    f"{name}@{level}: only {len(seen)} distinct problems were found, {count} were asked for"
                )
            continue
        seen.add(prompt)
        yield Problem(0, prompt, answer, f"{name}-{level}", f"Level {level}", name)
