"""The page and its figures, over the shapes that run folders come in."""

import base64
import re
from io import BytesIO

import numpy as np
import pytest

from gdro_jax import report
from gdro_jax.report import curriculum
from gdro_jax.report.figures import draw_all
from gdro_jax.report.page import render
from gdro_jax.report.series import per_bin, per_evaluation, per_step
from gdro_jax.report.style import display_name, looks, ordered, shortened, wrapped

ALL = {
    "differences", "learning", "strata_mean", "strata_pass", "reward", "shares", "weights", "rollouts", "lead_lag",
    "standard_error", "effective_bins", "price", "health",
}  # fmt: skip


def drawn(folder):
    return {path.stem for path in (folder / "figures").glob("*.png")}


def test_the_page_holds_everything_and_needs_nothing(make_comparison):
    folder = make_comparison(methods=("uniform", "joint"), steps=4, eval_every=2)
    page = report.write(folder)
    text = page.read_text()
    assert page == folder / "report.html"
    assert drawn(folder) == ALL
    inlined = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert sorted(inlined) == sorted(path.read_bytes() for path in (folder / "figures").glob("*.png"))
    assert len(re.findall("<figcaption>Look ", text)) == len(ALL)
    without_images = re.sub(r"data:image/png;base64,[^\"]+", "", text)
    assert not re.search(r"https?:|//|<script|<link|@import|url\(", without_images)
    assert "GRPO (uniform)" in text
    assert "Before you compare" not in text
    for row in report.table(report.read_comparison(folder)):
        assert f"{row['mean']:.3f} ±{row['mean_spread']:.3f}" in text
        assert f"{row['worst_pass']:.3f} ±" in text


def test_curves_of_a_part_of_the_problems_say_so(write_run, tmp_path):
    scores = {"mean": 0.2, "pass": 0.5, "n": 8}
    evaluated = {"k": 8, "samples": 8, "overall": scores, "strata": {"add": scores}}
    whole = [{"step": step, "eval": evaluated, "ledger": {"rollouts": step}} for step in (0, 1)]
    parts = [record | {"eval_part": evaluated} for record in whole]
    said = "Curves are of the first 50 problems of each stratum"
    for name, records, times in (("whole", whole, 0), ("part", parts, 3)):
        page = report.write(write_run(name, records, eval={"problems_per_stratum": 50})).read_text()
        assert page.count(said) == times


def test_a_run_without_evaluations_or_price(make_run):
    folder = make_run(method="uniform", steps=1, eval_every=0)
    (folder / "figures").mkdir()
    (folder / "figures" / "price.png").write_bytes(b"of an earlier report")
    text = report.write(folder).read_text()
    assert drawn(folder) == {"reward", "shares", "weights", "rollouts", "lead_lag", "standard_error", "health"}
    assert "no method here has a price" in text
    assert "No evaluation was made" in text


def test_a_bare_run_still_reports(write_run, tmp_path):
    page = report.write(write_run("r", [{"step": 1}]), out=tmp_path / "deep" / "out")
    assert page == tmp_path / "deep" / "out" / "report.html"
    assert drawn(page.parent) == set()


def test_bins_that_differ_and_gaps_are_drawn(make_run, write_run):
    one, two = make_run("a", method="joint", steps=3, bins=3), make_run("b", method="uniform", steps=3, bins=12)
    gaps = write_run(
        "gaps",
        [
            {"step": 1, "bins": {"share": [None, None], "weight": [None, None]}, "ledger": {"rollouts": 8}},
            {"step": 2, "bins": {"share": [0.5, 0.5], "weight": [2.0, None]}, "ledger": {"rollouts": 16}, "wse": None},
        ],
        "odd <name>",
    )
    runs = report.read_comparison([one, two, gaps])
    figures = {plot.name: plot.figure for plot in draw_all(runs)}
    for name in ("shares", "weights", "rollouts"):
        figures[name].savefig(BytesIO(), format="png", dpi=40)
    assert len(figures["shares"].axes) == 3 + 3  # a panel and a bar of its own for each number of bins
    mesh = figures["weights"].axes[2].collections[0].get_array()
    np.testing.assert_array_equal(np.ma.filled(mesh, -1.0), [[-1.0, 1.0], [-1.0, -1.0]])
    text = render(runs, [], {})
    assert "odd &lt;name&gt;" in text
    assert "odd <name>" not in text


def test_weights_are_relative_to_each_seeds_own_mean(write_run):
    """Two seeds whose mean weight is 1 each, though their prompts lie in other bins: means of 1 and 4, and of 2/3."""
    seeds = (([1.0, 0.0], [1.0, None]), ([0.1, 0.9], [4.0, 2 / 3]))
    runs = []
    for seed, (share, weight) in enumerate(seeds):
        bins = {"share": share, "weight": weight, "rollouts": [4.0, 4.0]}
        records = [{"step": step, "bins": bins, "ledger": {"rollouts": 8 * step}} for step in (1, 2)]
        runs.append(report.read_run(write_run(f"s{seed}", records, "joint", seed)))
    drawn_weights = curriculum.weights({"joint": runs}).axes[0].collections[0].get_array()
    np.testing.assert_allclose(np.ma.filled(drawn_weights, -1.0), [[2.5, 2.5], [2 / 3, 2 / 3]])


def test_unequal_budgets_are_loud_on_the_page(make_run):
    one = make_run("a", method="uniform", rollouts_per_step=512)
    two = make_run("b", method="joint", rollouts_per_step=500)
    text = render(report.read_comparison([one, two]), [], {})
    assert 'class="warning"' in text
    assert "Rollout budgets are not equal" in text
    assert "Refused, for the rollout budgets differ: both." in text


def test_run_folders_side_by_side_report_beside_them(write_run, tmp_path):
    folders = [write_run("a", [{"step": 1}], "uniform"), write_run("b", [{"step": 1}], "joint")]
    assert report.write(folders) == tmp_path / "report.html"


def test_folders_without_a_common_parent_need_an_out(make_run):
    with pytest.raises(report.RunError, match="say where to write"):
        report.write([make_run("a/x", method="uniform", steps=1), make_run("b/x", method="joint", steps=1)])


def test_many_long_strata(make_run):
    names = [f"a very long name of a stratum that goes on and on, part {i}" for i in range(13)]
    folder = make_run(method="joint", steps=2, strata=names)
    plots = {plot.name: plot.figure for plot in draw_all([report.read_run(folder)])}
    titles = [axes.get_title(loc="left") for axes in plots["strata_mean"].axes]
    assert len(titles) == 13
    assert len(set(titles)) == 13
    assert max(len(line) for title in titles for line in title.split("\n")) < 40


def test_axes_have_labels_and_legends_lie_outside(make_comparison):
    runs = report.read_comparison(make_comparison(methods=("uniform", "joint"), steps=5))
    for plot in draw_all(runs):
        figure = plot.figure
        shared = figure.get_supxlabel(), figure.get_supylabel()
        for axes in figure.axes:
            assert axes.get_ylabel() or shared[1] or plot.name == "differences", plot.name  # its rows are named
            assert axes.get_xlabel() or shared[0] or axes.get_label() == "<colorbar>", plot.name
            assert axes.get_legend() is None, plot.name
        if figure.legends:
            figure.canvas.draw()
            bottom = figure.legends[0].get_window_extent().y0
            assert all(bottom >= axes.get_window_extent().y1 for axes in figure.axes), plot.name


def test_curves_average_seeds_at_equal_steps(write_run):
    rewards = [{1: 0.0, 2: 1.0, 3: None}, {1: 1.0, 2: 0.0, 4: 0.5}]
    runs = []
    for seed, its in enumerate(rewards):
        records = [{"step": n, "reward": value, "ledger": {"rollouts": 10 * n}} for n, value in its.items()]
        runs.append(report.read_run(write_run(f"s{seed}", records, "uniform", seed)))
    series = per_step(runs, "reward")
    np.testing.assert_array_equal(series.x, [10, 20, 30, 40])
    np.testing.assert_array_equal(series.mean, [0.5, 0.5, np.nan, 0.5])
    np.testing.assert_allclose(series.spread, [np.sqrt(0.5), np.sqrt(0.5), np.nan, np.nan])
    assert per_evaluation(runs, "mean").empty
    assert per_bin(runs, "bins", "share").empty


def test_one_method_has_one_number_of_bins(make_run):
    runs = [report.read_run(make_run(f"s{n}", seed=n, steps=1, bins=n + 3)) for n in range(2)]
    with pytest.raises(report.RunError, match=r"\[3, 4\] bins"):
        per_bin(runs, "bins", "share")


def test_bin_labels(make_run, write_run):
    run = report.read_run(make_run(steps=1, bins=4))
    assert curriculum.bin_labels(run, 4) == ["0: [0, 0.25)", "1: [0.25, 0.5)", "2: [0.5, 0.75)", "3: [0.75, 1]"]
    assert curriculum.bin_labels(run, 3) == ["0 hardest", "1", "2 easiest"]


def test_methods_keep_their_looks_and_names():
    many = [*"abcdefgh", "joint", "uniform"]
    assert ordered(many)[:2] == ["uniform", "joint"]
    chosen = looks(ordered(many))
    assert chosen["joint"].color == looks(["joint"])["joint"].color
    assert len({(look.color, look.dash) for look in chosen.values()}) == len(many)
    assert [display_name(name) for name in ("uniform", "joint", "else")] == ["GRPO (uniform)", "both", "else"]


def test_long_names_stay_apart_and_within_their_panel():
    assert wrapped("short", 10) == "short"
    assert max(map(len, wrapped("word " * 30 + "x" * 90, 20).split("\n"))) <= 20
    names = [f"competition mathematics, level {i}, number theory and combinatorics" for i in range(3)]
    assert list(shortened(names, 30).values()) == ["… level 0, …", "… level 1, …", "… level 2, …"]
    assert shortened(names, 99) == {name: name for name in names}
    assert shortened(["a b", "a b c d"], 2) == {"a b": "a b", "a b c d": "a b c d"}
