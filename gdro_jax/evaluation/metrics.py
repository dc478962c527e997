"""What an evaluation reports: unbiased pass@k, mean@k, maj@k, strata, the worst one, and intervals over prompts.

All on the host in float64; N is the number of prompts.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
LEVEL = 0.95
SUBSETS = 256
"""Most choices of k samples that maj@k looks at."""
_CHUNK = 2_000_000  # most resampled indices held at once


class Interval(NamedTuple):
    """Two ends of an interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """A mean paired difference and its bootstrap interval over prompts."""

    mean: float
    low: float
    high: float


# Estimators ---------------------------------------------------------------------------------------------------------
def pass_at_k(num_correct: ArrayLike, num_samples: ArrayLike, k: int) -> NDArray[np.float64]:
    """Unbiased pass@k, 1 - C(n-c, k) / C(n, k) (Chen et al., arXiv 2107.03374), as a product of k ratios: no overflow.

    Args:
        num_correct: int[N], right samples c.
        num_samples: int[N], samples n, each at least k.
        k: at least 1.

    Returns:
        float64[N], the chance that k samples drawn without replacement hold a right one.

    Raises:
        ValueError: k < 1 or no whole number, c outside 0..n, or n < k (there the estimator does not exist).
    """
    correct, samples = _counts(num_correct, num_samples)
    _check_k(k)
    if samples.size and int(samples.min()) < k:
        raise ValueError(f"num_samples: {int(samples.min())} is fewer than k = {k}; pass@k needs at least k samples")
    drawn = np.arange(k, dtype=np.float64)
    wrong = np.maximum((samples - correct)[..., None] - drawn, 0.0)
    return np.asarray(1.0 - np.prod(wrong / (samples[..., None] - drawn), axis=-1), dtype=np.float64)


def mean_at_k(num_correct: ArrayLike, num_samples: ArrayLike) -> NDArray[np.float64]:
    """Mean accuracy of each prompt's samples: float64[N].

    Raises:
        ValueError: c outside 0..n, or a prompt with no sample.
    """
    correct, samples = _counts(num_correct, num_samples)
    if samples.size and int(samples.min()) < 1:
        raise ValueError("num_samples: 0 is not allowed; every prompt needs at least 1 sample")
    return correct / samples


def maj_at_k(
    answers: Sequence[Sequence[str | None]], right: Sequence[Sequence[bool]], k: int | None = None
) -> NDArray[np.float64]:
    """Accuracy of the most frequent answer of each prompt: float64[N]; tied answers share it equally.

    Args:
        answers: the extracted answers of each prompt's samples; None casts no vote. Those that are right are one
            answer, however they are spelled.
        right: whether each of these samples was graded right.
        k: how many of the samples vote, None for all. The mean over all choices of k, or over ``SUBSETS`` of them drawn
            with a fixed seed where there are more, which leaves it unbiased; NaN for a prompt with fewer samples.

    Raises:
        ValueError: k < 1 or no whole number, or a prompt with more answers than grades, or fewer.
    """
    if k is not None:
        _check_k(k)
    return np.array([_majority(*votes, k) for votes in zip(answers, right, strict=True)], dtype=np.float64)


def cvar(values: ArrayLike, share: float) -> float:
    """Mean over the worst ``share`` (in (0, 1]) of the prompts, the last one of them counted in part."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share: {share!r} is not allowed; it must be in (0, 1]")
    ordered = np.sort(_values(values))
    mass = share * ordered.size
    taken = np.clip(mass - np.arange(ordered.size), 0.0, 1.0)
    return float(ordered @ taken / mass)


# Intervals ----------------------------------------------------------------------------------------------------------
def bootstrap_interval(
    values: ArrayLike, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean of float[N], prompts resampled with replacement; seeded.

    Raises:
        ValueError: no value, a value that is not finite, ``resamples`` < 1 or ``level`` outside (0, 1).
    """
    sample = _values(values)
    if resamples < 1:
        raise ValueError(f"resamples: {resamples!r} is not allowed; it must be at least 1")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: {level!r} is not allowed; it must be in (0, 1)")
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // sample.size)
    means = np.concatenate(
        [
            sample[rng.integers(0, sample.size, (min(chunk, resamples - done), sample.size))].mean(axis=1)
            for done in range(0, resamples, chunk)
        ]
    )
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(low), float(high))


def paired_difference(
    values: ArrayLike, baseline: ArrayLike, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Difference:
    """Mean of ``values - baseline`` (float[N] each, the same prompts in the same order) and its interval over prompts.

    Raises:
        ValueError: unlike lengths, or as in ``bootstrap_interval``.
    """
    ours, theirs = _values(values), _values(baseline)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"baseline: {theirs.size} prompts against {ours.size}; a paired difference needs the same ones"
        )
    low, high = bootstrap_interval(ours - theirs, resamples=resamples, level=level, seed=seed)
    return Difference(float(np.mean(ours - theirs)), low, high)


# Small pieces -------------------------------------------------------------------------------------------------------
def _counts(num_correct: ArrayLike, num_samples: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    correct, samples = np.broadcast_arrays(np.asarray(num_correct), np.asarray(num_samples))
    for name, array in (("num_correct", correct), ("num_samples", samples)):
        if array.size and not np.all(np.mod(array, 1) == 0):
            raise ValueError(f"{name}: a value is not a whole number; counts are needed")
    outside = (correct < 0) | (correct > samples)
    if outside.any():
        worst = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"num_correct: {correct.flat[worst]} of {samples.flat[worst]} samples is not allowed; "
            "it must be in 0..num_samples"
        )
    return correct.astype(np.int64), samples.astype(np.int64)


def _check_k(k: int) -> None:
    if k < 1 or k % 1:
        raise ValueError(f"k: {k!r} is not allowed; it must be a whole number of at least 1")


def _values(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"values: shape {array.shape} is not allowed; one value a prompt, and at least one, is needed")
    if not np.isfinite(array).all():
        raise ValueError("values: one of them is not finite; leave such prompts out")
    return array


def _majority(answers: Sequence[str | None], right: Sequence[bool], k: int | None) -> float:
    n = len(answers)
    size = n if k is None else k
    if size > n:
        return math.nan
    if not n:
        return 0.0
    known: dict[str, int] = {}
    named = zip(answers, right, strict=True)
    # 0 is the right answer, 1 no vote, and every other answer has a number of its own.
    ids = np.array([0 if good else 1 if it is None else known.setdefault(it, len(known) + 2) for it, good in named])
    if math.comb(n, size) <= SUBSETS:
        chosen = np.array(list(itertools.combinations(range(n), size)))
    else:
        chosen = np.random.default_rng(0).random((SUBSETS, n)).argsort(axis=1)[:, :size]
    kinds = len(known) + 2
    cells = np.arange(len(chosen))[:, None] * kinds + ids[chosen]
    counts = np.bincount(cells.ravel(), minlength=len(chosen) * kinds).reshape(len(chosen), kinds)
    counts[:, 1] = 0
    most = counts.max(axis=1, keepdims=True)
    winners = (counts == most) & (most > 0)
    return float(np.mean(winners[:, 0] / np.maximum(winners.sum(axis=1), 1)))
