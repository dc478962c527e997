r"""Problems that a training set holds twice, or shares with what a model is evaluated on.

Texts are compared after everything that is only typesetting is taken out of them: case, spaces, dollar signs, sizes of
brackets. Two problems are the same if nothing else differs; one *overlaps* another if it holds at least ``SHARE`` of
the other's runs of ``RUN`` words, which finds a problem with a changed number at its end or an instruction around it.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gdro_jax.data.sources import Problem

RUN = 8
"""Words in a run."""
SHARE = 0.6
"""Share of an evaluation problem's runs that must be found in a training problem."""

_TYPESETTING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad|[,;:!])(?![A-Za-z])|\$|\\[()\[\]]|~")
_WORD = re.compile(r"[a-z]+|[0-9]+|[^\sa-z0-9]")


class Overlap(NamedTuple):
    """A training problem and what it is the same as, or overlaps: ids in their own sets."""

    problem: int
    other: int
    where: str
    """Name of the other's set, ``the training set`` for a duplicate."""
    same: bool


TRAINING = "the training set"


def words(text: str) -> tuple[str, ...]:
    """Words, numbers and signs of a text, without its typesetting."""
    return tuple(_WORD.findall(_TYPESETTING.sub(" ", unicodedata.normalize("NFKC", text)).casefold()))


def find(train: Sequence[Problem], evaluation: Mapping[str, Sequence[Problem]]) -> list[Overlap]:
    """Every duplicate within the training set, and every overlap with a set of evaluation problems, in data order.

    A problem is listed once for each set, under the first problem that it is the same as, else overlaps most.
    """
    texts = [words(problem.bare or problem.prompt) for problem in train]
    found = list(_duplicates(train, texts))
    for name, problems in evaluation.items():
        found += _overlaps(train, texts, name, problems)
    return sorted(found, key=lambda it: (it.problem, it.where))


def _duplicates(train: Sequence[Problem], texts: Sequence[tuple[str, ...]]) -> list[Overlap]:
    first: dict[tuple[str, ...], int] = {}
    pairs = [(problem.id, first.setdefault(text, problem.id)) for problem, text in zip(train, texts, strict=True)]
    return [Overlap(mine, earlier, TRAINING, True) for mine, earlier in pairs if mine != earlier]


def _overlaps(
    train: Sequence[Problem], texts: Sequence[tuple[str, ...]], name: str, problems: Sequence[Problem]
) -> list[Overlap]:
    whole: dict[tuple[str, ...], int] = {}
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    runs: dict[int, int] = {}
    for problem in problems:
        text = words(problem.bare or problem.prompt)  # as it may stand in a training set, without options
        whole.setdefault(text, problem.id)
        mine = _runs(text)
        runs[problem.id] = len(mine)
        for run in mine:
            holders[run].append(problem.id)
    out = []
    for problem, text in zip(train, texts, strict=True):
        if text in whole:
            out.append(Overlap(problem.id, whole[text], name, True))
            continue
        shared: dict[int, int] = defaultdict(int)
        for run in _runs(text):
            for other in holders.get(run, ()):
                shared[other] += 1
        near = [(count / runs[other], -other) for other, count in shared.items() if count >= SHARE * runs[other]]
        if near:
            out.append(Overlap(problem.id, -max(near)[1], name, False))
    return out


def _runs(text: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {text[i : i + RUN] for i in range(len(text) - RUN + 1)}
