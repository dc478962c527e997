"""Figures of what was learned: held-out curves, overall and per stratum, the reward, and paired differences."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gdro_jax.report.runs import Run
from gdro_jax.report.scores import hardest_first, pass_label
from gdro_jax.report.series import Series, per_evaluation, per_step
from gdro_jax.report.statistics import Difference
from gdro_jax.report.style import (
    BASELINE,
    FAINT,
    INK,
    Look,
    display_name,
    dress,
    handle,
    legend,
    looks,
    new_figure,
    shortened,
    widen,
    wrapped,
)
from gdro_jax.report.tables import strata_table, table

Groups = Mapping[str, Sequence[Run]]


def line(
    axes: Axes, series: Series, look: Look, *, marked: bool = False, dash: tuple[int, tuple[float, ...]] | None = None
) -> None:
    """A method's curve with its spread as a band; gaps stay gaps, and a point between two gaps is shown as a dot."""
    mean, spread = series.mean, series.spread
    every = 1 if marked and series.x.size <= 30 else max(1, series.x.size // 7)
    axes.plot(
        series.x,
        mean,
        color=look.color,
        linestyle=look.dash if dash is None else dash,
        linewidth=1.6,
        marker=look.marker,
        markersize=3.8,
        markevery=(look.place * every // 6 % every, every),
        solid_capstyle="round",
    )
    axes.fill_between(series.x, mean - spread, mean + spread, color=look.color, alpha=0.14, linewidth=0)
    finite = np.isfinite(mean)
    alone = finite & ~np.r_[False, finite[:-1]] & ~np.r_[finite[1:], False]
    axes.plot(series.x[alone], mean[alone], color=look.color, linestyle="none", marker=look.marker, markersize=4)


def method_handles(groups: Groups) -> list[Line2D]:
    styles = looks(list(groups))
    return [handle(method, styles[method], len(runs)) for method, runs in groups.items()]


def overall(groups: Groups) -> Figure | None:
    """2 x 2: mean@1 and pass@k, overall and worst stratum."""
    passes = pass_label([run for runs in groups.values() for run in runs])
    panels = (
        ("mean", "overall", "mean@1"),
        ("pass", "overall", passes),
        ("worst_mean", "worst stratum", "mean@1"),
        ("worst_pass", "worst stratum", passes),
    )
    curves_of = {
        measure: {method: per_evaluation(runs, measure) for method, runs in groups.items()} for measure, _, _ in panels
    }
    kept = [panel for panel in panels if not all(series.empty for series in curves_of[panel[0]].values())]
    if not kept:
        return None
    figure = new_figure(10, 3.3 * math.ceil(len(kept) / 2) + 0.4)
    styles = looks(list(groups))
    for index, (measure, where, unit) in enumerate(kept):
        axes = figure.add_subplot(math.ceil(len(kept) / 2), 2, index + 1)
        for method, series in curves_of[measure].items():
            line(axes, series, styles[method], marked=True)
        dress(axes, title=f"{unit}, {where}", y=f"{unit} (fraction)")
        widen(axes, 0.05, -0.002, 1.002)
    legend(figure, method_handles(groups))
    return figure


def strata_mean(groups: Groups) -> Figure | None:
    """mean@1 of each stratum, as small multiples."""
    return _small_multiples(groups, "mean", "mean@1")


def strata_pass(groups: Groups) -> Figure | None:
    """pass@k of each stratum, as small multiples."""
    return _small_multiples(groups, "pass", pass_label([run for runs in groups.values() for run in runs]))


def _small_multiples(groups: Groups, part: str, unit: str) -> Figure | None:
    names = hardest_first([run for runs in groups.values() for run in runs])
    if not names:
        return None
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(max(2.6 * columns, 5.2), 2.1 * rows + 0.6)
    styles = looks(list(groups))
    short = shortened(names, 52)
    first: Axes | None = None
    for index, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, index + 1, sharex=first)
        first = first or axes
        for method, runs in groups.items():
            line(axes, per_evaluation(runs, part, name), styles[method])
        dress(axes)
        axes.set_title(wrapped(short[name], 26), fontsize=9, color=INK, loc="left")
        axes.set_xlabel("")
        axes.tick_params(labelbottom=index + columns >= len(names))
        widen(axes, 0.15, -0.01, 1.01)
    figure.supxlabel("training rollouts", fontsize=9, color=INK)
    figure.supylabel(f"{unit} (fraction)", fontsize=9, color=INK)
    legend(figure, method_handles(groups))
    return figure


def reward(groups: Groups) -> Figure | None:
    """Mean training reward, and the share of groups that teach nothing."""
    panels = (
        ("reward", "mean reward of the step's prompts", "reward (fraction right)"),
        ("all_equal_groups", "groups without a signal", "share of prompts, rewards all alike"),
    )
    return line_panels(groups, panels, width=10, height=3.6, columns=2)


def line_panels(
    groups: Groups, panels: Sequence[tuple[str, str, str]], *, width: float, height: float, columns: int
) -> Figure | None:
    """One panel for each (dotted field, title, y label) that any run has; None where none has."""
    series_of = {
        path: {method: per_step(runs, *path.split(".")) for method, runs in groups.items()} for path, _, _ in panels
    }
    kept = [panel for panel in panels if not all(series.empty for series in series_of[panel[0]].values())]
    if not kept:
        return None
    columns = min(columns, len(kept))
    rows = math.ceil(len(kept) / columns)
    figure = new_figure(width if columns > 1 else min(width, 8), height * rows)
    styles = looks(list(groups))
    shown: set[str] = set()
    for index, (path, title, unit) in enumerate(kept):
        axes = figure.add_subplot(rows, columns, index + 1)
        for method, series in series_of[path].items():
            line(axes, series, styles[method])
        shown |= {method for method, series in series_of[path].items() if not series.empty}
        dress(axes, title=title, y=unit)
        largest = max(float(np.nanmax(np.abs(its.mean))) for its in series_of[path].values() if not its.empty)
        widen(axes, 0.02 * largest if largest > 0 else 1.0, 0.0 if largest == 0 else -float("inf"))
    legend(figure, [entry for method, entry in zip(groups, method_handles(groups), strict=True) if method in shown])
    return figure


def differences(groups: Groups) -> Figure | None:
    """Dots and 95 % intervals of final score minus the baseline's, overall, worst stratum, and every stratum."""
    runs = [run for its in groups.values() for run in its]
    rivals = [method for method in groups if method != BASELINE]
    passes = pass_label(runs)
    total = {row["method"]: row for row in table(runs)}
    by_stratum = {(row["stratum"], row["method"]): row for row in strata_table(runs)}
    names = hardest_first(runs)
    short = shortened(names, 60)

    def gaps(part: str) -> list[tuple[str, dict[str, object]]]:
        rows = [("overall", {m: total[m][f"{part}_difference"] for m in rivals})]
        rows.append(("worst stratum", {m: total[m][f"worst_{part}_difference"] for m in rivals}))
        return rows + [(short[name], {m: by_stratum[name, m][f"{part}_difference"] for m in rivals}) for name in names]

    shown = {part: gaps(part) for part in ("mean", "pass")}
    found = [gap for rows in shown.values() for _, its in rows for gap in its.values() if isinstance(gap, Difference)]
    if all(gap.low is None for gap in found):
        return None
    height = max(0.34, 0.11 * len(rivals) + 0.1)
    figure = new_figure(10, height * len(shown["mean"]) + 1.4)
    styles = looks(list(groups))
    first: Axes | None = None
    for index, (part, unit) in enumerate((("mean", "mean@1"), ("pass", passes))):
        axes = figure.add_subplot(1, 2, index + 1, sharey=first)
        first = first or axes
        _forest(axes, shown[part], rivals, styles)
        dress(axes, title=unit, x=f"{unit} minus {display_name(BASELINE)}'s (fraction)", grid=False)
        axes.grid(True, axis="x", color="#e3e3e3", linewidth=0.7)
        axes.tick_params(labelleft=index == 0)
    legend(figure, [handle(method, styles[method], len(groups[method])) for method in rivals])
    return figure


def _forest(
    axes: Axes, rows: Sequence[tuple[str, Mapping[str, object]]], rivals: Sequence[str], styles: Mapping[str, Look]
) -> None:
    offsets = (np.arange(len(rivals)) - (len(rivals) - 1) / 2) * (0.7 / max(len(rivals), 3))
    for place, (_, gaps) in enumerate(rows):
        if place % 2 == 0:
            axes.axhspan(place - 0.5, place + 0.5, color="#f5f5f5", linewidth=0, zorder=0)
        for offset, method in zip(offsets, rivals, strict=True):
            gap, look = gaps[method], styles[method]
            if not isinstance(gap, Difference):
                continue
            if gap.low is not None and gap.high is not None:
                axes.plot(
                    [gap.low, gap.high], [place + offset] * 2, color=look.color, linestyle=look.dash, linewidth=1.8
                )
            axes.plot(
                [gap.mean], [place + offset], color=look.color, marker=look.marker, markersize=5, linestyle="none"
            )
    axes.axvline(0, color=FAINT, linewidth=1)
    axes.axhline(1.5, color="#bbbbbb", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [wrapped(name, 30) for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
