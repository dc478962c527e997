"""The figure of an evaluation shows every set's levels and subjects, or says which it shows."""

import pathlib

import pytest
from matplotlib.colors import to_hex

from gdro_jax.evaluation import tables


def value(number: float) -> tables.Value:
    return {"value": number, "low": max(0.0, number - 0.1), "high": min(1.0, number + 0.1)}


def score(groups: dict[str, float], samples: int = 4) -> tables.Score:
    """A set's score with such means of its levels."""
    mean, best = value(0.4), value(0.6)
    levels: dict[str, tables.Stratum] = {
        name: {"problems": 2, "mean": value(it), "best": best} for name, it in groups.items()
    }
    name = min(groups, key=lambda group: groups[group])
    return {
        **{"problems": 2 * len(groups), "samples": samples, "left_out": 0, "unscorable": 0.0, "clipped": 0.25},
        **{"tokens_per_response": 3.0, "mean": mean, "majority": mean, "majorities": {}, "cvar": {"0.1": value(0.0)}},
        **{"passes": {str(k): value(0.4 + 0.05 * k) for k in range(1, samples + 1)}, "strata": {"level": levels}},
        "worst": {"by": "level", "name": name, **levels[name]},
    }


def drawn(scores: dict[str, tables.Score], monkeypatch: pytest.MonkeyPatch) -> tables.Figure:
    kept: list[tables.Figure] = []
    monkeypatch.setattr(tables.Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    tables.draw(scores, pathlib.Path("nowhere.png"))
    return kept[0]


def test_every_set_has_its_bars_in_its_own_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {name: score({f"Level {n}": n / 20 for n in range(1, 13)}) for name in ("one", "two", "three")}
    curves, bars = drawn(scores, monkeypatch).axes
    labels = [label.get_text() for label in bars.get_yticklabels()]
    assert labels == [f"{name}: Level {n}" for name in scores for n in range(1, 13)]
    assert [bar.get_width() for bar in bars.patches[:12]] == [n / 20 for n in range(1, 13)]
    assert [label.get_text() for label in curves.get_xticklabels()] == ["1", "2", "4"]
    for number, line in enumerate(curves.lines):
        assert {to_hex(bar.get_facecolor()) for bar in bars.patches[12 * number : 12 * number + 12]} == {
            line.get_color().lower()
        }
    assert bars.get_xlabel() == "mean accuracy"


def test_of_too_many_bars_the_lowest_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn({"one": score({f"x{n}": 1 - n / 100 for n in range(100)}, samples=1)}, monkeypatch)
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert labels == [f"one: x{n}" for n in range(100 - tables.BARS, 100)]
    assert figure.axes[1].get_xlabel() == f"mean accuracy (the {tables.BARS} lowest of 100 levels and subjects)"


def test_the_table_has_a_line_a_set_and_names_the_worst_stratum() -> None:
    head, line, *_ = tables.format_scores({"one": score({"a": 0.5, "b": 0.25})}).splitlines()
    assert head.split("  ")[-1].strip() == "worst stratum" and "CVaR 10%" in head and "clipped" in head
    assert line.endswith("25.0%        0.0%  0.250 [0.150, 0.350] b") and line.startswith("one")
