"""Logits equal those of transformers' Qwen3: against golden files always, live where torch is installed."""

import json
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
    widened,
)

from gdro_jax.models import qwen3

GOLDEN, LONG = (np.load(pathlib.Path(__file__).parent / "golden" / f"{name}.npz") for name in ("logits", "long"))
BFLOAT16 = json.loads((pathlib.Path(__file__).parent / "golden" / "bfloat16.json").read_text())
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
    assert set(GOLDEN.files) == set(BFLOAT16) == set(CASES)


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


QUICK = ("grouped_query", "rope_yarn_settings", "bias_untied_multi_head")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_bfloat16_costs_what_it_costs_transformers(name: str) -> None:
    """The mean error against float32 on the same bfloat16 weights; the result is float32."""
    low, tokens = make_model(CASES[name], "bfloat16"), make_tokens(CASES[name], MASKS.shape)
    got, exact = ours(low, tokens, MASKS), ours(widened(low), tokens, MASKS)[MASKS]
    assert got.dtype == np.float32
    mean = float(np.abs(got[MASKS] - exact).mean() / np.abs(exact).max())
    assert 0.8 < mean / BFLOAT16[name] < 1.2


@pytest.mark.parametrize("name", ["grouped_query"])
def test_golden_errors_in_bfloat16_are_current(name: str) -> None:
    """Not to the last digit: the order of sums is the library's own."""
    pytest.importorskip("torch", reason="torch is not installed; bfloat16 of transformers cannot be computed")
    from make_golden import bfloat16

    assert bfloat16(name) == pytest.approx(BFLOAT16[name], rel=0.1)


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
