"""Figures of the emergent curriculum: what shares, weights and rollouts each difficulty bin had as the run went."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from gdro_jax.report.runs import Run
from gdro_jax.report.series import Series, batch_mean, per_bin
from gdro_jax.report.statistics import nan_mean
from gdro_jax.report.style import FAINT, INK, display_name, dress, new_figure

Groups = Mapping[str, Sequence[Run]]
_MOST_COLUMNS = 80
_TICKS = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)


def shares(groups: Groups) -> Figure | None:
    """Stacked areas, one panel per method, the hardest bin on top."""
    found = _having(groups, "share")
    if not found:
        return None
    figure, panels = _panels(found)
    for axes, (method, series) in zip(panels, found.items(), strict=True):
        x, y = _thin(series)
        share = np.where(np.isfinite(y).any(axis=1, keepdims=True), np.nan_to_num(y), np.nan)
        edges = _edges(x)
        top = np.repeat(np.cumsum(share[:, ::-1], axis=1), 2, axis=0)  # easiest first, hardest on top
        at = np.stack([edges[:-1], edges[1:]], axis=1).ravel()
        low = np.where(np.isfinite(top[:, 0]), 0.0, np.nan)
        colors = _bin_colors(share.shape[1])
        for place in range(share.shape[1]):
            color = colors(share.shape[1] - 1 - place)
            axes.fill_between(at, low, top[:, place], color=color, linewidth=0)
            low = top[:, place]
        dress(axes, title=display_name(method), y="share of prompts", grid=False)
        axes.set_ylim(0, 1)
        axes.set_xlim(edges[0], edges[-1])
    widths = [series.mean.shape[1] for series in found.values()]
    shared = len(set(widths)) == 1
    for method, width, axes in list(zip(found, widths, panels, strict=True))[: 1 if shared else None]:
        norm = BoundaryNorm(np.arange(width + 1) - 0.5, width)
        owners = panels if shared else [axes]
        bar = figure.colorbar(ScalarMappable(norm, _bin_colors(width)), ax=owners, pad=0.02, fraction=0.05, aspect=22)
        bar.set_ticks(list(range(width)), labels=bin_labels(groups[method][0], width))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.invert_yaxis()
        _dress_bar(bar, "difficulty bin, 0 hardest")
    return figure


def weights(groups: Groups) -> Figure | None:
    """Heatmap of a bin's weight over the mean weight of the step's prompts; white is 1."""
    found = _having(groups, "weight", relative=True)
    return _heatmaps(groups, found, 1.0, "weight relative to the step's mean", "x")


def rollouts(groups: Groups) -> Figure | None:
    """Heatmap of a bin's mean rollouts per prompt; white is the mean budget."""
    found = _having(groups, "rollouts")
    budgets = [batch_mean(run, "bins", "rollouts") for method in found for run in groups[method]]
    center = float(nan_mean(np.concatenate(budgets), 0)) if budgets else np.nan
    return _heatmaps(groups, found, center if center > 0 else 1.0, "rollouts per prompt", "")


def bin_labels(run: Run, bins: int) -> list[str]:
    """ "0: [0, 0.1)" with the edges of the run's config, "0 hardest" .. "9 easiest" where it names none that fit."""
    edges = _find_edges(run.config, bins - 1)
    if edges is None:
        ends = {0: "0 hardest", bins - 1: f"{bins - 1} easiest"}
        return [ends.get(index, str(index)) for index in range(bins)]
    bounds = [0.0, *edges, 1.0]
    close = [")"] * (bins - 1) + ["]"]
    return [f"{i}: [{bounds[i]:.3g}, {bounds[i + 1]:.3g}{close[i]}" for i in range(bins)]


def _heatmaps(groups: Groups, found: Mapping[str, Series], center: float, label: str, sign: str) -> Figure | None:
    if not found:
        return None
    figure, panels = _panels(found)
    ratios = np.concatenate([series.mean.ravel() for series in found.values()]) / center
    ratios = ratios[np.isfinite(ratios) & (ratios > 0)]
    reach = float(np.exp(np.clip(np.abs(np.log(ratios)).max(initial=0.0), math.log(1.5), math.log(128))))
    norm = LogNorm(center / reach, center * reach)
    colors = colormaps["RdBu_r"].with_extremes(bad="#d0d0d0", under=colormaps["RdBu_r"](0.0))
    for axes, (method, series) in zip(panels, found.items(), strict=True):
        x, y = _thin(series)
        width = y.shape[1]
        mesh = np.ma.masked_invalid(y.T)
        axes.pcolormesh(_edges(x), np.arange(width + 1) - 0.5, mesh, norm=norm, cmap=colors, rasterized=True)
        dress(axes, title=display_name(method), y="difficulty bin, 0 hardest", grid=False)
        axes.set_ylim(width - 0.5, -0.5)
        if np.nanmax(np.abs(np.log(np.where(y > 0, y, np.nan) / center)), initial=0.0) < 0.02:
            note = f"{sign}{center:.3g} in every bin"
            axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=FAINT)
        named = bin_labels(groups[method][0], width)
        every = math.ceil(width / 16)
        axes.set_yticks(range(0, width, every), named[::every])
        axes.tick_params(axis="y", labelsize=7)
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=panels, pad=0.02, fraction=0.05, aspect=24)
    ticks = [tick for factor in _TICKS for tick in {center * factor, center / factor} if factor <= reach * 1.0001]
    bar.ax.yaxis.set_major_locator(FixedLocator(_apart(sorted(ticks), reach)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{sign}{value:.3g}"))
    _dress_bar(bar, label)
    return figure


def _apart(ticks: Sequence[float], reach: float) -> list[float]:
    """Ticks at least a twelfth of the (log) bar apart, kept from the middle outwards."""
    middle = len(ticks) // 2
    kept = [ticks[middle]]
    for side in (ticks[middle + 1 :], ticks[:middle][::-1]):
        last = ticks[middle]
        for tick in side:
            if abs(math.log(tick / last)) >= 2 * math.log(reach) / 12:
                kept.append(tick)
                last = tick
    return sorted(kept)


def _having(groups: Groups, field: str, relative: bool = False) -> dict[str, Series]:
    found = {method: per_bin(runs, "bins", field, relative=relative) for method, runs in groups.items()}
    return {method: series for method, series in found.items() if not series.empty}


def _panels(found: Mapping[str, Series]) -> tuple[Figure, list[Axes]]:
    columns = min(2, len(found))
    rows = math.ceil(len(found) / columns)
    figure = new_figure(7.5 if columns == 1 else 11, 3.0 * rows if rows > 1 else 3.6)
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(len(found))]


def _thin(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """At most 80 columns: neighbours are averaged, null entries left out."""
    keep = np.isfinite(series.x)
    x, y = series.x[keep], series.mean[keep]
    window = math.ceil(x.size / _MOST_COLUMNS)
    if window <= 1:
        return x, y
    starts = range(0, x.size, window)
    return np.array([x[i : i + window][-1] for i in starts]), np.stack([nan_mean(y[i : i + window], 0) for i in starts])


def _edges(x: np.ndarray) -> np.ndarray:
    """Cell borders: what a column shows was spent between the border before it and its own x."""
    first = max(0.0, 2 * x[0] - x[1]) if x.size > 1 else 0.0
    return np.concatenate([[first], x])


def _bin_colors(bins: int) -> Colormap:
    """Hardest dark, easiest light."""
    return ListedColormap(colormaps["viridis"](np.linspace(0.02, 0.98, bins)))


def _dress_bar(bar: Colorbar, label: str) -> None:
    bar.outline.set_edgecolor("#aaaaaa")
    bar.ax.tick_params(labelsize=8, colors=FAINT, length=2)
    bar.ax.set_ylabel(label, fontsize=9, color=INK)


def _find_edges(config: object, count: int) -> list[float] | None:
    if not isinstance(config, Mapping):
        return None
    edges = config.get("edges")
    if isinstance(edges, list) and len(edges) == count and all(isinstance(edge, (int, float)) for edge in edges):
        return [float(edge) for edge in edges]
    return next((found for value in config.values() if (found := _find_edges(value, count)) is not None), None)
