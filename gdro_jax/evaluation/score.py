"""Everything reported about one set of problems: mean@n, pass@k for every k, maj@n, levels, subjects, the worst, CVaR.

Each number comes with a bootstrap interval over prompts. A prompt with fewer than k responses that could be graded is
left out of pass@k alone; one with none is left out altogether and counted.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from gdro_jax.data.sources import Problem
from gdro_jax.evaluation import metrics
from gdro_jax.evaluation.run import Graded
from gdro_jax.evaluation.summary import NothingScorableError
from gdro_jax.rewards.boxed import AnswerTooLong, last_boxed

TAILS = (0.1, 0.25)
"""Shares of the prompts that CVaR averages over, the worst ones."""

_SPACE = re.compile(r"\\[,;:! ]|\\(?:left|right)(?![A-Za-z])|\$|\s+")


class Value(TypedDict):
    """A number and its interval over prompts."""

    value: float
    low: float
    high: float


class Stratum(TypedDict):
    """Problems of one level or subject."""

    problems: int
    mean: Value
    best: Value | None


class Worst(Stratum):
    """The stratum of the lowest mean, and whether it is a level, a subject or another stratum."""

    by: str
    name: str


class Score(TypedDict):
    """What ``score`` returns; plain Python numbers, ready for JSON."""

    problems: int
    samples: int
    left_out: int
    unscorable: float
    clipped: float
    tokens_per_response: float
    mean: Value
    passes: dict[str, Value]
    majority: Value
    majorities: dict[str, Value]
    cvar: dict[str, Value]
    strata: dict[str, dict[str, Stratum]]
    worst: Worst | None


class PerPrompt(NamedTuple):
    """Grades of N prompts: right and scorable counts int64[N], and what each scorable response voted for and was."""

    correct: NDArray[np.int64]
    scorable: NDArray[np.int64]
    votes: Sequence[Sequence[str | None]]
    right: Sequence[Sequence[bool]]

    @property
    def majority(self) -> NDArray[np.float64]:
        """Accuracy of the vote of all scorable responses, float64[N]."""
        return self.majority_of(None)

    def majority_of(self, k: int | None) -> NDArray[np.float64]:
        """maj@k, float64[N], NaN where fewer than k responses could be graded."""
        return metrics.maj_at_k(self.votes, self.right, k)

    @property
    def mean(self) -> NDArray[np.float64]:
        """float64[N], NaN where nothing could be graded."""
        return np.where(self.scorable > 0, self.correct / np.maximum(self.scorable, 1), np.nan)

    def passes(self, k: int) -> NDArray[np.float64]:
        """pass@k, float64[N], NaN where fewer than k responses could be graded."""
        enough = self.scorable >= k
        out = np.full(self.correct.shape, np.nan)
        out[enough] = metrics.pass_at_k(self.correct[enough], self.scorable[enough], k)
        return out


def per_prompt(problems: Sequence[Problem], rows: Sequence[Graded], whole_response: bool) -> PerPrompt:
    """Counts and votes of each prompt, in the order of ``problems``.

    Args:
        whole_response: votes are whole responses (the exact verifier), else what the last box holds.
    """
    place = {problem.id: n for n, problem in enumerate(problems)}
    correct, scorable = np.zeros(len(place), np.int64), np.zeros(len(place), np.int64)
    votes: list[list[str | None]] = [[] for _ in place]
    right: list[list[bool]] = [[] for _ in place]
    for row in rows:
        n = place[row.problem]
        correct[n] += row.scorable and row.score > 0
        scorable[n] += row.scorable
        if row.scorable:
            votes[n].append(_vote(row.response, whole_response))
            right[n].append(row.score > 0)
    return PerPrompt(correct, scorable, votes, right)


def score(problems: Sequence[Problem], rows: Sequence[Graded], samples: int, *, whole_response: bool = False) -> Score:
    """Scores a set.

    Args:
        problems: all N of them.
        rows: their graded responses, in any order.
        samples: responses to each problem, n.

    Raises:
        NothingScorableError: not one response could be graded.
    """
    graded = per_prompt(problems, rows, whole_response)
    if not graded.scorable.any():
        raise NothingScorableError("no response could be graded")
    some = graded.scorable > 0
    mean = graded.mean
    passes = np.stack([graded.passes(k) for k in range(1, samples + 1)], axis=1)
    intervals = bootstrap(passes[some], _nanmeans)
    ks = powers_up_to(samples)
    majorities = bootstrap(np.stack([graded.majority_of(k) for k in ks], axis=1)[some], _nanmeans)
    strata = {
        kind: _strata([getattr(problem, kind) for problem in problems], mean, passes[:, -1])
        for kind in ("level", "subject", "stratum")
    }
    if strata["level"] or strata["subject"]:
        del strata["stratum"]  # a published set's stratum is one of these
    return {
        "problems": len(problems),
        "samples": samples,
        "left_out": int((~some).sum()),
        "unscorable": float(np.mean([not row.scorable for row in rows])),
        "clipped": float(np.mean([not row.finished for row in rows])),
        "tokens_per_response": float(np.mean([row.tokens for row in rows])),
        "mean": _mean(mean[some]),
        "passes": {str(k + 1): value for k, value in enumerate(intervals) if value is not None},
        "majority": _mean(graded.majority[some]),
        "majorities": {str(k): value for k, value in zip(ks, majorities, strict=True) if value is not None},
        "cvar": {f"{share:g}": _value(bootstrap(mean[some], partial(_cvars, share=share))[0]) for share in TAILS},
        "strata": {kind: groups for kind, groups in strata.items() if groups},
        "worst": _worst(strata),
    }


def powers_up_to(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples."""
    return sorted({1 << power for power in range(samples.bit_length())} | {samples})


# Intervals ----------------------------------------------------------------------------------------------------------
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def bootstrap(
    values: NDArray[np.float64], statistic: Statistic, *, resamples: int = metrics.RESAMPLES, seed: int = 0
) -> list[Value | None]:
    """Percentile intervals of K statistics over N prompts, resampled with replacement, the same for all K.

    Args:
        values: float64[N] or float64[N, K].
        statistic: from float64[S, N, ...] to float64[S, K] or float64[S].

    Returns:
        One value each; None where the statistic does not exist.
    """
    point = np.atleast_2d(statistic(values[None]).T).T[0]
    rng, size = np.random.default_rng(seed), len(values)
    chunk = max(1, 500_000 // max(values.size, 1))
    draws = []
    for done in range(0, resamples, chunk):
        taken = values[rng.integers(0, size, (min(chunk, resamples - done), size))]
        draws.append(np.atleast_2d(statistic(taken).T).T)
    drawn, tail = np.concatenate(draws), (1.0 - metrics.LEVEL) / 2.0
    out: list[Value | None] = []
    for k, number in enumerate(point):
        if not np.isfinite(number):
            out.append(None)
            continue
        low, high = np.nanquantile(drawn[:, k], [tail, 1.0 - tail])
        out.append({"value": float(number), "low": float(low), "high": float(high)})
    return out


def _nanmeans(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over axis 1 of what is not NaN; NaN where nothing is."""
    there = ~np.isnan(values)
    count = there.sum(axis=1)
    total = np.where(there, values, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _cvars(values: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """``metrics.cvar`` of each row."""
    mass = share * values.shape[1]
    taken = np.clip(mass - np.arange(values.shape[1]), 0.0, 1.0)
    return np.sort(values, axis=1) @ taken / mass


def _mean(values: NDArray[np.float64]) -> Value:
    return _value(bootstrap(values, _nanmeans)[0])


def _value(value: Value | None) -> Value:
    assert value is not None
    return value


# Strata -------------------------------------------------------------------------------------------------------------
def _strata(names: Sequence[str], mean: NDArray[np.float64], best: NDArray[np.float64]) -> dict[str, Stratum]:
    out: dict[str, Stratum] = {}
    labels = np.array(names, dtype=object)
    for name in sorted(set(names) - {""}):
        mine = (labels == name) & ~np.isnan(mean)
        if mine.any():
            top = bootstrap(best[mine], _nanmeans)[0]
            out[name] = {"problems": int(mine.sum()), "mean": _mean(mean[mine]), "best": top}
    return out


def _worst(strata: dict[str, dict[str, Stratum]]) -> Worst | None:
    """The stratum of the lowest mean among all levels and subjects."""
    found = [(group["mean"]["value"], kind, name) for kind, groups in strata.items() for name, group in groups.items()]
    if len(found) < 2:
        return None
    _, kind, name = min(found)
    lowest = strata[kind][name]
    return Worst(by=kind, name=name, problems=lowest["problems"], mean=lowest["mean"], best=lowest["best"])


def _vote(response: str, whole: bool) -> str | None:
    """What a response votes for, spelled plainly: equal spellings are one answer, unlike ones are not compared."""
    try:
        answer = response if whole else last_boxed(response)
    except AnswerTooLong:
        return None
    if answer is None:
        return None
    return _SPACE.sub("", answer).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac") or None
