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
    """
    share = record["share"]
    weighted = share * np.nan_to_num(record["weight"])
    weighted = weighted / weighted.sum() if weighted.sum() > 0 else share
    std, counts = np.nan_to_num(record["reward_std"]), np.nan_to_num(record["rollouts"], nan=float(mean_rollouts))
    wse = float(diagnostics.weighted_standard_error(share, std, np.maximum(counts, 1.0)))
    uniform = float(diagnostics.weighted_standard_error(share, std, np.full_like(counts, mean_rollouts)))
    return {
        "lead_lag": float(diagnostics.lead_lag(weighted, share)),
        "wse": wse,
        "wse_uniform": uniform,
        "wse_reduction": 1.0 - wse / uniform if uniform > 0 else 0.0,
        "effective_bins": float(diagnostics.effective_bins(weighted)),
    }


class MetricsFile:
    """Appends records to `metrics.jsonl`, each line flushed to disk before the run goes on.

    Args:
      path: the file; records after step `keep_until` (written by a run that was cut off) are removed.
    """

    def __init__(self, path: pathlib.Path, keep_until: int):
        kept = []
        if path.exists():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if _step(line) <= keep_until]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        os.replace(partial, path)
        self.steps = {json.loads(line)["step"] for line in kept}
        self._file = path.open("a")

    def write(self, record: Mapping[str, object]) -> None:
        """Adds one record; numbers that are not finite become null."""
        self._file.write(json.dumps(plain(record), allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _step(line: str) -> float:
    """The step of a line; infinity for a line that was cut off."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


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
