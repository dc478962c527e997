"""Rematerialisation: less is kept for the backward pass, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import BASE, config, make_model, make_tokens

from gdro_jax.models import qwen3
from gdro_jax.training import config_io, setup

DEEP = config(num_layers=3)
ARRAYS = make_model(DEEP).arrays()
PROMPTS, RESPONSES = make_tokens(BASE, (2, 6), 1), make_tokens(BASE, (3, 5), 2)
PROMPT_MASK, MASK = np.arange(6)[None] < np.array([[6], [3]]), np.arange(5)[None] < np.array([[5], [2], [4]])


def loss(model: qwen3.Qwen3) -> jax.Array:
    kv, last = qwen3.prefill(model, jnp.asarray(PROMPTS), jnp.asarray(PROMPT_MASK))
    hidden = qwen3.extend(model, jnp.asarray(RESPONSES), jnp.asarray(MASK), kv, jnp.array([0, 1, 1]))
    return (jnp.where(MASK[..., None], hidden, 0) ** 2).mean() + last.sum()


def kept(remat: str) -> int:
    """Numbers that the backward pass finds kept, the parameters themselves left out."""
    model = qwen3.Qwen3(DEEP, ARRAYS, remat=remat)
    backward = jax.eval_shape(lambda model: jax.vjp(loss, model)[1], model)
    return sum(leaf.size for leaf in jax.tree.leaves(backward)) - qwen3.num_params(DEEP)


def test_less_is_kept_the_stricter_the_policy() -> None:
    assert kept("none") > 1.3 * kept("products") > 1.3 * 1.3 * kept("block")


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["products", "block"])
def test_loss_and_gradient_are_the_same(remat: str) -> None:
    plain, lean = (qwen3.Qwen3(DEEP, ARRAYS, remat=r) for r in ("none", remat))
    (want, grad), (got, lean_grad) = (jax.jit(jax.value_and_grad(loss))(model) for model in (plain, lean))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for name, array in grad.arrays().items():
        scale = float(jnp.abs(array).max())
        np.testing.assert_allclose(lean_grad.arrays()[name], array, atol=1e-5 * scale, rtol=0, err_msg=name)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match=r"remat=.some.: must be one of none, products, block"):
        qwen3.Qwen3(DEEP, ARRAYS, remat="some")
    with pytest.raises(config_io.ConfigError, match=r"model\.remat=.some."):
        config_io.load(None, [("model.remat", "some")])


def test_the_configuration_reaches_the_model() -> None:
    given = config_io.load(None, [("model.remat", "block"), ("model.dtype", "bfloat16")]).model
    model = setup.load_policy(given).model
    assert model.remat == "block" and qwen3.working(model).remat == "block"
