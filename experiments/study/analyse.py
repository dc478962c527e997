"""Turns the study's run folders into `results/`: tables with paired intervals, curves, rollouts to reach a level.

    python experiments/study/analyse.py RUNS [RUNS ...] --base BASE_SUMMARY.json [--out experiments/study/results]
        [--against METHOD=BASELINE ...]

RUNS are folders of `gdro compare`; BASE_SUMMARY is `summary.json` of `gdro eval embedded embedded`. Hard strata are
those whose base pass@8 is below 0.5. Every method is paired with `uniform`, or with what --against says, on the seeds
that it has. Intervals are 95 %: Student t over paired seeds for differences, the percentile
bootstrap over seeds for rollouts to a level.
"""

import argparse
import json
import pathlib
from collections.abc import Callable

import matplotlib.figure
import numpy as np
from scipy import special

from gdro_jax import report

BASELINE = "uniform"
HARD_BELOW = 0.5
RESAMPLES = 2000


def curves(runs: list[report.Run]) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """Rollouts at each evaluation, and measure -> stratum -> float[seeds, evaluations] of one method's runs."""
    parts = [[r for r in run.records if "eval" in r] for run in runs]
    summaries = [[r.get("eval_part", r["eval"]) for r in part] for part in parts]
    rollouts = np.array([r["ledger"]["rollouts"] for r in parts[0]])
    strata = list(summaries[0][0]["strata"])
    out = {
        measure: {s: np.array([[e["strata"][s][measure] for e in run] for run in summaries]) for s in strata}
        | {"overall": np.array([[e["overall"][measure] for e in run] for run in summaries])}
        for measure in ("mean", "pass")
    }
    return rollouts, out


def final(runs: list[report.Run]) -> dict[str, dict[str, np.ndarray]]:
    """Measure -> stratum (and 'overall') -> float[seeds] at the end, on all held-out problems."""
    ends = [run.records[-1]["eval"] for run in runs]
    return {
        m: {s: np.array([e["strata"][s][m] for e in ends]) for s in ends[0]["strata"]}
        | {"overall": np.array([e["overall"][m] for e in ends])}
        for m in ("mean", "pass")
    }


Interval = tuple[float, float | None, float | None]


def t_interval(values: np.ndarray) -> Interval:
    """Mean and 95 % Student t interval of float[seeds]; one seed has none."""
    if len(values) == 1:
        return float(values[0]), None, None
    half = special.stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def crossing(rollouts: np.ndarray, curve: np.ndarray, level: float) -> float:
    """Rollouts at which a curve first reaches a level, linear between evaluations; infinite if it never does."""
    if curve[0] >= level:
        return 0.0
    for i in range(1, len(curve)):
        if curve[i] >= level:
            share = (level - curve[i - 1]) / (curve[i] - curve[i - 1])
            return float(rollouts[i - 1] + share * (rollouts[i] - rollouts[i - 1]))
    return float("inf")


def to_level(rollouts: np.ndarray, method: np.ndarray, baseline: np.ndarray, seed: int = 0) -> dict[str, float | None]:
    """Rollouts a method needs for the baseline's final level, as a ratio to the rollouts the baseline needs for it.

    Curves float[seeds, evaluations] are averaged over seeds first; the interval resamples seeds in pairs. A ratio that
    is infinite (the level is never reached) is None; `reached` is the share of resamples in which it is finite.
    """

    def ratio(rows: np.ndarray) -> float:
        mine, theirs = method[rows].mean(0), baseline[rows].mean(0)
        needed = crossing(rollouts, theirs, theirs[-1])
        return crossing(rollouts, mine, theirs[-1]) / needed if needed > 0 else float("nan")

    rng = np.random.default_rng(seed)
    draws = np.array([ratio(rng.integers(0, len(method), len(method))) for _ in range(RESAMPLES)])
    draws = draws[~np.isnan(draws)]
    if not draws.size:
        return {"ratio": None, "low": None, "high": None, "reached": 0.0}
    point = ratio(np.arange(len(method)))
    low, high = np.quantile(draws, [0.025, 0.975], method="inverted_cdf")
    values = {"ratio": point, "low": low, "high": high}
    return {k: float(v) if np.isfinite(v) else None for k, v in values.items()} | {
        "reached": float(np.isfinite(draws).mean())
    }


def analyse(runs: list[report.Run], base: dict, against: dict[str, str]) -> dict:
    """Everything the tables and figures show, as one JSON-able object."""
    methods = sorted({r.method for r in runs}, key=lambda m: (m != BASELINE, m))
    by = {m: sorted((r for r in runs if r.method == m), key=lambda r: r.seed) for m in methods}
    hard = [s for s, v in base["strata"].items() if v["pass"] < HARD_BELOW]
    out: dict = {"base": base, "hard": hard, "methods": {}}
    for method in methods:
        baseline = against.get(method, BASELINE)
        seeds = [r.seed for r in by[method]]
        paired = [r for r in by[baseline] if r.seed in seeds]
        if len(paired) != len(seeds):
            raise SystemExit(f"{method}: seeds {seeds}, its baseline {baseline} has {[r.seed for r in by[baseline]]}")
        reference, (grid, reference_curves) = final(paired), curves(paired)
        ends, (rollouts, lines) = final(by[method]), curves(by[method])
        if rollouts.tolist() != grid.tolist():
            raise SystemExit(f"{method}: spent {rollouts.tolist()} rollouts, the baseline {grid.tolist()}")
        entry: dict = {
            "baseline": baseline,
            "seeds": seeds,
            "rollouts": rollouts.tolist(),
            "final": {},
            "difference": {},
            "along": {},
            "to_level": {},
            "curves": {},
        }
        for m in ("mean", "pass"):
            pooled = ends[m] | {"hard": np.mean([ends[m][s] for s in hard], axis=0)}
            pooled_ref = reference[m] | {"hard": np.mean([reference[m][s] for s in hard], axis=0)}
            entry["final"][m] = {s: t_interval(v) for s, v in pooled.items()}
            entry["difference"][m] = {s: t_interval(pooled[s] - pooled_ref[s]) for s in pooled}
            line = lines[m] | {"hard": np.mean([lines[m][s] for s in hard], axis=0)}
            line_ref = reference_curves[m] | {"hard": np.mean([reference_curves[m][s] for s in hard], axis=0)}
            entry["curves"][m] = {s: v.mean(0).tolist() for s, v in line.items()}
            entry["along"][m] = {
                s: [t_interval(line[s][:, i] - line_ref[s][:, i]) for i in range(1, len(grid))]
                for s in ("overall", "hard", *hard)
            }
            entry["to_level"][m] = {s: to_level(grid, line[s], line_ref[s]) for s in ("hard", *hard)}
        ledgers = [r.records[-1]["ledger"] for r in by[method]]
        entry["ledger"] = {k: float(np.mean([x[k] for x in ledgers])) for k in ("rollouts", "tokens", "seconds")}
        out["methods"][method] = entry
    return out


def markdown(results: dict) -> str:
    """The tables, for reading."""
    hard, methods = results["hard"], results["methods"]

    def row(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def table(head: list[str], cell: Callable[[str, str], str], columns: list[str]) -> list[str]:
        lines = [row([head[0], *head[1:]]), row(["---"] * len(head))]
        return lines + [row([m, *[cell(m, c) for c in columns]]) for m in methods]

    def signed(method: str, measure: str, stratum: str) -> str:
        return between(method, methods[method]["difference"][measure][stratum])

    def between(method: str, found: Interval) -> str:
        mean, low, high = found
        if method == methods[method]["baseline"]:
            return ""
        return f"{mean:+.3f}" + (" (one seed)" if low is None else f" [{low:+.3f}, {high:+.3f}]")

    def level(method: str, measure: str, stratum: str) -> str:
        r = methods[method]["to_level"][measure][stratum]

        def show(x: float | None) -> str:
            return "∞" if x is None else f"{x:.2f}"

        return (
            "" if method == methods[method]["baseline"] else f"{show(r['ratio'])} [{show(r['low'])}, {show(r['high'])}]"
        )

    counts = sorted({len(m["seeds"]) for m in methods.values()})
    text = [
        f"{' or '.join(map(str, counts))} paired seeds; hard strata (base pass@8 < {HARD_BELOW}): {', '.join(hard)}."
    ]
    other = {m: entry["baseline"] for m, entry in methods.items() if entry["baseline"] != BASELINE}
    text += [f"{m} is compared with {b}." for m, b in other.items()] + [""]
    for measure, name in (("mean", "mean@1"), ("pass", "pass@8")):
        groups, others = ["overall", "hard", *hard], [s for s in results["base"]["strata"] if s not in hard]
        grid = next(iter(methods.values()))["rollouts"]
        quarters = [len(grid) // 4 * q for q in (1, 2, 3)]
        along = [f"{group}, {grid[i]:,.0f}" for group in ("overall", "hard") for i in quarters]
        text += [f"### {name} at the end", ""]
        text += table(["method", *groups], lambda m, s: f"{methods[m]['final'][measure][s][0]:.3f}", groups)  # noqa: B023
        text += ["", f"### {name}: paired difference from the baseline at the end, 95 % interval", ""]
        text += table(["method", *groups], lambda m, s: signed(m, measure, s), groups)  # noqa: B023
        text += ["", f"### {name}: the same on the other strata", ""]
        text += table(["method", *others], lambda m, s: signed(m, measure, s), others)  # noqa: B023
        text += ["", f"### {name}: paired difference along the way, on a part of the held-out problems", ""]

        def on_the_way(method: str, column: str) -> str:
            group, _, at = column.partition(", ")
            number = [f"{x:,.0f}" for x in grid].index(at)  # noqa: B023
            return between(method, methods[method]["along"][measure][group][number - 1])  # noqa: B023

        text += table(["method", *along], on_the_way, along)
        text += [
            "",
            f"### {name}: rollouts to reach the baseline's final level, as a ratio to the baseline's, 95 % interval",
            "",
        ]
        text += table(["method", *groups[1:]], lambda m, s: level(m, measure, s), groups[1:])  # noqa: B023
        text += [""]
    text += ["### Cost (mean per run; seconds on a shared 2-core machine, evaluation and compilation left out)", ""]
    columns = ["rollouts", "tokens", "seconds"]
    text += table(["method", *columns], lambda m, c: f"{methods[m]['ledger'][c]:,.0f}", columns)
    return "\n".join(text) + "\n"


def figure(results: dict, measure: str, path: pathlib.Path) -> None:
    """Learning curves of every stratum, a line a method, averaged over seeds."""
    strata = ["hard", *results["base"]["strata"]]
    columns = 4
    rows = -(-len(strata) // columns)
    fig = matplotlib.figure.Figure(figsize=(14, 3 * rows), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for ax, stratum in zip(axes, strata, strict=False):
        for i, (method, entry) in enumerate(results["methods"].items()):
            style = {"color": f"C{i}", "linewidth": 2.2 if method == BASELINE else 1.2}
            ax.plot(np.array(entry["rollouts"]) / 1000, entry["curves"][measure][stratum], label=method, **style)
        base = results["base"]["strata"].get(stratum)
        title = "mean of the hard strata" if base is None else f"{stratum} (base pass@8 {base['pass']:.2f})"
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
        ax.set_xlabel("training rollouts, thousands")
    for ax in axes[len(strata) :]:
        ax.set_visible(False)
    fig.supylabel("held-out mean@1" if measure == "mean" else "held-out pass@8")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    fig.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument("--base", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--against", nargs="*", default=[], metavar="METHOD=BASELINE")
    args = parser.parse_args()
    against = dict(pair.split("=", 1) for pair in args.against)
    results = analyse(report.read_comparison(args.runs), json.loads(args.base.read_text()), against)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "tables.md").write_text(markdown(results))
    for measure in ("mean", "pass"):
        figure(results, measure, args.out / f"curves_{measure}.png")
    print(markdown(results))


if __name__ == "__main__":
    main()
