"""Parameters in one dtype, arithmetic in another: the model computes as its working copy, gradients stay float32."""

import jax
import jax.numpy as jnp
import numpy as np
from model_cases import BASE, MASKS, make_model, make_tokens

from gdro_jax.models import qwen3

TOKENS = make_tokens(BASE, MASKS.shape)
MIXED = qwen3.Qwen3(BASE, make_model(BASE).arrays(), "bfloat16")
logits = jax.jit(qwen3.logits)


def test_a_mixed_model_computes_as_its_working_copy_bit_for_bit() -> None:
    copy = qwen3.working(MIXED)
    assert {str(x.dtype) for x in jax.tree.leaves(copy)} == {"bfloat16"}
    assert {str(x.dtype) for x in jax.tree.leaves(MIXED)} == {"float32"}
    np.testing.assert_array_equal(logits(MIXED, TOKENS, MASKS), logits(copy, TOKENS, MASKS))
    low = make_model(BASE, "bfloat16")
    np.testing.assert_array_equal(logits(low, TOKENS, MASKS), logits(copy, TOKENS, MASKS))
    assert (np.asarray(logits(MIXED, TOKENS, MASKS)) != np.asarray(logits(make_model(BASE), TOKENS, MASKS))).any()


def test_the_working_copy_of_one_dtype_is_the_model_itself() -> None:
    model = make_model(BASE)
    assert qwen3.working(model) is model
    assert qwen3.working(qwen3.Qwen3(BASE, model.arrays(), "float32")).embed.dtype == jnp.float32


def test_keys_and_hidden_states_have_the_compute_dtype() -> None:
    kv, last = jax.eval_shape(qwen3.prefill, MIXED, TOKENS, MASKS)
    assert kv.k.dtype == kv.v.dtype == last.dtype == jnp.bfloat16


def test_gradients_of_a_token_s_many_occurrences_add_up_in_float32() -> None:
    """A thousand gradients of one each: in bfloat16 the sum would stop at 256."""

    def total(model: qwen3.Qwen3) -> jax.Array:
        return qwen3.embed_tokens(model, jnp.full((1, 1000), 5)).astype(jnp.float32).sum()

    gradient = jax.grad(total)(MIXED).embed[...]
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient[5], 1000.0)


def test_gradients_are_those_of_the_working_copy() -> None:
    def loss(model: qwen3.Qwen3) -> jax.Array:
        return (jnp.where(MASKS[..., None], qwen3.logits(model, TOKENS, MASKS), 0) ** 2).mean()

    got, want = (jax.jit(jax.grad(loss))(model).arrays() for model in (MIXED, qwen3.working(MIXED)))
    for name, array in got.items():
        assert array.dtype == jnp.float32, name
        scale = float(jnp.abs(want[name].astype(jnp.float32)).max())
        np.testing.assert_allclose(array, want[name].astype(jnp.float32), atol=0.02 * scale, rtol=0, err_msg=name)
