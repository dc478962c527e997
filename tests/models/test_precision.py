"""Parameters in one dtype, arithmetic in another: the model computes as its working copy, gradients stay float32."""

import collections
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import BASE, MASKS, make_model, make_tokens

from gdro_jax.models import decode, lora, qwen3
from gdro_jax.training.logprobs import response_logprobs

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


def test_gradients_of_scales_and_biases_lose_no_token() -> None:
    """Four thousand of one each, through a norm and an addition in bfloat16."""
    x = jnp.ones((1, 4000, 16), jnp.bfloat16)

    def total(scale: jax.Array, bias: jax.Array) -> jax.Array:
        low = [array.astype(jnp.bfloat16) for array in (scale, bias)]
        return (qwen3._rms_norm(x, low[0], 1e-6) + low[1]).astype(jnp.float32).sum()

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.ones(16), jnp.zeros(16)):
        np.testing.assert_allclose(gradient, 4000.0, rtol=2**-8)


@pytest.mark.slow
def test_gradients_are_those_of_the_working_copy() -> None:
    def loss(model: qwen3.Qwen3) -> jax.Array:
        return (jnp.where(MASKS[..., None], qwen3.logits(model, TOKENS, MASKS), 0) ** 2).mean()

    got, want = (jax.jit(jax.grad(loss))(model).arrays() for model in (MIXED, qwen3.working(MIXED)))
    for name, array in got.items():
        assert array.dtype == jnp.float32, name
        scale = float(jnp.abs(want[name].astype(jnp.float32)).max())
        np.testing.assert_allclose(array, want[name].astype(jnp.float32), atol=0.02 * scale, rtol=0, err_msg=name)


# What the precision policy says, read off the programs --------------------------------------------------------------
def operations(jaxpr: Any) -> Iterator[Any]:
    """Every operation of a program, those of the programs in it included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from operations(inner)


def decoded(model: qwen3.Qwen3) -> jax.Array:
    """Logits of one decoding step after prompts."""
    own, mask = jnp.arange(len(TOKENS)), jnp.asarray(MASKS)
    prompts = decode.lay_out(qwen3.prefill(model, TOKENS, mask)[0])
    cache = decode.empty_cache(prompts, len(TOKENS), 4)
    tiles = decode.tiles_of(own, len(TOKENS), 2)
    return qwen3.unembed(model, decode.decode(model, jnp.asarray(TOKENS[:, 0]), own * 0, own, prompts, tiles, cache)[0])


def extended(model: qwen3.Qwen3) -> jax.Array:
    mask = jnp.asarray(MASKS)
    kv, _ = qwen3.prefill(model, TOKENS, mask)
    return qwen3.extend(model, TOKENS, mask, kv, jnp.arange(len(TOKENS))).astype(jnp.float32).sum()


def trained(model: qwen3.Qwen3) -> jax.Array:
    index = jnp.arange(len(TOKENS))
    return response_logprobs(model, TOKENS, MASKS, index, TOKENS, MASKS, 1.0)[0].sum()


def summed(model: qwen3.Qwen3) -> jax.Array:
    return qwen3.logits(model, TOKENS, MASKS).sum()


PROGRAMS = {  # products of a layer's weights, all others: the layers of decoding are written out
    "logits": (summed, 7, 3),
    "responses": (extended, 14, 4),
    "gradient of responses": (jax.grad(extended), None, None),
    "log-probs": (trained, None, None),
    "gradient of log-probs": (jax.grad(trained), None, None),
    "decoding": (decoded, None, None),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_float32_whatever_the_compute_dtype(name: str) -> None:
    """Norms, angles, softmax; scores, mixed values and logits; nothing of bfloat16 is multiplied by float32."""
    program, of_weights, others = PROGRAMS[name]
    found = list(operations(jax.make_jaxpr(program)(MIXED).jaxpr))
    for kind in ("rsqrt", "cos", "sin", "exp"):
        dtypes = {str(eqn.invars[0].aval.dtype) for eqn in found if eqn.primitive.name == kind}
        assert dtypes == {"float32"}, kind
    products = [eqn for eqn in found if eqn.primitive.name == "dot_general"]
    assert {str(x.aval.dtype) for eqn in products for x in eqn.invars} == {"bfloat16"}
    kinds = collections.Counter(str(eqn.params["preferred_element_type"]) for eqn in products)
    assert set(kinds) == {"bfloat16", "float32"}
    if of_weights is not None:
        assert kinds == {"bfloat16": of_weights, "float32": others}
    batched = [eqn for eqn in products if eqn.params["dimension_numbers"][1][0]]  # attention's, none with weights
    assert batched and {str(eqn.outvars[0].aval.dtype) for eqn in batched} == {"float32"}
    over_vocabulary = [eqn for eqn in products if BASE.vocab_size in eqn.outvars[0].aval.shape]
    if name not in ("responses", "gradient of responses"):
        assert over_vocabulary
        assert {str(eqn.outvars[0].aval.dtype) for eqn in over_vocabulary} == {"float32"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_products_of_float32_use_all_of_its_bits(name: str) -> None:
    """On TPUs and GPUs they would not by themselves."""
    low = qwen3.adapted(make_model(BASE), lora.init(BASE, jax.random.key(0), rank=2, alpha=4, names=lora.TARGETS))
    for model in (make_model(BASE), low):
        found = operations(jax.make_jaxpr(PROGRAMS[name][0])(model).jaxpr)
        products = [eqn for eqn in found if eqn.primitive.name == "dot_general"]
        assert len(products) > 7
        assert {eqn.params["precision"] for eqn in products} == {(jax.lax.Precision.HIGHEST,) * 2}
