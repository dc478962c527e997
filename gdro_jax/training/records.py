"""A step's log record: plain numbers for one line of `metrics.jsonl`."""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gdro_jax.controllers import diagnostics

Record = dict[str, Any]  # one line of metrics.jsonl


def by_bin(values: np.ndarray, bins: np.ndarray, num_bins: int) -> np.ndarray:
    """Mean of float[P] over each bin, float64[B]; NaN values are left out, an empty bin is NaN."""
    known = np.isfinite(values)
    count = np.bincount(bins[known], minlength=num_bins)
    total = np.bincount(bins[known], weights=values[known], minlength=num_bins)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def by_stratum(values: np.ndarray, strata: Sequence[str]) -> dict[str, float]:
    """Mean of float[P] over each stratum present."""
    names = np.asarray(strata, dtype=object)
    return {name: mean(values[names == name]) for name in sorted(set(strata))}


def bin_record(
    bins: np.ndarray, weights: np.ndarray, rollouts: np.ndarray, reward: np.ndarray, variance: np.ndarray, num_bins: int
) -> dict[str, np.ndarray]:
    """Per-bin means of a step's prompts, arrays [P] in, float64[B] out.

    `reward_std` is the root of the mean variance.
    """
    return {
        "share": np.bincount(bins, minlength=num_bins) / len(bins),
        "weight": by_bin(weights, bins, num_bins),
        "rollouts": by_bin(rollouts, bins, num_bins),
        "reward": by_bin(reward, bins, num_bins),
        "reward_std": np.sqrt(by_bin(variance, bins, num_bins)),
    }


def diagnostic_record(record: Mapping[str, np.ndarray], mean_rollouts: int) -> dict[str, float]:
    """Section 8 of the method: lead-lag, weighted standard error and its reduction against uniform, effective bins.

    The weighted distribution is each bin's share of the step's total prompt weight; bins without prompts have none.
    Lead-lag and effective bins are of it; those of an adversary's own q are the rule's (`controllers.reporting`).
    Standard errors are over the bins with a prompt of two scored rollouts, which alone have a variance; NaN of none.
    """
    share = record["share"]
    weighted = share * np.nan_to_num(record["weight"])
    weighted = weighted / weighted.sum() if weighted.sum() > 0 else share
    std, counts = np.nan_to_num(record["reward_std"]), np.nan_to_num(record["rollouts"], nan=float(mean_rollouts))
    known = np.where(np.isfinite(record["reward_std"]), share, 0.0)
    wse, uniform = math.nan, math.nan
    if known.any():
        mass = known / known.sum()
        wse = float(diagnostics.weighted_standard_error(mass, std, np.maximum(counts, 1.0)))
        uniform = float(diagnostics.weighted_standard_error(mass, std, np.full_like(counts, mean_rollouts)))
    return {
        "lead_lag": float(diagnostics.lead_lag(weighted, share)),
        "wse": wse,
        "wse_uniform": uniform,
        "wse_reduction": 0.0 if uniform == 0 else 1.0 - wse / uniform,
        "effective_bins": float(diagnostics.effective_bins(weighted)),
    }


class MetricsFile:
    """Appends records to `metrics.jsonl`, each line flushed to disk before the run goes on.

    Args:
      path: the file.
      keep_until: the step of the checkpoint that the run goes on from, None where there is none. Records after it,
        written by a run that was cut off, are removed; without a checkpoint the whole file is set aside as
        `metrics.jsonl.old`.

    Attributes:
      last: the record of step `keep_until`, None if it is not there.
      steps: of the records kept.

    Raises:
      ValueError: a line that is no record, or records missing before the checkpoint.
    """

    def __init__(self, path: pathlib.Path, keep_until: int | None):
        lines = path.read_text().splitlines() if path.exists() else []
        steps = [_step(line, f"{path}:{number}", number == len(lines)) for number, line in enumerate(lines, start=1)]
        if keep_until is None and any(steps):
            os.replace(path, path.with_suffix(".jsonl.old"))
        kept = [(s, line) for s, line in zip(steps, lines, strict=True) if keep_until is not None and s <= keep_until]
        self.steps = {step for step, _ in kept}
        missing = sorted(set(range(1, keep_until or 0)) - self.steps)
        if missing:
            raise ValueError(f"{path}: holds no record of step {missing[0]}, but there is a checkpoint of {keep_until}")
        self.last = json.loads(kept[-1][1]) if kept and kept[-1][0] == keep_until else None
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for _, line in kept))
        os.replace(partial, path)
        self._file = path.open("a")

    def write(self, record: Mapping[str, object]) -> None:
        """Adds one record; numbers that are not finite become null."""
        self._file.write(json.dumps(plain(record), allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _step(line: str, where: str, last: bool) -> float:
    """The step of a line; infinity for a last line that was cut off."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        step = None
    if isinstance(step, int):
        return step
    if last:
        return math.inf
    raise ValueError(f"{where}: not a record of a step; mend or delete the line to go on")


def plain(value: object) -> object:
    """Nested plain JSON values; arrays become lists, numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    array = np.asarray(value)
    if array.ndim:
        return [plain(v) for v in array.tolist()]
    number = array.item()
    return number if not isinstance(number, float) or math.isfinite(number) else None


def mean(values: np.ndarray) -> float:
    """Mean of the finite values of float[P]; NaN where there is none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan
