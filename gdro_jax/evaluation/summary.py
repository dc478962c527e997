"""The summary of an evaluation: overall, by stratum, the worst stratum, each with an interval over its prompts."""

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gdro_jax.evaluation.metrics import LEVEL, RESAMPLES, bootstrap_interval, mean_at_k, pass_at_k

Stats = TypedDict(
    "Stats",
    {
        "mean": float,
        "pass": float | None,
        "n": int,
        "mean_interval": NotRequired[list[float]],
        "pass_interval": NotRequired[list[float] | None],
    },
)
"""mean@samples, pass@k (None where no prompt has k scorable samples), prompts, and their intervals."""


class NothingScorableError(ValueError):
    """Not one response of an evaluation could be graded; its text is one line."""


class Worst(TypedDict):
    """The stratum of the lowest mean."""

    stratum: str
    mean: float


class Summary(TypedDict):
    """What ``summarise`` returns; plain Python numbers, ready for JSON."""

    k: int
    samples: int
    overall: Stats
    strata: dict[str, Stats]
    worst: Worst
    left_out: int


def summarise(
    num_correct: ArrayLike,
    num_samples: ArrayLike,
    strata: Sequence[str],
    k: int,
    *,
    intervals: bool = True,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Summary:
    """Summarise the grades of N prompts.

    Args:
        num_correct: int[N], right samples.
        num_samples: int[N], scorable samples; a prompt with none is left out (``left_out`` counts them), one with fewer
            than k is left out of pass@k alone. ``samples`` in the result is the largest of these counts.
        strata: N names.
        k: the k of pass@k.
        intervals: False leaves the bootstrap out, as within training.

    Raises:
        ValueError: unlike lengths or bad counts.
        NothingScorableError: no prompt with a scorable sample.
    """
    correct, samples = np.asarray(num_correct), np.asarray(num_samples)
    names = np.asarray(list(strata), dtype=object)
    if not correct.shape == samples.shape == names.shape:
        raise ValueError(
            f"num_correct, num_samples, strata: {correct.size}, {samples.size} and {names.size} prompts; "
            "as many of each are needed"
        )
    scored = samples > 0
    if not scored.any():
        raise NothingScorableError("no response could be graded: no prompt has a scorable sample")

    def stats(chosen: NDArray[np.bool_]) -> Stats:
        return _stats(correct[chosen], samples[chosen], k, intervals, resamples, level, seed)

    by_stratum = {name: stats(scored & (names == name)) for name in sorted(set(names[scored]))}
    worst = min(by_stratum, key=lambda name: by_stratum[name]["mean"])
    return {
        "k": k,
        "samples": int(samples.max()),
        "overall": stats(scored),
        "strata": by_stratum,
        "worst": {"stratum": worst, "mean": by_stratum[worst]["mean"]},
        "left_out": int((~scored).sum()),
    }


def _stats(
    correct: NDArray[Any],
    samples: NDArray[Any],
    k: int,
    intervals: bool,
    resamples: int,
    level: float,
    seed: int,
) -> Stats:
    means = mean_at_k(correct, samples)
    enough = samples >= k
    passes = pass_at_k(correct[enough], samples[enough], k)
    stats: Stats = {"mean": float(means.mean()), "pass": float(passes.mean()) if passes.size else None, "n": means.size}
    if intervals:
        stats["mean_interval"] = list(bootstrap_interval(means, resamples=resamples, level=level, seed=seed))
        stats["pass_interval"] = (
            list(bootstrap_interval(passes, resamples=resamples, level=level, seed=seed)) if passes.size else None
        )
    return stats


def format_summary(summary: Summary) -> str:
    """A plain-text table: a line a stratum, the worst first, then all problems; intervals are 95 % over problems."""
    name_width = max(len(name) for name in (*summary["strata"], "all problems"))
    head = f"{'':{name_width}}  problems  {'mean@1':>22}  {'pass@' + str(summary['k']):>22}"
    rows = sorted(summary["strata"].items(), key=lambda item: item[1]["mean"])
    rows.append(("all problems", summary["overall"]))
    lines = [f"{name:{name_width}}  {stats['n']:>8}  {_cells(stats)}" for name, stats in rows]
    return "\n".join([head, *lines])


def _cells(stats: Stats) -> str:
    def cell(value: float | None, interval: list[float] | None) -> str:
        if value is None:
            return f"{'-':>22}"
        return f"{value:>7.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "").rjust(15)

    mean = cell(stats["mean"], stats.get("mean_interval"))
    return f"{mean}  {cell(stats['pass'], stats.get('pass_interval'))}"
