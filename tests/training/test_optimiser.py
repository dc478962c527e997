"""The optimisers by hand, their schedules, and what their states hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gdro_jax.training.config import TrainConfig
from gdro_jax.training.optimiser import learning_rate, make_optimiser

STILL = TrainConfig(learning_rate=0.1, warmup_steps=0, max_grad_norm=1e9)


def updates(gradients: list[float], start: float = 2.0, **fields: float) -> list[float]:
    """One parameter through some gradients."""
    settings = {"learning_rate": 0.1, "warmup_steps": 0, "max_grad_norm": 1e9} | fields
    optimiser = make_optimiser(TrainConfig(**settings))
    parameter, values = jnp.float32(start), []
    state = optimiser.init(parameter)
    for gradient in gradients:
        change, state = optimiser.update(jnp.float32(gradient), state, parameter)
        parameter = optax.apply_updates(parameter, change)
        values.append(float(parameter))
    return values


def test_adam_by_hand():
    """First step: m/(1-b1) = g and v/(1-b2) = g^2, so the parameter moves by the rate, whatever the gradient."""
    assert updates([3.0]) == pytest.approx([1.9], rel=1e-6)
    assert updates([3.0], learning_rate=0.2) == pytest.approx([1.8], rel=1e-6)
    assert updates([3.0], adam_eps=3.0) == pytest.approx([1.95], rel=1e-6)  # g / (|g| + eps) = 1/2
    assert updates([3.0], weight_decay=0.5) == pytest.approx([1.9 - 0.1 * 0.5 * 2.0], rel=1e-6)
    assert updates([3.0], adam_eps=1.0, max_grad_norm=1.0) == pytest.approx([1.95], rel=1e-6)  # g is clipped to 1
    assert updates([1.0, -1.0], adam_b1=0.0, adam_b2=0.5) == pytest.approx([1.9, 2.0], rel=1e-6)
    m = (0.5 * 0.5 * 1.0 - 0.5 * 1.0) / (1 - 0.25)
    assert updates([1.0, -1.0], adam_b1=0.5, adam_b2=0.5)[1] == pytest.approx(1.9 - 0.1 * m, rel=1e-6)
    v = (0.9 * 0.1 * 1.0 + 0.1 * 9.0) / (1 - 0.81)
    assert updates([1.0, 3.0], adam_b1=0.0, adam_b2=0.9)[1] == pytest.approx(1.9 - 0.1 * 3 / np.sqrt(v), rel=1e-5)


def test_warm_up_is_linear_then_constant():
    rate = learning_rate(TrainConfig(learning_rate=0.8, warmup_steps=4))
    assert [float(rate(i)) for i in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert updates([1.0], learning_rate=0.8, warmup_steps=4) == pytest.approx([1.8], rel=1e-6)
    slow = TrainConfig(learning_rate=0.8, warmup_steps=4 * 10**9, decay="linear", decay_steps=4 * 10**9)
    assert float(learning_rate(slow)(3)) == pytest.approx(0.8 * 4 / (4 * 10**9), rel=1e-6)  # above int32
    constant = learning_rate(TrainConfig(learning_rate=0.8, warmup_steps=0))
    assert [float(constant(i)) for i in (0, 9)] == pytest.approx([0.8, 0.8])


def test_the_rate_falls_by_line_or_cosine_to_its_floor():
    config = TrainConfig(learning_rate=0.8, warmup_steps=2, decay="linear", decay_steps=4, final_rate=0.25)
    line = learning_rate(config)
    assert [float(line(i)) for i in range(8)] == pytest.approx([0.4, 0.8, 0.8, 0.65, 0.5, 0.35, 0.2, 0.2])
    cosine = learning_rate(dataclasses.replace(config, decay="cosine"))
    want = [0.8 * (0.25 + 0.75 * 0.5 * (1 + np.cos(np.pi * x / 4))) for x in range(5)]
    assert [float(cosine(i)) for i in range(2, 7)] == pytest.approx(want, rel=1e-6)
    assert updates([1.0, 1.0], decay="linear", decay_steps=1) == pytest.approx([1.9, 1.9])  # 0.1, then 0


def test_adafactor_by_hand():
    """The first step's second moment is the gradient's own square, so the parameter moves by the rate."""
    assert updates([3.0], optimiser="adafactor") == pytest.approx([1.9], rel=1e-5)
    assert updates([3.0], optimiser="adafactor", weight_decay=0.5) == pytest.approx([1.9 - 0.1 * 0.5 * 2], rel=1e-5)


def held(config: TrainConfig, params: dict[str, jax.Array]) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(make_optimiser(config).init(params)) if x.size > 1]


def test_adafactor_keeps_rows_and_columns_of_large_matrices():
    large = {"w": jnp.ones((2, 256, 128))}
    assert sum(x.size for x in held(dataclasses.replace(STILL, optimiser="adafactor"), large)) == 2 * (256 + 128)
    assert sum(x.size for x in held(STILL, large)) == 2 * 2 * 256 * 128


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_the_first_moment_may_be_bfloat16(optimiser):
    params = {"w": jnp.ones((1, 4, 4)), "norm": jnp.ones((1, 4))}
    config = dataclasses.replace(STILL, optimiser=optimiser, moment_dtype="bfloat16")
    kinds = {str(x.dtype) for x in held(config, params)}
    assert kinds == {"bfloat16", "float32"}  # the second moment stays
    assert {str(x.dtype) for x in held(dataclasses.replace(config, moment_dtype="float32"), params)} == {"float32"}
    rule = make_optimiser(config)
    change, _ = rule.update(jax.tree.map(lambda x: 0.5 * x, params), rule.init(params), params)
    assert all(x.dtype == jnp.float32 and (np.asarray(x) < 0).all() for x in jax.tree.leaves(change))


@pytest.mark.parametrize("optimiser", ["adamw", "adafactor", "muon"])
def test_bfloat16_parameters_have_a_float32_state(optimiser):
    """A second moment of bfloat16 stands still where a step asks for less than 1/256 of it."""
    config = dataclasses.replace(STILL, optimiser=optimiser)
    params = {"w": jnp.ones((1, 4, 4), jnp.bfloat16), "norm": jnp.ones((1, 4), jnp.bfloat16)}
    assert {str(x.dtype) for x in held(config, params)} == {"float32"}
    rule = make_optimiser(config)
    change, _ = rule.update(params, rule.init(params), params)
    assert {str(x.dtype) for x in jax.tree.leaves(change)} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(optax.apply_updates(params, change))} == {"bfloat16"}


def test_muon_takes_the_blocks_matrices_and_adam_the_rest():
    """A layer's update is near a multiple of an orthogonal matrix, of AdamW's size; a norm's is Adam's."""
    rng = np.random.default_rng(0)
    grads = {"w": jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.float32), "norm": jnp.asarray([[3.0, -0.01]])}
    rule = make_optimiser(dataclasses.replace(STILL, optimiser="muon"))
    params = jax.tree.map(jnp.zeros_like, grads)
    change, _ = jax.jit(rule.update)(grads, rule.init(params), params)
    look_ahead = 1 + 0.9 * (1 - 0.9) / (1 - 0.9**2)  # Nesterov's, of Adam's first step
    np.testing.assert_allclose(change["norm"], [[-0.1 * look_ahead, 0.1 * look_ahead]], rtol=1e-4)
    for layer, gradient in zip(np.asarray(change["w"]), np.asarray(grads["w"]), strict=True):
        sizes = np.linalg.svd(layer, compute_uv=False)
        assert sizes.max() / sizes.min() < 2 < np.linalg.cond(gradient) and (layer * gradient).sum() < 0
        assert 0.7 < np.sqrt((layer**2).mean()) / (0.1 * 0.2) < 1.3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimiser": "sgd"}, r"train.optimiser='sgd'"),
        ({"moment_dtype": "float16"}, r"train.moment_dtype='float16'"),
        ({"optimiser": "adafactor", "adam_b2": 0.9}, r"train.adam_b2=0.9: .*adafactor does not use it"),
        ({"decay": "linear"}, r"train.decay_steps=null"),
        ({"decay_steps": 5}, r"train.decay_steps=5"),
        ({"final_rate": 0.1}, r"train.final_rate=0.1"),
        ({"decay": "exponential", "decay_steps": 5}, r"train.decay='exponential'"),
        ({"max_skipped": -1}, r"train.max_skipped=-1"),
        ({"importance_cap": 0.0}, r"train.importance_cap=0.0"),
        ({"ratio_level": "row"}, r"train.ratio_level='row'"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)
