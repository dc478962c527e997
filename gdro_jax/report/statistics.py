"""The few statistics of a report: mean and spread over seeds, paired intervals, moving means that keep gaps."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean paired difference; `low` and `high` are None where fewer than two pairs exist."""

    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def clear_of_zero(self) -> bool:
        """True where an interval exists and 0 lies outside it."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1) of what is not None; the latter None below two values."""
    found = np.array([value for value in values if value is not None], dtype=np.float64)
    if not found.size:
        return None, None
    return float(found.mean()), float(found.std(ddof=1)) if found.size > 1 else None


def paired_difference(
    values: Mapping[int, float | None], baseline: Mapping[int, float | None], level: float = 0.95
) -> Difference | None:
    """Mean over the seeds that both have of value - baseline, with its Student t interval (pairs - 1 degrees).

    None where no seed is in both. Raises ValueError where `level` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected a number between 0 and 1")
    pairs = [(values[seed], baseline[seed]) for seed in values if seed in baseline]
    gaps = np.array([ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None])
    if not gaps.size:
        return None
    mean = float(gaps.mean())
    if gaps.size < 2:
        return Difference(mean=mean, low=None, high=None, pairs=1)
    half = float(stdtrit(gaps.size - 1, (1 + level) / 2) * gaps.std(ddof=1) / np.sqrt(gaps.size))
    return Difference(mean=mean, low=mean - half, high=mean + half, pairs=int(gaps.size))


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean of float[..., N] over `window` entries of the last axis, NaN left out; a NaN entry stays NaN."""
    if window <= 1:
        return values
    kernel = np.ones(window)
    finite = np.isfinite(values)

    def smooth(row: np.ndarray) -> np.ndarray:
        return np.convolve(row, kernel, mode="full")[(window - 1) // 2 :][: row.size]

    sums = np.apply_along_axis(smooth, -1, np.where(finite, values, 0.0))
    counts = np.apply_along_axis(smooth, -1, finite.astype(np.float64))
    return np.where(finite, sums / np.maximum(counts, 1), np.nan)


def nan_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean along an axis, NaN left out; NaN where nothing is left, without a warning."""
    finite = np.isfinite(values)
    counts = finite.sum(axis=axis)
    sums = np.where(finite, values, 0.0).sum(axis=axis)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def nan_spread(values: np.ndarray, axis: int) -> np.ndarray:
    """Sample standard deviation along an axis, NaN left out; NaN below two values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return (
            np.asarray(np.nanstd(values, axis=axis, ddof=1))
            if values.shape[axis] > 1
            else nan_mean(values, axis) * np.nan
        )
