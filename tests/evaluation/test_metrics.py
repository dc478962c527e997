import itertools
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_jax import evaluation
from gdro_jax.evaluation import metrics


def test_pass_at_k_by_hand() -> None:
    # 1 - C(4,2)/C(6,2) = 1 - 6/15; all wrong; fewer than k wrong; all right
    values = evaluation.pass_at_k([2, 0, 5, 6], [6, 6, 6, 6], 2)
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, [0.6, 0.0, 1.0, 1.0], rtol=0, atol=1e-15)


@given(n=st.integers(1, 8), data=st.data())
@settings(max_examples=60, deadline=None)
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_sample(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(combinations([True] * c + [False] * (n - c), k))
    expected = sum(any(draw) for draw in draws) / len(draws)
    np.testing.assert_allclose(evaluation.pass_at_k(np.array([c]), np.array([n]), k), [expected], atol=1e-12)


def test_pass_at_1_is_the_mean_and_large_counts_do_not_overflow() -> None:
    counts = np.arange(11)
    np.testing.assert_allclose(evaluation.pass_at_k(counts, 10, 1), evaluation.mean_at_k(counts, 10), atol=1e-15)
    # C(99999, 50000) / C(100000, 50000) = 1/2
    np.testing.assert_allclose(evaluation.pass_at_k(1, 100_000, 50_000), 0.5, atol=1e-9)


@pytest.mark.parametrize(
    ("correct", "samples", "k", "message"),
    [
        ([1], [4], 0, "k: 0"),
        ([1], [4], 2.5, "k: 2.5"),
        ([1], [4], 5, "fewer than k = 5"),
        ([5], [4], 2, "5 of 4"),
        ([-1], [4], 2, "-1 of 4"),
        ([0.5], [4], 2, "num_correct"),
    ],
)
def test_pass_at_k_refuses(correct: list[float], samples: list[int], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluation.pass_at_k(correct, samples, k)


def test_mean_needs_a_sample() -> None:
    with pytest.raises(ValueError, match="at least 1 sample"):
        evaluation.mean_at_k([0], [0])


def test_majority() -> None:
    answers = [["a", "b", "a"], ["a", "b", None], [None, None, None], ["b", "b", "a"]]
    right = [[True, False, True], [True, False, False], [False] * 3, [False, False, True]]
    np.testing.assert_array_equal(evaluation.maj_at_k(answers, right), [1.0, 0.5, 0.0, 0.0])


def test_right_answers_are_one_however_they_are_spelled() -> None:
    assert evaluation.maj_at_k([["1/2", "0.5", "7", "7", "7"]], [[True, True, False, False, False]])[0] == 0.0
    assert evaluation.maj_at_k([["1/2", "0.5", "\\frac12", "7", "7"]], [[True] * 3 + [False] * 2])[0] == 1.0


def test_majority_of_k_is_the_mean_over_choices() -> None:
    answers, right = [["a", "a", "b", "c", None]], [[True, True, False, False, False]]
    choices = list(itertools.combinations(range(5), 3))
    whole = [evaluation.maj_at_k([[answers[0][i] for i in it]], [[right[0][i] for i in it]])[0] for it in choices]
    assert evaluation.maj_at_k(answers, right, 3)[0] == pytest.approx(np.mean(whole))
    assert evaluation.maj_at_k(answers, right, 1)[0] == pytest.approx(0.4)  # mean@1
    assert np.isnan(evaluation.maj_at_k(answers, right, 6)[0])
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k: {k} is not allowed"):
            evaluation.maj_at_k(answers, right, k)
    many = [[str(n % 7) for n in range(40)]], [[n % 7 == 0 for n in range(40)]]
    assert abs(evaluation.maj_at_k(*many, 1)[0] - 6 / 40) < 0.1


def test_cvar() -> None:
    values = [1.0, 0.0, 0.5, 0.2]
    assert evaluation.cvar(values, 0.5) == pytest.approx(0.1)
    assert evaluation.cvar(values, 0.375) == pytest.approx((0.0 + 0.5 * 0.2) / 1.5)
    assert evaluation.cvar(values, 1.0) == pytest.approx(np.mean(values))
    with pytest.raises(ValueError, match="share"):
        evaluation.cvar(values, 0.0)


def test_bootstrap_is_seeded_and_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).integers(0, 2, 400).astype(float)
    low, high = evaluation.bootstrap_interval(values, resamples=4000, seed=1)
    assert (low, high) == evaluation.bootstrap_interval(values, resamples=4000, seed=1)
    assert (low, high) != evaluation.bootstrap_interval(values, resamples=4000, seed=2)
    half = 1.96 * values.std() / np.sqrt(values.size)
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert evaluation.bootstrap_interval([0.25] * 5) == (0.25, 0.25)


def test_bootstrap_in_chunks_gives_every_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.linspace(0.0, 1.0, 7)
    whole = evaluation.bootstrap_interval(values, resamples=101)
    monkeypatch.setattr(metrics, "_CHUNK", 70)
    assert evaluation.bootstrap_interval(values, resamples=101) == whole


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    samples = rng.binomial(8, 0.3, (200, 60)) / 8
    hits = [low <= 0.3 <= high for low, high in (evaluation.bootstrap_interval(row, resamples=400) for row in samples)]
    assert 0.88 <= np.mean(hits) <= 0.99


def test_a_paired_difference_is_sharper_than_the_prompts_are_spread() -> None:
    base = np.linspace(0.0, 0.9, 50)
    mean, low, high = evaluation.paired_difference(base + 0.1, base)
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="2 prompts against 3"):
        evaluation.paired_difference([0.0, 1.0, 1.0], [0.0, 1.0])


@pytest.mark.parametrize("values", [[], [[0.1]], [0.1, float("nan")]])
def test_intervals_refuse(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values"):
        evaluation.bootstrap_interval(values)
