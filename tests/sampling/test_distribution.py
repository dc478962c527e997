"""Temperature, top-k, top-p and the draw, against hand-derived distributions and exact frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdro_jax.sampling import SamplingConfig
from gdro_jax.sampling.distribution import inverse_cdf, warp

ALMOST_ONE = np.float32(1 - 2**-24)  # the largest float32 below 1
draw = jax.jit(inverse_cdf)


def logs(probs: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.asarray(probs, np.float32))


def drawn(probs: np.ndarray, uniform: np.ndarray) -> int:
    return int(draw(logs(probs), uniform)[0])


def warped(probs: list[float], **settings: float) -> np.ndarray:
    config = SamplingConfig(max_new_tokens=1, **settings)
    return np.exp(np.asarray(warp(jnp.asarray(logs(np.array([probs]))), config)))[0]


@pytest.mark.parametrize("size", [3, 64, 65, 1000])
def test_frequencies_are_exact(size):
    """A grid of uniforms gives every token its share of the grid, to one grid point per boundary."""
    grid = 5_000
    probs = np.random.default_rng(size).dirichlet(np.full(size, 0.3)).astype(np.float32)
    uniform = (np.arange(grid, dtype=np.float32) + 0.5) / grid
    tokens = np.asarray(draw(np.broadcast_to(logs(probs), (grid, size)), uniform))
    counts = np.bincount(tokens, minlength=size)
    assert np.abs(counts - grid * probs).max() <= 2
    assert (np.diff(tokens) >= 0).all()  # the inverse of a cumulative distribution never goes back


def test_unnormalised_log_probabilities_draw_the_same():
    probs = np.random.default_rng(0).dirichlet(np.ones(100), 50)
    uniform = np.random.default_rng(1).random(50, np.float32)
    np.testing.assert_array_equal(draw(logs(probs), uniform), draw(logs(probs) + 37.0, uniform))


@pytest.mark.parametrize("size", [10, 64, 100, 1000])
def test_a_token_without_probability_is_never_drawn(size):
    """Also where rounding of a parallel cumulative sum moves it between two tokens that add nothing."""
    rng = np.random.default_rng(size)
    rows = 2000
    probs = rng.dirichlet(np.ones(size), rows).astype(np.float32)
    probs[rng.random(probs.shape) < 0.6] = 0
    probs[:, rng.integers(size)] += 1e-3  # none is empty
    edges = np.asarray(jnp.cumsum(jnp.asarray(probs) / probs.max(-1, keepdims=True), -1))
    at_an_edge = edges[np.arange(rows), rng.integers(0, size, rows)] / edges[:, -1]
    for uniform in (np.zeros(rows), np.full(rows, ALMOST_ONE), rng.random(rows), at_an_edge):
        uniform = np.minimum(uniform, ALMOST_ONE).astype(np.float32)
        tokens = np.asarray(draw(logs(probs), uniform))
        assert (probs[np.arange(rows), tokens] > 0).all()


def test_the_ends_of_the_unit_interval_give_the_ends_of_the_support():
    probs = np.zeros((1, 200), np.float32)
    probs[0, [70, 130, 190]] = 0.2, 0.3, 0.5
    assert drawn(probs, np.float32([0.0])) == 70
    assert drawn(probs, np.float32([0.2 - 1e-6])) == 70
    assert drawn(probs, np.float32([0.2 + 1e-6])) == 130
    assert drawn(probs, np.float32([0.5 + 1e-6])) == 190
    assert drawn(probs, np.array([ALMOST_ONE])) == 190


def test_one_token_with_all_the_probability():
    probs = np.zeros((1, 65), np.float32)
    probs[0, 64] = 1.0
    for uniform in (0.0, 0.5, ALMOST_ONE):
        assert drawn(probs, np.float32([uniform])) == 64


def test_the_vocabulary_of_qwen3():
    size = 151_936
    logits = np.random.default_rng(3).normal(0, 3, size)
    exact = np.cumsum(np.exp(logits - logits.max()))
    exact /= exact[-1]
    uniform = np.float32([0.0, 0.1, 0.5, 0.9, 0.999, ALMOST_ONE])
    tokens = np.asarray(draw(np.broadcast_to(np.float32(logits), (len(uniform), size)), uniform))
    below = np.where(tokens > 0, exact[tokens - 1], 0.0)
    assert (below - 1e-5 <= uniform).all() and (uniform <= exact[tokens] + 1e-5).all()
    assert tokens[0] == 0 and tokens[-1] < size


def test_temperature_is_a_power_of_the_probabilities():
    np.testing.assert_allclose(warped([0.1, 0.2, 0.7], temperature=0.5), np.array([1, 4, 49]) / 54, rtol=1e-5)
    roots = np.sqrt([0.1, 0.2, 0.7])
    np.testing.assert_allclose(warped([0.1, 0.2, 0.7], temperature=2.0), roots / roots.sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 1}, [0, 0, 1, 0]),
        ({"top_k": 2}, [0, 3 / 7, 4 / 7, 0]),
        ({"top_k": 9}, [0.1, 0.3, 0.4, 0.2]),  # more than there are: off
        ({"top_p": 1e-6}, [0, 0, 1, 0]),  # the likeliest token is always kept
        ({"top_p": 0.4 - 1e-4}, [0, 0, 1, 0]),
        ({"top_p": 0.5}, [0, 3 / 7, 4 / 7, 0]),  # the smallest set that reaches one half
        ({"top_p": 0.75}, [0, 3 / 9, 4 / 9, 2 / 9]),
        ({"top_p": 0.95}, [0.1, 0.3, 0.4, 0.2]),
        ({"top_k": 3, "top_p": 0.75}, [0, 3 / 7, 4 / 7, 0]),  # 4/9 + 3/9 of what top-k left reaches 0.75
        ({"min_p": 0.5}, [0, 3 / 9, 4 / 9, 2 / 9]),  # one half of the likeliest is still kept
        ({"min_p": 0.6}, [0, 3 / 7, 4 / 7, 0]),
        ({"min_p": 1.0}, [0, 0, 1, 0]),
        ({"temperature": 0.5, "min_p": 0.5}, [0, 9 / 25, 16 / 25, 0]),  # of the probabilities after the temperature
        ({"top_p": 0.75, "min_p": 0.6}, [0, 3 / 7, 4 / 7, 0]),
        ({"temperature": 0.5, "top_p": 0.75}, [0, 9 / 25, 16 / 25, 0]),  # 16/30 + 9/30 after the temperature
    ],
)
def test_truncation(settings, expected):
    np.testing.assert_allclose(warped([0.1, 0.3, 0.4, 0.2], **settings), expected, rtol=1e-5, atol=1e-7)


def test_equally_likely_tokens_are_kept_together():
    np.testing.assert_allclose(warped([0.3, 0.3, 0.3, 0.1], top_k=2), [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-5)
    np.testing.assert_allclose(warped([0.3, 0.3, 0.3, 0.1], top_p=0.5), [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-5)


def test_what_is_cut_off_is_never_drawn():
    logits = np.random.default_rng(5).normal(0, 2, (500, 131)).astype(np.float32)
    logprobs = warp(jnp.asarray(logits), SamplingConfig(max_new_tokens=1, top_k=20, top_p=0.8))
    kept = np.isfinite(np.asarray(logprobs))
    assert kept.sum(1).min() >= 1 and kept.sum(1).max() <= 20
    np.testing.assert_allclose(np.exp(np.asarray(logprobs)).sum(1), 1.0, rtol=1e-5)
    for uniform in (0.0, 0.3, ALMOST_ONE):
        tokens = np.asarray(draw(logprobs, np.full(500, uniform, np.float32)))
        assert kept[np.arange(500), tokens].all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", float("nan")),
        ("min_new_tokens", 0),
        ("min_new_tokens", 5),
        ("segment", 0),
        ("stop_tokens", (3, -1)),
        ("slots", 0),
        ("cache_dtype", "float16"),
        ("cache", "pages"),
        ("page_tokens", 0),
        ("cache_tokens", 0),
    ],
)
def test_a_bad_setting_names_itself(field, value):
    settings = {"max_new_tokens": 4, field: value}
    with pytest.raises(ValueError, match=rf"^{field}=.*must be"):
        SamplingConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "truncates"),
    [
        ({}, False),
        ({"temperature": 0.7}, False),  # the policy at a temperature is what the trainer computes
        ({"top_p": 0.9}, True),
        ({"top_k": 5}, True),
        ({"min_p": 0.1}, True),
        ({"min_new_tokens": 2, "stop_tokens": (1,)}, True),
        ({"min_new_tokens": 2}, False),  # nothing stops a row early
    ],
)
def test_truncates(settings, truncates):
    assert SamplingConfig(max_new_tokens=2, **settings).truncates is truncates
