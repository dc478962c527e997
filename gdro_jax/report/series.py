"""Curves over rollouts: runs of one method aligned by step, with the mean and spread over seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gdro_jax.report.runs import Run, RunError
from gdro_jax.report.scores import curves
from gdro_jax.report.statistics import moving_mean, nan_mean, nan_spread


@dataclass(frozen=True, kw_only=True)
class Series:
    """A method's curve: rollouts x[N], mean[N] and spread[N] (or [N, B]) over seeds; NaN is a gap."""

    x: np.ndarray
    mean: np.ndarray
    spread: np.ndarray

    @property
    def empty(self) -> bool:
        return not np.isfinite(self.mean).any()


def per_step(runs: Sequence[Run], *path: str) -> Series:
    """A scalar of every record, averaged over seeds at equal steps and then over a window of a fortieth of the run."""
    series = _aligned(runs, lambda run: run.scalars(*path), lambda run: np.arange(len(run.records)))
    window = max(1, series.x.size // 40)
    return Series(
        x=series.x,
        mean=moving_mean(series.mean, window),
        spread=moving_mean(series.spread, window),
    )


def per_bin(runs: Sequence[Run], *path: str, relative: bool = False) -> Series:
    """A [B] list of every training record, averaged over seeds; leading records without it (step 0) are dropped.

    `relative` divides each run's by its own `batch_mean` first: seeds have other prompts in a bin.
    Raises RunError where runs of the method have different numbers of bins.
    """
    widths = {run.vectors(*path).shape[1] for run in runs} - {0}
    if len(widths) > 1:
        names = ", ".join(run.folder.name for run in runs)
        raise RunError(f"{names}: {'.'.join(path)} has {sorted(widths)} bins in runs of one method")
    having = [run for run in runs if run.vectors(*path).shape[1]]
    if not having:
        return Series(x=np.empty(0), mean=np.empty((0, 0)), spread=np.empty((0, 0)))

    def values(run: Run) -> np.ndarray:
        found = run.vectors(*path)
        if not relative:
            return found
        mean = batch_mean(run, *path)[:, None]
        return found / np.where(mean > 0, mean, np.nan)

    return _aligned(having, values, lambda run: np.flatnonzero(run.steps > 0))


def batch_mean(run: Run, *path: str) -> np.ndarray:
    """float[N]: a record's [B] list as a mean over the step's prompts, over the bins where shares are not logged."""
    found, share = run.vectors(*path), run.vectors("bins", "share")
    if share.shape != found.shape:
        return nan_mean(found, 1)
    mass = np.where(np.isfinite(found) & np.isfinite(share), share, 0.0)
    total = mass.sum(axis=1)
    return np.where(total > 0, (mass * np.nan_to_num(found)).sum(axis=1) / np.where(total > 0, total, 1), np.nan)


def per_evaluation(runs: Sequence[Run], measure: str, stratum: str | None = None) -> Series:
    """A measure of each evaluation, averaged over seeds: one of MEASURES, or a stratum's "mean" or "pass"."""

    def values(run: Run) -> np.ndarray:
        full = np.full(len(run.records), np.nan)
        found = curves(run)
        picked = found.measures[measure] if stratum is None else found.strata.get((stratum, measure))
        if picked is not None:
            full[found.at] = picked
        return full

    return _aligned(runs, values, lambda run: run.evaluated)


def _aligned(runs: Sequence[Run], values: Callable[[Run], np.ndarray], records: Callable[[Run], np.ndarray]) -> Series:
    chosen = [
        (run.steps[at], run.scalars("ledger", "rollouts")[at], values(run)[at])
        for run in runs
        for at in (records(run),)
    ]
    steps = np.unique(np.concatenate([its_steps for its_steps, _, _ in chosen]))
    width = chosen[0][2].shape[1:]
    x = np.full((len(runs), steps.size), np.nan)
    y = np.full((len(runs), steps.size, *width), np.nan)
    for row, (its_steps, spent, its) in enumerate(chosen):
        columns = np.searchsorted(steps, its_steps)
        x[row, columns], y[row, columns] = spent, its
    return Series(x=nan_mean(x, 0), mean=nan_mean(y, 0), spread=nan_spread(y, 0))
