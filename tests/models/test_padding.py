"""Padding never matters: not its token ids, not its amount, not its side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import BASE, MASKS, make_model, make_tokens

from gdro_jax.models import qwen3

MODEL = make_model(BASE)
TOKENS = make_tokens(BASE, MASKS.shape)
logits = jax.jit(qwen3.logits)


@pytest.mark.parametrize("padding", [0, BASE.vocab_size - 1, -1, -100, BASE.vocab_size, 2**31 - 1])
def test_token_ids_of_padding_never_matter(padding: int) -> None:
    """Bit for bit, ids outside the vocabulary included."""
    filled = np.where(MASKS, TOKENS, padding).astype(np.int32)
    got = np.asarray(logits(MODEL, filled, MASKS))
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[MASKS], np.asarray(logits(MODEL, TOKENS, MASKS))[MASKS])


@jax.jit
def two_calls(prompts: jax.Array, responses: jax.Array, prompt_mask: jax.Array, mask: jax.Array) -> tuple:
    kv, last = qwen3.prefill(MODEL, prompts, prompt_mask)
    return last, qwen3.extend(MODEL, responses, mask, kv, jnp.array([1, 0, 1]))


@pytest.mark.parametrize("padding", [3, -100, BASE.vocab_size + 7])
def test_token_ids_of_padding_never_matter_to_the_two_calls(padding: int) -> None:
    prompt_mask, mask = np.arange(6)[None] < np.array([[6], [2]]), np.arange(4)[None] < np.array([[4], [1], [3]])

    def run(fill: int) -> tuple[np.ndarray, np.ndarray]:
        prompts = np.where(prompt_mask, make_tokens(BASE, (2, 6), 1), fill).astype(np.int32)
        responses = np.where(mask, make_tokens(BASE, (3, 4), 2), fill).astype(np.int32)
        last, hidden = two_calls(prompts, responses, prompt_mask, mask)
        return np.asarray(last), np.asarray(hidden)

    for got, want, real in zip(run(padding), run(0), (np.ones(2, bool), mask), strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got[real], want[real])


def test_a_gradient_through_padding_is_finite_and_unmoved() -> None:
    def loss(model: qwen3.Qwen3, tokens: np.ndarray) -> jax.Array:
        return (jnp.where(MASKS[..., None], qwen3.logits(model, tokens, MASKS), 0) ** 2).sum()

    odd = np.where(MASKS, TOKENS, BASE.vocab_size + 1).astype(np.int32)
    gradient = jax.jit(jax.grad(loss))
    want, got = gradient(MODEL, TOKENS).arrays(), gradient(MODEL, odd).arrays()
    for name, array in got.items():
        np.testing.assert_array_equal(array, want[name], err_msg=name)
        assert np.isfinite(array).all() and np.abs(array).max() > 0, name


@pytest.mark.parametrize(("left", "right"), [(0, 5), (5, 0), (2, 3)])
def test_amount_and_side_of_padding_never_matter(left: int, right: int) -> None:
    tokens, mask = TOKENS[:1], MASKS[:1]
    want = np.asarray(logits(MODEL, tokens, mask))[0]
    wide = ((0, 0), (left, right))
    got = np.asarray(logits(MODEL, np.pad(tokens, wide), np.pad(mask, wide)))[0, left : left + tokens.shape[1]]
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_a_row_without_tokens_is_finite() -> None:
    mask = jnp.zeros((1, 4), bool)
    kv, last = jax.jit(qwen3.prefill)(MODEL, jnp.zeros((1, 4), jnp.int32), mask)
    assert np.isfinite(last).all() and np.isfinite(kv.k).all() and int(kv.length[0]) == 0
    assert np.isfinite(logits(MODEL, jnp.zeros((1, 4), jnp.int32), mask)).all()
