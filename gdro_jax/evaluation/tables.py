"""Scores as text and as a figure: what `gdro eval` prints and draws."""

import pathlib
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from gdro_jax.evaluation.score import Score, Value, powers_up_to

BARS = 64
"""Most bars of a figure."""
BAR = 0.2
"""Height of one, in inches."""

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#555555")


def format_scores(scores: Mapping[str, Score]) -> str:
    """A line a set, then each set's levels and subjects, the worst first; brackets are 95 % intervals over prompts."""
    blocks = [_overview(scores)]
    for name, score in scores.items():
        for kind, groups in score["strata"].items():
            if len(groups) < 2:
                continue
            ordered = sorted(groups.items(), key=lambda item: item[1]["mean"]["value"])
            rows = [(label, str(it["problems"]), _cell(it["mean"]), _cell(it["best"])) for label, it in ordered]
            n = score["samples"]
            blocks.append(table((f"{name} by {kind}", "problems", f"mean@{n}", f"pass@{n}"), rows))
    return "\n\n".join(blocks)


def _overview(scores: Mapping[str, Score]) -> str:
    samples = sorted({score["samples"] for score in scores.values()})
    n = "n" if len(samples) > 1 else str(samples[0])
    head = ("", "problems", f"mean@{n}", f"pass@{n}", f"maj@{n}", "CVaR 10%", "clipped", "unscorable", "worst stratum")
    rows = []
    for name, score in scores.items():
        worst = score["worst"]
        rows.append(
            (
                name,
                str(score["problems"]),
                _cell(score["mean"]),
                _cell(score["passes"].get(str(score["samples"]))),
                _cell(score["majority"]),
                _cell(score["cvar"]["0.1"]),
                f"{score['clipped']:.1%}",
                f"{score['unscorable']:.1%}",
                "-" if worst is None else f"{_cell(worst['mean'])} {worst['name']}",
            )
        )
    return table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in (head, *rows))


def _cell(value: Value | None) -> str:
    return "-" if value is None else f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _colour(number: int) -> str:
    """Of the set of that number."""
    return _COLOURS[number % len(_COLOURS)]


def draw(scores: Mapping[str, Score], file: pathlib.Path) -> None:
    """pass@k over k of each set, and the means of all sets' levels and subjects in its colour, with their intervals."""
    rows = [
        (f"{name}: {label}", group["mean"], _colour(number))
        for number, (name, score) in enumerate(scores.items())
        for groups in score["strata"].values()
        for label, group in groups.items()
    ]
    of_all = f" (the {BARS} lowest of {len(rows)} levels and subjects)" if len(rows) > BARS else ""
    if of_all:
        lowest = sorted(range(len(rows)), key=lambda place: rows[place][1]["value"])[:BARS]
        rows = [rows[place] for place in sorted(lowest)]
    figure = Figure(figsize=(12, max(4.2, 1.0 + BAR * len(rows))), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    for number, (name, score) in enumerate(scores.items()):
        colour = _colour(number)
        ks = [int(k) for k in score["passes"]]
        values = list(score["passes"].values())
        curves.plot(ks, [v["value"] for v in values], color=colour, marker="o", markersize=3, label=name)
        curves.fill_between(ks, [v["low"] for v in values], [v["high"] for v in values], color=colour, alpha=0.15, lw=0)
    curves.set(xlabel="k", ylabel="pass@k", ylim=(0, 1))
    most = max(score["samples"] for score in scores.values())
    if most > 1:
        curves.set_xscale("log", base=2)
    curves.set_xticks(powers_up_to(most), list(map(str, powers_up_to(most))))
    curves.legend(frameon=False, fontsize=8)
    means = [value["value"] for _, value, _ in rows]
    spread = [[m - v["low"] for m, (_, v, _) in zip(means, rows, strict=True)],
              [v["high"] - m for m, (_, v, _) in zip(means, rows, strict=True)]]  # fmt: skip
    bars.barh(range(len(rows)), means, xerr=spread, color=[c for *_, c in rows], alpha=0.5, ecolor="#333333", capsize=2)
    bars.set_yticks(range(len(rows)), [label[:72] for label, *_ in rows], fontsize=7)
    bars.set(xlabel=f"mean accuracy{of_all}", xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
    figure.savefig(file, dpi=130)
