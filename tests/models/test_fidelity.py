"""Logits equal those of transformers' Qwen3: against golden files always, live where torch is installed."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import (
    BASE,
    CASES,
    LENGTH,
    LONG_CASES,
    LONG_MASKS,
    LONG_PLACES,
    MASKS,
    config,
    make_model,
    make_tokens,
)

from gdro_jax.models import qwen3

GOLDEN, LONG = (np.load(pathlib.Path(__file__).parent / "golden" / f"{name}.npz") for name in ("logits", "long"))
TOLERANCE = 2e-4  # of the largest logit

LIVE_MASKS = {
    "none": np.ones((2, 40), bool),
    "right": np.arange(40)[None] < np.array([[40], [23]]),
    "left": np.arange(40)[None] >= np.array([[0], [17]]),
    "beyond a block": np.arange(300)[None] < np.array([[300], [131]]),
    "both": (np.arange(40)[None] >= np.array([[3], [30]])) & (np.arange(40)[None] < np.array([[37], [35]])),
}


def ours(model: qwen3.Qwen3, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(qwen3.logits)(model, jnp.asarray(tokens), jnp.asarray(mask)))


def error(got: np.ndarray, want: np.ndarray, mask: np.ndarray) -> float:
    """Largest difference at real tokens, as a share of the largest wanted logit there."""
    return float(np.abs(got - want)[mask].max() / np.abs(want[mask]).max())


def test_golden_covers_every_case() -> None:
    assert set(GOLDEN.files) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_golden_ones(name: str) -> None:
    cfg = CASES[name]
    got = ours(make_model(cfg), make_tokens(cfg, MASKS.shape), MASKS)
    assert got.dtype == np.float32
    assert got.shape == (*MASKS.shape, cfg.vocab_size)
    assert error(got, GOLDEN[name], MASKS) < TOLERANCE


@pytest.mark.parametrize("name", LONG_CASES)
def test_logits_equal_the_golden_ones_over_300_tokens(name: str) -> None:
    """Full rows and rows padded on the right, the left and both sides."""
    tokens = make_tokens(CASES[name], LONG_MASKS.shape, seed=7)
    got = ours(make_model(CASES[name]), tokens, LONG_MASKS)[LONG_PLACES]
    assert got.shape == LONG[name].shape == (24, CASES[name].vocab_size)
    for row in range(len(LONG_MASKS)):
        at = np.nonzero(LONG_PLACES)[0] == row
        assert error(got, LONG[name], at) < TOLERANCE


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("rope_base", {}),
        ("rope_base_small", {}),
        ("norm_eps", {}),
        ("grouped_query", {"rope_theta": 9000.0}),
        ("grouped_query", {"rms_norm_eps": 1e-3}),
    ],
)
def test_a_wrong_scalar_field_would_be_seen(case: str, changes: dict[str, float]) -> None:
    """The comparison above can fail: the same weights under another base or eps miss the golden logits."""
    wrong = make_model(config(**changes))
    assert error(ours(wrong, make_tokens(BASE, MASKS.shape), MASKS), GOLDEN[case], MASKS) > 2 * TOLERANCE


@pytest.mark.parametrize("padding", LIVE_MASKS)
def test_logits_equal_transformers_live(padding: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed; the golden files are compared instead")
    from make_golden import reference

    mask = LIVE_MASKS[padding]
    for name in ("grouped_query", "bias_untied_multi_head", "rope_yarn_settings"):
        model = make_model(CASES[name])
        tokens = make_tokens(CASES[name], mask.shape, seed=7)
        assert error(ours(model, tokens, mask), reference(model, tokens, mask), mask) < TOLERANCE, name


@pytest.mark.parametrize("name", CASES)
def test_golden_files_are_current(name: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed; golden files cannot be made again")
    from make_golden import reference

    cfg = CASES[name]
    fresh = reference(make_model(cfg), make_tokens(cfg, MASKS.shape), MASKS)
    assert error(fresh, GOLDEN[name], MASKS) < 1e-5


@pytest.mark.parametrize("name", LONG_CASES)
def test_long_golden_files_are_current(name: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed; golden files cannot be made again")
    from make_golden import long

    assert error(long(name), LONG[name], np.ones(len(LONG[name]), bool)) < 1e-5


def test_bfloat16_is_as_close_to_float32_as_bfloat16_is() -> None:
    """One rounding is 2^-9; a few dozen in a row stay below 5 % of scale, and the result is float32."""
    low = make_model(BASE, "bfloat16")
    high = qwen3.Qwen3(BASE, {name: array.astype(jnp.float32) for name, array in low.arrays().items()})
    tokens = make_tokens(BASE, MASKS.shape)
    got = ours(low, tokens, MASKS)
    assert got.dtype == np.float32
    assert 1e-4 < error(got, ours(high, tokens, MASKS), MASKS) < 0.05


def test_bfloat16_error_is_that_of_transformers_in_bfloat16() -> None:
    pytest.importorskip("torch", reason="torch is not installed; bfloat16 of transformers cannot be computed")
    from make_golden import reference

    low = make_model(BASE, "bfloat16")
    high = qwen3.Qwen3(BASE, {name: array.astype(jnp.float32) for name, array in low.arrays().items()})
    tokens = make_tokens(BASE, MASKS.shape)
    exact = ours(high, tokens, MASKS)
    mean = lambda got: float(np.abs(got - exact)[MASKS].mean())  # noqa: E731
    assert mean(ours(low, tokens, MASKS)) < 1.5 * mean(reference(low, tokens, MASKS))


def program(layers: int, gradient: bool) -> str:
    model = jax.eval_shape(lambda: qwen3.init(config(num_layers=layers), jax.random.key(0)))
    tokens, mask = jnp.zeros((2, LENGTH), jnp.int32), jnp.ones((2, LENGTH), bool)

    def total(model: qwen3.Qwen3) -> jax.Array:
        return qwen3.logits(model, tokens, mask).sum()

    return jax.jit(jax.grad(total) if gradient else total).lower(model).as_text()


@pytest.mark.parametrize("gradient", [False, True])
def test_program_size_does_not_grow_with_depth(gradient: bool) -> None:
    short, deep = program(4, gradient), program(36, gradient)
    assert len(short.splitlines()) == len(deep.splitlines())
    assert len(re.findall("dot_general", short)) == len(re.findall("dot_general", deep)) > 5
