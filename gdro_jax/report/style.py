"""How methods are named, ordered and coloured, and how axes look: the same in every figure and table."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator

BASELINE = "uniform"
NAMES: Mapping[str, str] = MappingProxyType(
    {
        "uniform": "GRPO (uniform)",
        "prompt_gdro": "Prompt-GDRO",
        "rollout_gdro": "Rollout-GDRO",
        "joint": "both",
        "random_weights": "random weights (control)",
        "permuted_budgets": "permuted budgets (control)",
        "dapo": "DAPO",
        "greso": "GRESO",
        "adarft": "AdaRFT",
    }
)
# Okabe and Ito's colours (told apart by colour-blind readers); grey, not black, for the baseline.
_FIXED: Mapping[str, str] = MappingProxyType(
    {"uniform": "#555555", "prompt_gdro": "#0072B2", "rollout_gdro": "#D55E00", "joint": "#009E73"}
)
_OTHERS = ("#CC79A7", "#E69F00", "#56B4E9", "#8C510A")
_DASHES: tuple[tuple[int, tuple[float, ...]], ...] = ((0, ()), (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, FAINT, GRID = "#222222", "#666666", "#e3e3e3"


@dataclass(frozen=True, kw_only=True)
class Look:
    """Colour, dash pattern and marker of a method."""

    color: str
    dash: tuple[int, tuple[float, ...]]
    marker: str
    place: int  # among the figure's methods: markers are staggered by it, so that equal curves can be told apart


def display_name(method: str) -> str:
    """The name that people read: "GRPO (uniform)" for `uniform`; an unknown method's own name."""
    return NAMES.get(method, method)


def ordered(methods: Iterable[str]) -> list[str]:
    """Each method once: the baseline, then those with a name here in its order, then the rest as they came."""
    found = list(dict.fromkeys(methods))
    return [name for name in NAMES if name in found] + [name for name in found if name not in NAMES]


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """A look for each method, no two alike (up to 20 methods); the four main methods always have the same one."""
    result: dict[str, Look] = {}
    spare = 0
    for index, method in enumerate(methods):
        color, dash = _FIXED.get(method), _DASHES[0]
        if color is None:
            color = _OTHERS[spare % len(_OTHERS)]
            dash = _DASHES[(spare // len(_OTHERS)) % len(_DASHES)]
            spare += 1
        result[method] = Look(color=color, dash=dash, marker=_MARKERS[index % len(_MARKERS)], place=index)
    return result


def new_figure(width: float, height: float) -> Figure:
    """A white figure of that size in inches with constrained layout, tied to no global state."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.03, hspace=0.05)
    return Figure(figsize=(width, height), layout=layout, facecolor="white")


def dress(axes: Axes, *, title: str = "", x: str = "training rollouts", y: str = "", grid: bool = True) -> None:
    """Labels, a light grid, no box: the common look of an axes whose x axis counts rollouts."""
    axes.set_title(wrapped(title, 34), fontsize=10, color=INK, loc="left", pad=6)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=FAINT, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aaaaaa")
    axes.set_axisbelow(True)
    if not isinstance(axes.yaxis.get_major_locator(), FixedLocator):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    if grid:
        axes.grid(True, color=GRID, linewidth=0.7)
    if x == "training rollouts":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))


def legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """One legend above all axes, where it covers nothing, in as many columns as the figure's width has room for."""
    if handles:
        widest = max(len(str(handle.get_label())) for handle in handles)
        columns = max(1, int(figure.get_figwidth() / (0.075 * widest + 0.75)))
        figure.legend(
            handles=list(handles),
            loc="outside upper left",
            ncols=min(columns, len(handles)),
            fontsize=9,
            frameon=False,
            handlelength=2.4,
        )


def handle(method: str, look: Look, seeds: int) -> Line2D:
    """The legend entry of a method, with its number of seeds."""
    label = f"{display_name(method)}, {seeds} seed{'s' if seeds != 1 else ''}"
    return Line2D(
        [], [], color=look.color, linestyle=look.dash, linewidth=1.8, marker=look.marker, markersize=4.5, label=label
    )


def widen(axes: Axes, least: float, low: float = -float("inf"), high: float = float("inf")) -> None:
    """Let the y axis span at least `least`, within [low, high]: noise should not fill a panel."""
    bottom, top = axes.get_ylim()
    if top - bottom < least:
        middle = (bottom + top) / 2
        bottom, top = middle - least / 2, middle + least / 2
        shift = max(low - bottom, 0) + min(high - top, 0)
        axes.set_ylim(bottom + shift, top + shift)


def wrapped(text: str, width: int) -> str:
    """`text` in lines of at most `width` characters, three at most, its middle left out where it is longer."""
    lines = textwrap.wrap(cut(text, 2 * width), width)
    return "\n".join(lines)


def shortened(names: Sequence[str], length: int) -> dict[str, str]:
    """A short form of each name: where any is longer than `length`, the words that all begin or end with go."""
    if len(names) < 2 or max(len(name) for name in names) <= length:
        return {name: name for name in names}
    words = {name: name.split(" ") for name in names}
    least = min(len(its) for its in words.values()) - 1
    head = next((n for n in range(least) if len({its[n] for its in words.values()}) > 1), least)
    tail = next((n for n in range(least - head) if len({its[-1 - n] for its in words.values()}) > 1), least - head)
    head = max(head - 1, 0)  # one word of what they share says what the rest counts
    middles = {name: " ".join(its[head : len(its) - tail]) for name, its in words.items()}
    short = {name: f"{'… ' * (head > 0)}{middle}{' …' * (tail > 0)}" for name, middle in middles.items()}
    return short if len(set(short.values())) == len(short) else {name: name for name in names}


def cut(text: str, length: int = 32) -> str:
    """`text` with its middle left out where it is longer than `length`."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length // 2 - 1) :]}"
