"""What the evaluations of a run say: overall, per stratum and worst stratum, at the end or at one record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gdro_jax.report.runs import Run
from gdro_jax.report.style import BASELINE, ordered

MEASURES = ("mean", "pass", "worst_mean", "worst_pass")


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The evaluations of one run: float64[N] of each measure and stratum, NaN where null; `at` are record indices.

    `measures` and `strata` are of the same problems throughout: of those evaluated along the way (`eval_part`) where an
    evaluation of more says what they were. What `final` gives is of all problems of the last evaluation.
    """

    at: np.ndarray
    measures: Mapping[str, np.ndarray]
    strata: Mapping[tuple[str, str], np.ndarray]  # (stratum, "mean" or "pass") -> [N]
    final_measures: Mapping[str, np.ndarray]
    final_strata: Mapping[tuple[str, str], np.ndarray]

    def final(self, measure: str) -> float | None:
        return _last(self.final_measures[measure])

    def final_stratum(self, stratum: str, measure: str) -> float | None:
        values = self.final_strata.get((stratum, measure))
        return None if values is None else _last(values)


def curves(run: Run) -> Curves:
    """The evaluations of a run.

    `worst_mean` and `worst_pass` are the least of the strata's mean@1 and of their pass@k, each by itself and at each
    evaluation; a run that logs no strata falls back on the `worst.mean` it wrote.
    """
    at = run.evaluated
    whole = np.full(len(run.records), "eval", dtype=object)
    part = np.array(["eval_part" if isinstance(r.get("eval_part"), Mapping) else "eval" for r in run.records], object)
    measures, strata = _scores(run, part[at])
    final_measures, final_strata = _scores(run, whole[at])
    return Curves(at=at, measures=measures, strata=strata, final_measures=final_measures, final_strata=final_strata)


def _scores(run: Run, source: np.ndarray) -> tuple[dict[str, np.ndarray], dict[tuple[str, str], np.ndarray]]:
    """Measures and strata, each evaluation read from the summary that `source` [N] names."""

    def read(*path: str) -> np.ndarray:
        found = {name: run.scalars(name, *path)[run.evaluated] for name in dict.fromkeys(source)}
        return np.array([found[name][i] for i, name in enumerate(source)], dtype=np.float64)

    strata = {(name, kind): read("strata", name, kind) for name in run.strata for kind in ("mean", "pass")}
    measures = {kind: read("overall", kind) for kind in ("mean", "pass")}
    for kind in ("mean", "pass"):
        rows = [values for (_, its_kind), values in strata.items() if its_kind == kind]
        if rows:
            stacked = np.stack(rows)
            least = np.where(np.isfinite(stacked), stacked, np.inf).min(axis=0)
            measures[f"worst_{kind}"] = np.where(np.isfinite(least), least, np.nan)
        else:
            measures[f"worst_{kind}"] = read("worst", kind)
    return measures, strata


def base(run: Run) -> Run | None:
    """The run cut down to its evaluation before training (step 0), None where it has none."""
    if run.steps[0] != 0 or 0 not in run.evaluated:
        return None
    return Run(
        folder=run.folder,
        method=run.method,
        seed=run.seed,
        config=run.config,
        records=run.records[:1],
        lines=run.lines[:1],
    )


def stratum_names(runs: Sequence[Run]) -> list[str]:
    """Every stratum that any run was evaluated on, in the order of first appearance."""
    return list(dict.fromkeys(name for run in runs for name in run.strata))


def hardest_first(runs: Sequence[Run]) -> list[str]:
    """The strata sorted by mean@1 of the base, of the baseline's end where no base was evaluated, hardest first."""
    bases = [found for run in runs if (found := base(run)) is not None]
    ends = [run for run in runs if run.method == BASELINE] or list(runs)
    measured = [curves(run) for run in bases or ends]

    def level(name: str) -> float:
        found = [value for one in measured if (value := one.final_stratum(name, "mean")) is not None]
        return float(np.mean(found)) if found else float("inf")

    return sorted(stratum_names(runs), key=level)


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs under their methods: the baseline first, seeds ascending."""
    return {
        method: sorted((run for run in runs if run.method == method), key=lambda run: run.seed)
        for method in ordered(run.method for run in runs)
    }


def pass_label(runs: Sequence[Run]) -> str:
    """ "pass@8", with the k of the evaluations; "pass@k" where none says it or they differ."""
    found = {k for run in runs if (k := run.last("eval", "k")) is not None}
    return f"pass@{int(found.pop())}" if len(found) == 1 else "pass@k"


def rollouts_at_end(run: Run) -> float | None:
    """Training rollouts spent, by the run's ledger."""
    return run.last("ledger", "rollouts")


def rollouts_at_score(run: Run) -> float | None:
    """Training rollouts spent when the last evaluation was made; those at the end for a run without evaluations."""
    at = run.evaluated
    spent = run.scalars("ledger", "rollouts")
    value = spent[at[-1]] if at.size else np.nan
    return float(value) if np.isfinite(value) else rollouts_at_end(run)


def problems_at_score(run: Run) -> float | None:
    """Problems of the last evaluation, those without a scorable response too; None where it does not say."""
    at = run.evaluated
    if not at.size:
        return None
    scored, left_out = (run.scalars("eval", *path)[at[-1]] for path in (("overall", "n"), ("left_out",)))
    return float(scored + np.nan_to_num(left_out)) if np.isfinite(scored) else None


def _last(values: np.ndarray) -> float | None:
    """The last evaluation's value; None where it is null: an earlier one would be another budget's score."""
    return float(values[-1]) if values.size and np.isfinite(values[-1]) else None
