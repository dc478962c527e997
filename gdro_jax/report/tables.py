"""The tables of a report: final scores per method with paired differences from the baseline, and what was refused."""

from collections.abc import Mapping, Sequence

from gdro_jax.report.checks import check, same_budget, same_problems
from gdro_jax.report.runs import Run
from gdro_jax.report.scores import (
    MEASURES,
    Curves,
    by_method,
    curves,
    hardest_first,
    pass_label,
    rollouts_at_end,
    stratum_names,
)
from gdro_jax.report.statistics import Difference, mean_and_spread, paired_difference
from gdro_jax.report.style import BASELINE, display_name

Row = dict[str, object]


def table(runs: Sequence[Run]) -> list[Row]:
    """One row per method, the baseline first.

    Keys: `method`, `name`, `seeds` (list); for each measure m of `mean`, `pass`, `worst_mean`, `worst_pass` the final
    score's mean over seeds `m`, its sample standard deviation `m_spread`, and `m_difference`, a `Difference` from the
    baseline with its 95 % Student t interval, paired over seeds; `worst_stratum` (by mean@1); `rollouts`, `tokens`,
    `seconds` (means over seeds) and `steps` (most steps of a seed); `budget_matched`.
    Scores are fractions in [0, 1]; None where there is nothing. A pair of unequal rollout budgets is no comparison:
    with one such pair the method's differences are None and `budget_matched` is False. Nor is one whose final scores
    are of unequal numbers of problems.
    """
    groups = by_method(runs)
    scores = {method: {run.seed: curves(run) for run in its} for method, its in groups.items()}
    return [_row(method, its, groups.get(BASELINE, []), scores) for method, its in groups.items()]


def strata_table(runs: Sequence[Run]) -> list[Row]:
    """One row per (stratum, method), hardest stratum first.

    Keys: `stratum`, `problems`, `method`, `name`, and for m of `mean`, `pass`: `m`, `m_spread`,
    `m_difference`, as in `table`.
    """
    groups = by_method(runs)
    scores = {method: {run.seed: curves(run) for run in its} for method, its in groups.items()}
    rows: list[Row] = []
    for stratum in hardest_first(runs):
        problems = next((n for run in runs if (n := run.last("eval", "strata", stratum, "n")) is not None), None)
        for method, its in groups.items():
            row: Row = {"stratum": stratum, "problems": problems, "method": method, "name": display_name(method)}
            baseline = groups.get(BASELINE, [])
            comparable = same_budget(its, baseline) and same_problems(its, baseline)
            for part in ("mean", "pass"):
                finals = {
                    name: {seed: one.final_stratum(stratum, part) for seed, one in scores[name].items()}
                    for name in {method, BASELINE} & set(scores)
                }
                row |= _summary(part, method, finals, comparable)
            rows.append(row)
    return rows


def _row(method: str, its: Sequence[Run], baseline: Sequence[Run], scores: Mapping[str, Mapping[int, Curves]]) -> Row:
    matched = same_budget(its, baseline)
    comparable = matched and same_problems(its, baseline)
    row: Row = {"method": method, "name": display_name(method), "seeds": [run.seed for run in its]}
    for measure in MEASURES:
        finals = {
            name: {seed: one.final(measure) for seed, one in scores[name].items()}
            for name in {method, BASELINE} & set(scores)
        }
        row |= _summary(measure, method, finals, comparable)
    row["worst_stratum"] = _worst_stratum(its, scores[method])
    row["rollouts"] = mean_and_spread([rollouts_at_end(run) for run in its])[0]
    for cost in ("tokens", "seconds"):
        row[cost] = mean_and_spread([run.last("ledger", cost) for run in its])[0]
    row["steps"] = max(run.num_steps for run in its)
    row["budget_matched"] = matched
    return row


def _summary(measure: str, method: str, finals: Mapping[str, Mapping[int, float | None]], comparable: bool) -> Row:
    mean, spread = mean_and_spread(list(finals[method].values()))
    compared = comparable and method != BASELINE and BASELINE in finals
    difference = paired_difference(finals[method], finals[BASELINE]) if compared else None
    return {measure: mean, f"{measure}_spread": spread, f"{measure}_difference": difference}


def _worst_stratum(its: Sequence[Run], scores: Mapping[int, Curves]) -> str | None:
    """The stratum whose final mean@1, averaged over seeds, is least."""
    means = {
        name: mean
        for name in stratum_names(its)
        if (mean := mean_and_spread([one.final_stratum(name, "mean") for one in scores.values()])[0]) is not None
    }
    return min(means, key=lambda name: means[name]) if means else None


def format_table(runs: Sequence[Run]) -> str:
    """The table as plain text for a terminal: warnings, scores, paired differences from the baseline."""
    label = pass_label(runs)
    rows = table(runs)
    titles = ["mean@1", label, "worst mean@1", f"worst {label}"]
    lines = [f"WARNING: {warning}" for warning in check(runs)]
    if lines:
        lines.append("")
    scores = [["method", "seeds", *titles, "rollouts", "tokens", "time"]]
    for row in rows:
        cells = [score(row[measure], row[f"{measure}_spread"]) for measure in MEASURES]
        costs = [amount(row["rollouts"]), amount(row["tokens"]), duration(row["seconds"])]
        scores.append([str(row["name"]), str(len(_list(row["seeds"]))), *cells, *costs])
    lines += _columns(scores)
    rivals = [row for row in rows if any(row[f"{measure}_difference"] is not None for measure in MEASURES)]
    if rivals:
        lines += ["", f"difference from {display_name(BASELINE)}, paired over seeds [95 % interval]"]
        cells_of = [[difference(row[f"{measure}_difference"]) for measure in MEASURES] for row in rivals]
        lines += _columns(
            [["method", *titles], *([str(row["name"]), *c] for row, c in zip(rivals, cells_of, strict=True))]
        )
    return "\n".join(lines)


def score(value: object, spread: object = None) -> str:
    """0.412 ±0.013; a dash where there is nothing."""
    if not isinstance(value, float):
        return "-"
    return f"{value:.3f}" + (f" ±{spread:.3f}" if isinstance(spread, float) else "")


def difference(value: object) -> str:
    """+0.031 [+0.002, +0.060]; without brackets where there is but one pair."""
    if not isinstance(value, Difference):
        return "-"
    if value.low is None or value.high is None:
        return _signed(value.mean)
    return f"{_signed(value.mean)} [{_signed(value.low)}, {_signed(value.high)}]"


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: no minus before a zero


def amount(value: object) -> str:
    """12,345 below a million, then 1.23 M, 4.56 G."""
    if not isinstance(value, (int, float)):
        return "-"
    for factor, unit in ((1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:,.0f}"


def duration(value: object) -> str:
    """42 s, 3 min 05 s, 2 h 07 min."""
    if not isinstance(value, (int, float)):
        return "-"
    seconds = round(value)
    if seconds < 60:
        return f"{value:.1f} s" if value < 10 else f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [text[0], "─" * len(text[0]), *text[1:]]


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value
