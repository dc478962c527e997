import json

import pytest

from gdro_jax import evaluation

CORRECT, SAMPLES, STRATA = [4, 2, 0, 1, 0], [4, 4, 4, 1, 0], ["easy", "easy", "hard", "hard", "gone"]


def test_a_summary_by_hand() -> None:
    summary = evaluation.summarise(CORRECT, SAMPLES, STRATA, 2, intervals=False)
    # pass@2 of 2 in 4: 1 - C(2,2)/C(4,2) = 5/6; the prompt with one sample has no pass@2, that with none has nothing
    assert summary == {
        "k": 2,
        "samples": 4,
        "overall": {"mean": 0.625, "pass": pytest.approx(11 / 18), "n": 4},
        "strata": {
            "easy": {"mean": 0.75, "pass": pytest.approx(11 / 12), "n": 2},
            "hard": {"mean": 0.5, "pass": 0.0, "n": 2},
        },
        "worst": {"stratum": "hard", "mean": 0.5},
        "left_out": 1,
    }


def test_intervals_hold_their_mean_and_all_is_json() -> None:
    summary = evaluation.summarise(CORRECT, SAMPLES, STRATA, 2, resamples=200)
    assert json.loads(json.dumps(summary)) == summary
    for stats in (summary["overall"], *summary["strata"].values()):
        low, high = stats["mean_interval"]
        assert 0.0 <= low <= stats["mean"] <= high <= 1.0
        assert stats["pass"] is not None and stats["pass_interval"] is not None
        assert stats["pass_interval"][0] <= stats["pass"] <= stats["pass_interval"][1]


def test_no_prompt_with_k_samples_leaves_pass_empty() -> None:
    overall = evaluation.summarise([1], [2], ["a"], 4)["overall"]
    assert overall["pass"] is None and overall["pass_interval"] is None and overall["mean"] == 0.5


def test_summaries_refuse() -> None:
    with pytest.raises(ValueError, match="2, 2 and 1 prompts"):
        evaluation.summarise([1, 1], [2, 2], ["a"], 1)
    with pytest.raises(ValueError, match="no prompt has a scorable sample"):
        evaluation.summarise([0], [0], ["a"], 1)
    with pytest.raises(ValueError, match="3 of 2"):
        evaluation.summarise([3], [2], ["a"], 1)
    for correct, samples, name in (([1.9], [2], "num_correct"), ([1], [2.9], "num_samples")):
        with pytest.raises(ValueError, match=f"{name}: a value is not a whole number"):
            evaluation.summarise(correct, samples, ["a"], 1)
