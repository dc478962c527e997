"""Paired differences between saved evaluations of unlike models on the same problems with the same settings."""

import pathlib
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from gdro_jax.evaluation import metrics, store
from gdro_jax.evaluation.score import PerPrompt, per_prompt
from gdro_jax.evaluation.tables import table


class Paired(TypedDict):
    """A statistic of both evaluations over the prompts that both could grade, and their paired difference."""

    prompts: int
    baseline: float
    value: float
    difference: float
    low: float
    high: float


Comparison = dict[str, dict[str, dict[str, Paired]]]
"""Folder, set, statistic (`mean`, `pass@k`, `maj`) to what was found, against the first folder."""


def compare(folders: Sequence[pathlib.Path]) -> Comparison:
    """Compares each evaluation with the first.

    Raises:
      StoreError: an evaluation that is not complete, or that was not made as the first one was.
    """
    saved = [store.read(folder) for folder in folders]
    for folder, it in zip(folders[1:], saved[1:], strict=True):
        _check_alike(folders[0], saved[0].settings, folder, it.settings)
    out: Comparison = {}
    samples = int(saved[0].settings["samples"])
    for folder, it in zip(folders[1:], saved[1:], strict=True):
        out[str(folder)] = {
            name: _paired(_grades(saved[0], name), _grades(it, name), samples) for name in saved[0].problems
        }
    return out


def format_comparison(comparison: Comparison, baseline: pathlib.Path) -> str:
    """A table a set; brackets are 95 % intervals of the paired difference over prompts."""
    blocks = []
    for name in next(iter(comparison.values())):
        head = (f"{name}, against {baseline}", "statistic", "prompts", "baseline", "value", "difference")
        rows = [
            (
                folder if number == 0 else "",
                statistic,
                str(it["prompts"]),
                f"{it['baseline']:.3f}",
                f"{it['value']:.3f}",
                f"{it['difference']:+.3f} [{it['low']:+.3f}, {it['high']:+.3f}]",
            )
            for folder, sets in comparison.items()
            for number, (statistic, it) in enumerate(sets[name].items())
        ]
        blocks.append(table(head, rows))
    return "\n\n".join(blocks)


def _check_alike(
    first: pathlib.Path, wanted: dict[str, object], folder: pathlib.Path, found: dict[str, object]
) -> None:
    unlike = [name for name, *_ in store.differences(wanted, found) if name not in store.MODEL_SETTINGS]
    if unlike:
        raise store.StoreError(
            f"{folder}: its {', '.join(unlike)} differ from those of {first}; only evaluations of the same problems "
            "with the same settings are compared"
        )


def _grades(saved: store.Saved, name: str) -> PerPrompt:
    exact = saved.settings["sets"][name]["verifier"] == "exact"
    return per_prompt(saved.problems[name], saved.responses[name], exact)


def _paired(baseline: PerPrompt, other: PerPrompt, samples: int) -> dict[str, Paired]:
    ks = sorted({1 << power for power in range(1, samples.bit_length())} | ({samples} if samples > 1 else set()))
    pairs = {"mean": (baseline.mean, other.mean)}
    pairs |= {f"pass@{k}": (baseline.passes(k), other.passes(k)) for k in ks if k <= samples}
    unscored = (baseline.scorable == 0) | (other.scorable == 0)
    pairs["maj"] = (np.where(unscored, np.nan, baseline.majority), np.where(unscored, np.nan, other.majority))
    out: dict[str, Paired] = {}
    for statistic, (before, after) in pairs.items():
        both = ~(np.isnan(before) | np.isnan(after))
        if both.any():
            found = metrics.paired_difference(after[both], before[both])
            out[statistic] = {
                "prompts": int(both.sum()),
                "baseline": float(before[both].mean()),
                "value": float(after[both].mean()),
                "difference": found.mean,
                "low": found.low,
                "high": found.high,
            }
    return out
