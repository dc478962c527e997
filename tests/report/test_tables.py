"""The numbers of the tables against values worked out by hand."""

import numpy as np
import pytest

from gdro_jax import report
from gdro_jax.report.scores import curves
from gdro_jax.report.statistics import mean_and_spread, moving_mean, paired_difference
from gdro_jax.report.tables import amount, difference, duration


def ended(hard, easy, rollouts=100):
    """A run's records: the base, then one step; (mean, pass) of two strata at its end."""
    return [
        {"step": 0, "eval": scores((0.1, 0.3), (0.5, 0.9)), "ledger": {"rollouts": 0, "tokens": 0, "seconds": 0}},
        {"step": 1, "eval": scores(hard, easy), "ledger": {"rollouts": rollouts, "tokens": 5000, "seconds": 12.5}},
    ]


def scores(hard, easy):
    strata = {name: {"mean": mean, "pass": p, "n": 10} for name, (mean, p) in (("easy", easy), ("hard", hard))}
    overall = {part: (hard[i] + easy[i]) / 2 for i, part in enumerate(("mean", "pass"))}
    return {"k": 8, "samples": 8, "overall": overall | {"n": 20}, "strata": strata}


@pytest.fixture
def pair(write_run, tmp_path):
    """Two seeds of two methods; overall mean@1 0.40, 0.50 against 0.50, 0.64: differences 0.10 and 0.14."""
    write_run("c/joint-seed0", ended((0.20, 0.50), (0.80, 1.0)), "joint", 0)
    write_run("c/joint-seed1", ended((0.40, 0.70), (0.88, 1.0)), "joint", 1)
    write_run("c/uniform-seed0", ended((0.10, 0.30), (0.70, 0.9)), "uniform", 0)
    write_run("c/uniform-seed1", ended((0.22, 0.40), (0.78, 0.9)), "uniform", 1)
    return report.read_comparison(tmp_path / "c")


def test_table_by_hand(pair):
    base, joint = report.table(pair)
    assert (base["method"], base["name"], joint["name"]) == ("uniform", "GRPO (uniform)", "both")
    assert base["mean"] == pytest.approx(0.45)
    assert base["mean_spread"] == pytest.approx(0.1 / np.sqrt(2))
    assert base["mean_difference"] is None
    assert joint["mean"] == pytest.approx(0.57)
    gap = joint["mean_difference"]
    assert gap.pairs == 2
    assert gap.mean == pytest.approx(0.12)
    # Student t, 1 degree of freedom: 12.7062; standard error = (0.04 / sqrt 2) / sqrt 2 = 0.02
    assert gap.low == pytest.approx(0.12 - 12.7062 * 0.02, abs=1e-5)
    assert gap.high == pytest.approx(0.12 + 12.7062 * 0.02, abs=1e-5)
    assert not gap.clear_of_zero
    assert joint["worst_mean"] == pytest.approx(0.30)
    assert joint["worst_pass"] == pytest.approx(0.60)
    assert joint["worst_stratum"] == "hard"
    assert (joint["rollouts"], joint["tokens"], joint["seconds"], joint["steps"]) == (100, 5000, 12.5, 1)
    assert joint["budget_matched"] is True


def test_strata_table_by_hand(pair):
    rows = report.strata_table(pair)
    assert [(row["stratum"], row["method"]) for row in rows] == [
        ("hard", "uniform"), ("hard", "joint"), ("easy", "uniform"), ("easy", "joint"),
    ]  # fmt: skip
    assert rows[1]["mean"] == pytest.approx(0.30)
    assert rows[1]["mean_difference"].mean == pytest.approx((0.10 + 0.18) / 2)
    assert rows[3]["pass_difference"].mean == pytest.approx(0.1)
    assert rows[0]["problems"] == 10


def test_curves_are_of_the_same_problems_and_the_end_of_all(write_run):
    """Along the way 8 problems a stratum; base and end on all, with the 8 beside it: no rise where there was none."""
    part, everything = scores((0.2, 0.4), (0.6, 0.8)), scores((0.3, 0.5), (0.9, 1.0))
    records = [
        {"step": 0, "eval": everything, "eval_part": part},
        {"step": 1, "eval": part},
        {"step": 2, "eval": everything, "eval_part": part},
    ]
    found = curves(report.read_run(write_run("run", records)))
    for measures in (found.measures["mean"], found.strata["hard", "mean"], found.measures["worst_pass"]):
        assert measures.shape == (3,) and np.ptp(measures) == 0.0
    assert found.measures["mean"][0] == pytest.approx(0.4) and found.final("mean") == pytest.approx(0.6)
    assert found.final_stratum("easy", "mean") == pytest.approx(0.9)


def test_the_worst_stratum_is_the_worst_of_each_run(write_run):
    """Seed 0 is worst on one stratum, seed 1 on the other: the mean of the least, not the least of the means."""
    runs = [
        report.read_run(write_run("a", ended((0.1, 0.5), (0.3, 0.6)), "joint", 0)),
        report.read_run(write_run("b", ended((0.5, 0.9), (0.2, 0.7)), "joint", 1)),
    ]
    row = report.table(runs)[0]
    assert row["worst_mean"] == pytest.approx(0.15)
    assert row["worst_stratum"] == "easy"


def test_pairs_are_the_seeds_in_common():
    gap = paired_difference({0: 1.0, 1: 2.0, 7: 9.0, 8: None}, {1: 1.5, 0: 0.7, 3: 0.0, 8: 1.0})
    assert gap is not None
    assert (gap.pairs, round(gap.mean, 9)) == (2, 0.4)
    one = paired_difference({0: 1.0}, {0: 0.25})
    assert one is not None
    assert (one.mean, one.low, one.high, one.clear_of_zero) == (0.75, None, None, False)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_interval_of_three_pairs_by_hand():
    """Differences 1, 2, 3: mean 2, sd 1, t of 2 degrees 4.302653, half width 4.302653 / sqrt 3."""
    gap = paired_difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 0.0, 2: 0.0})
    assert gap is not None
    assert gap.high == pytest.approx(2 + 4.302653 / np.sqrt(3), abs=1e-5)
    with pytest.raises(ValueError, match=r"level is 1\.5"):
        paired_difference({}, {}, level=1.5)


def test_unequal_budgets_are_refused_aloud(write_run):
    runs = [
        report.read_run(write_run("a", ended((0.1, 0.5), (0.3, 0.6), rollouts=100), "uniform", 0)),
        report.read_run(write_run("b", ended((0.5, 0.9), (0.6, 0.7), rollouts=120), "joint", 0)),
        report.read_run(write_run("c", ended((0.5, 0.9), (0.6, 0.7), rollouts=100), "prompt_gdro", 0)),
    ]
    rows = {row["method"]: row for row in report.table(runs)}
    assert rows["joint"]["mean_difference"] is None
    assert rows["joint"]["budget_matched"] is False
    assert rows["prompt_gdro"]["mean_difference"].mean == pytest.approx(0.35)
    (warning,) = report.check(runs)
    assert "budgets are not equal" in warning
    assert "refused for: both" in warning
    assert report.format_table(runs).startswith("WARNING: Rollout budgets are not equal")
    assert report.check([runs[0], runs[2]]) == []


def test_scores_of_unequal_numbers_of_problems_are_not_compared(write_run):
    """A run that was stopped was last evaluated on a part of the problems; one without a scorable response counts."""
    runs = []
    for method, n, left_out in (("uniform", 20, 0), ("joint", 8, 0), ("prompt_gdro", 19, 1)):
        records = ended((0.1, 0.5), (0.3, 0.6))
        records[-1]["eval"]["overall"]["n"], records[-1]["eval"]["left_out"] = n, left_out
        runs.append(report.read_run(write_run(method, records, method)))
    rows = {row["method"]: row for row in report.table(runs)}
    assert rows["joint"]["mean_difference"] is None and rows["joint"]["budget_matched"] is True
    assert rows["prompt_gdro"]["mean_difference"].mean == 0.0
    strata = {(row["stratum"], row["method"]): row["mean_difference"] for row in report.strata_table(runs)}
    assert strata["hard", "joint"] is None and strata["hard", "prompt_gdro"] is not None
    (warning,) = report.check(runs)
    assert "unequal numbers of problems (uniform 20; prompt_gdro 20; joint 8)" in warning
    assert warning.endswith("refused for: both.")


def test_what_is_incomplete_or_differs_is_said(write_run):
    first = ended((0.1, 0.5), (0.3, 0.6))
    runs = [
        report.read_run(write_run("a", first, "uniform", 0, train={"learning_rate": 0.1}, run_steps=5)),
        report.read_run(write_run("b", first, "uniform", 1, train={"learning_rate": 0.1})),
        report.read_run(write_run("c", first, "joint", 0, train={"learning_rate": 0.2})),
    ]
    said = " ".join(report.check(runs))
    assert "a: stopped at step 1 of 5." in said
    assert "both lacks seed 1." in said
    assert "train.learning_rate (0.1, 0.2)" in said
    assert "No run of the baseline" in " ".join(report.check([runs[2], report.read_run(write_run("d", first, "x", 0))]))


def test_null_scores_are_nothing_not_zero(write_run):
    records = ended((0.1, 0.5), (0.3, 0.6))
    records[-1]["eval"]["overall"]["mean"] = None
    records[-1]["eval"]["strata"]["hard"] = {"mean": None, "pass": None, "n": 0}
    row = report.table([report.read_run(write_run("a", records))])[0]
    assert row["mean"] is None
    assert row["worst_mean"] == pytest.approx(0.3)
    bare = report.table([report.read_run(write_run("b", [{"step": 1, "reward": 0.5}]))])[0]
    assert [bare[key] for key in ("mean", "worst_pass", "rollouts", "worst_stratum")] == [None] * 4


def test_a_terminal_table_holds_the_numbers(pair):
    lines = report.format_table(pair).splitlines()
    assert lines[0].split() == ["method", "seeds", "mean@1", "pass@8", "worst", "mean@1", "worst", "pass@8", "rollouts",
                                "tokens", "time"]  # fmt: skip
    assert lines[2].startswith("GRPO (uniform)")
    assert "0.450 ±0.071" in lines[2]
    assert "+0.120 [-0.134, +0.374]" in lines[-1]
    assert len({len(line) for line in lines[:4]}) == 1


def test_formats():
    assert [amount(value) for value in (None, 999_999, 1_234_567, 2.5e9)] == ["-", "999,999", "1.23 M", "2.50 G"]
    assert [duration(s) for s in (1.66, 42, 185, 7620)] == ["1.7 s", "42 s", "3 min 05 s", "2 h 07 min"]
    assert difference(report.Difference(mean=-0.0001, low=-0.2, high=0.1, pairs=2)) == "+0.000 [-0.200, +0.100]"
    assert mean_and_spread([1.0, None, 3.0]) == (2.0, pytest.approx(np.sqrt(2)))
    assert mean_and_spread([None]) == (None, None)


def test_moving_mean_keeps_gaps():
    values = np.array([1.0, 2.0, np.nan, 4.0, 5.0])
    np.testing.assert_allclose(moving_mean(values, 3), [1.5, 1.5, np.nan, 4.5, 4.5])
    np.testing.assert_allclose(moving_mean(values, 1), values)
